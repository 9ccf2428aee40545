"""Every error this package raises on purpose. The exporter adds its own, in ``scm_export.errors``.

    ScmError
    ├── BundleError                 a bundle cannot be used
    │   ├── BundleNotFoundError     (FileNotFoundError) no bundle at that path
    │   ├── BundleSchemaError       (ValueError) the manifest is malformed, or of a newer schema
    │   └── BundleIntegrityError    (ValueError) a file is missing, or not the one the manifest describes
    ├── HubError                    (OSError) the Hugging Face hub refuses, or cannot be reached
    │   └── HubNotFoundError        (FileNotFoundError) no such repository, revision or file there, or offline and not in the cache
    ├── InvalidArgumentError        (ValueError) an argument of a call is out of range or of the wrong shape
    │   └── GeneratorClosedError    (RuntimeError) a call of a Generator that is closed, or was while the call ran
    ├── MissingDependencyError      (ImportError) an optional package is not installed, or is too old, or two exclude each other
    ├── OutputError                 (OSError) a result cannot be written
    ├── DeviceError                 (RuntimeError) the device asked for cannot be had, or ONNX Runtime went elsewhere
    ├── ForkedError                 (RuntimeError) a Generator was used in a forked child of the process that made it
    ├── GenerationCancelledError    a callback returned False
    ├── InferenceError              (RuntimeError) ONNX Runtime refused a graph or failed in it
    │   ├── OutOfMemoryError        (MemoryError) of the device or the host; a smaller batch may fit
    │   └── NonFiniteError          (ArithmeticError) samples turned into NaN or infinity
    └── NativeOpsError              (RuntimeError) the native kernels were asked for and cannot be used

Those in parentheses are the built-in errors they are as well.
"""

from __future__ import annotations


class ScmError(Exception):
    """Base of all errors of scm_runtime and scm_export."""


class BundleError(ScmError):
    """A bundle cannot be used."""


class BundleNotFoundError(BundleError, FileNotFoundError):
    """There is no bundle at that path."""


class BundleSchemaError(BundleError, ValueError):
    """The manifest is malformed, or of a schema this version does not know."""


class BundleIntegrityError(BundleError, ValueError):
    """A file of the bundle is missing, or not the one its manifest describes."""


class HubError(ScmError, OSError):
    """The Hugging Face hub refuses, or cannot be reached."""


class HubNotFoundError(HubError, FileNotFoundError):
    """The hub has no such repository, revision or file; or it is not to be asked, and the cache has none."""


class InvalidArgumentError(ScmError, ValueError):
    """An argument is out of range, of the wrong type or of the wrong shape."""


class GeneratorClosedError(InvalidArgumentError, RuntimeError):
    """The Generator is closed, or was while the call waited or ran."""


class MissingDependencyError(ScmError, ImportError):
    """A package is not installed, or is too old, or two are installed that exclude each other."""


class OutputError(ScmError, OSError):
    """A result cannot be written."""


class InferenceError(ScmError, RuntimeError):
    """ONNX Runtime refused a graph or failed in it."""


class OutOfMemoryError(InferenceError, MemoryError):
    """Memory of the device or of the host did not suffice. The Generator goes on working: a smaller batch may fit."""


class NonFiniteError(InferenceError, ArithmeticError):
    """Samples turned into NaN or infinity.

    ``seeds`` are those samples', ``step`` (from 0) is the one after which it was seen, ``dtype`` the graphs'.
    """

    def __init__(self, message: str, *, seeds: tuple[int, ...], step: int, dtype: str) -> None:
        super().__init__(message)
        self.seeds, self.step, self.dtype = seeds, step, dtype


class DeviceError(ScmError, RuntimeError):
    """The device asked for cannot be had, or ONNX Runtime opened a session elsewhere."""


class ForkedError(ScmError, RuntimeError):
    """A Generator was used in a forked child: its threads and its device context stayed in the parent. Make one in the child, or spawn."""


class GenerationCancelledError(ScmError):
    """A callback returned False: the call ended before its next step."""


class NativeOpsError(ScmError, RuntimeError):
    """The native kernels were asked for, and the library is missing, refused, or of another version than the bundle."""
