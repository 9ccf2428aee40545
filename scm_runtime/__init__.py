"""Sample consistency models in one or two steps through ONNX Runtime, without torch.

    from scm_runtime import Generator

    with Generator("digits") as generate:
        generate(class_labels=[3, 1, 4], seed=7).save("digits.png")

``__all__`` lists everything public.
"""

import importlib
import typing

from scm_runtime._version import __version__
from scm_runtime.errors import (
    BundleError,
    BundleIntegrityError,
    BundleNotFoundError,
    BundleSchemaError,
    DeviceError,
    ForkedError,
    GenerationCancelledError,
    GenerationTimeoutError,
    GeneratorClosedError,
    HubError,
    HubNotFoundError,
    InferenceError,
    InvalidArgumentError,
    MissingDependencyError,
    NativeOpsError,
    NonFiniteError,
    OutOfMemoryError,
    OutputError,
    QueueFullError,
    ScmError,
)

if typing.TYPE_CHECKING:
    from scm_runtime.bundle.manifest import Manifest
    from scm_runtime.device_pool import DevicePool
    from scm_runtime.engines.open_bundle import GeneratorInfo
    from scm_runtime.generator import Generator
    from scm_runtime.samples import Samples, Span, Timings

__all__ = [
    "BundleError",
    "BundleIntegrityError",
    "BundleNotFoundError",
    "BundleSchemaError",
    "DeviceError",
    "DevicePool",
    "ForkedError",
    "GenerationCancelledError",
    "GenerationTimeoutError",
    "Generator",
    "GeneratorClosedError",
    "GeneratorInfo",
    "HubError",
    "HubNotFoundError",
    "InferenceError",
    "InvalidArgumentError",
    "Manifest",
    "MissingDependencyError",
    "NativeOpsError",
    "NonFiniteError",
    "OutOfMemoryError",
    "OutputError",
    "QueueFullError",
    "Samples",
    "ScmError",
    "Span",
    "Timings",
    "__version__",
]

# NumPy is imported when one of these is first used: an interrupt in the middle of its import crashes Python, so that the command line must come first.
_MODULES = {
    "DevicePool": "device_pool",
    "Generator": "generator",
    "GeneratorInfo": "engines.open_bundle",
    "Manifest": "bundle.manifest",
    "Samples": "samples",
    "Span": "samples",
    "Timings": "samples",
}


if not typing.TYPE_CHECKING:  # for type checkers, a wrong name is an error

    def __getattr__(name: str) -> object:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
