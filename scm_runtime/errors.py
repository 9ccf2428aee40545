"""The errors of this package. The exporter adds its own, in ``scm_export.errors``.

    ScmError
    ├── BundleError                 a bundle cannot be used
    │   ├── BundleNotFoundError     (FileNotFoundError) no bundle at that path
    │   ├── BundleSchemaError       (ValueError) the manifest is malformed, or of a newer schema
    │   └── BundleIntegrityError    (ValueError) a file is missing or differs from the manifest
    ├── HubError                    (OSError) the Hugging Face hub refuses, or cannot be reached
    │   └── HubNotFoundError        (FileNotFoundError) no such repository, revision or file, or offline and not in the cache
    ├── InvalidArgumentError        (ValueError) an argument of a call is out of range or of the wrong shape
    │   └── GeneratorClosedError    (RuntimeError) a call of a Generator that is closed, or was closed during the call
    ├── MissingDependencyError      (ImportError) an optional package is not installed, or is too old, or two exclude each other
    ├── OutputError                 (OSError) a result cannot be written
    ├── DeviceError                 (RuntimeError) the requested device is not available, or ONNX Runtime used another
    ├── ForkedError                 (RuntimeError) a Generator was used in a forked child of the process that made it
    ├── GenerationCancelledError    a callback returned False
    ├── GenerationTimeoutError      (TimeoutError) a call was not finished within its timeout
    ├── QueueFullError              (RuntimeError) submit refused a request: max_queue others are not finished
    ├── InferenceError              (RuntimeError) ONNX Runtime refused a graph or failed in it
    │   ├── OutOfMemoryError        (MemoryError) the device or the host ran out of memory; a smaller batch may fit
    │   └── NonFiniteError          (ArithmeticError) samples became NaN or infinite
    └── NativeOpsError              (RuntimeError) the native kernels were required and cannot be used

In parentheses: the built-in error that each also derives from.
"""

from __future__ import annotations


class ScmError(Exception):
    """Base class of all errors of scm_runtime and scm_export."""


class BundleError(ScmError):
    """A bundle cannot be used."""


class BundleNotFoundError(BundleError, FileNotFoundError):
    """There is no bundle at that path."""


class BundleSchemaError(BundleError, ValueError):
    """The manifest is malformed, or of a schema this version does not know."""


class BundleIntegrityError(BundleError, ValueError):
    """A file of the bundle is missing or differs from the manifest."""


class HubError(ScmError, OSError):
    """The Hugging Face hub refuses, or cannot be reached."""


class HubNotFoundError(HubError, FileNotFoundError):
    """The hub has no such repository, revision or file; or it is in offline mode, and the cache does not have it."""


class InvalidArgumentError(ScmError, ValueError):
    """An argument is out of range, of the wrong type or of the wrong shape."""


class GeneratorClosedError(InvalidArgumentError, RuntimeError):
    """The Generator is closed, or was closed while the call waited or ran."""


class MissingDependencyError(ScmError, ImportError):
    """A package is not installed, or is too old, or two are installed that exclude each other."""


class OutputError(ScmError, OSError):
    """A result cannot be written."""


class InferenceError(ScmError, RuntimeError):
    """ONNX Runtime refused a graph or failed in it."""


class OutOfMemoryError(InferenceError, MemoryError):
    """The device or the host ran out of memory. The Generator stays usable: a smaller batch may fit."""


class NonFiniteError(InferenceError, ArithmeticError):
    """Samples became NaN or infinite.

    Attributes:
        seeds: seeds of these samples.
        step: index from 0 of the evaluation after which they were found.
        dtype: precision of the graphs.
    """

    def __init__(self, message: str, *, seeds: tuple[int, ...], step: int, dtype: str) -> None:
        super().__init__(message)
        self.seeds, self.step, self.dtype = seeds, step, dtype


class DeviceError(ScmError, RuntimeError):
    """The requested device is not available, or ONNX Runtime opened a session on another."""


class ForkedError(ScmError, RuntimeError):
    """A Generator was used in a forked child, which has neither its threads nor its device context. Make one in the child, or spawn."""


class GenerationCancelledError(ScmError):
    """A callback returned False, which ended the call before its next step."""


class GenerationTimeoutError(ScmError, TimeoutError):
    """A call was not finished within its ``timeout``, and was ended. The Generator stays usable."""


class QueueFullError(ScmError, RuntimeError):
    """``submit`` refused a request, because ``max_queue`` requests are not finished. Try again later, or raise the limit."""


class NativeOpsError(ScmError, RuntimeError):
    """The native kernels were required, and the library is missing, cannot be loaded, or has another version than the bundle."""
