"""Sample consistency models in one or two steps through ONNX Runtime, without torch.

    from scm_runtime import Generator

    with Generator("digits") as generate:
        generate(class_labels=[3, 1, 4], seed=7).save("digits.png")

``__all__`` lists everything public.
"""

from scm_runtime._version import __version__
from scm_runtime.bundle.manifest import Manifest
from scm_runtime.device_pool import DevicePool
from scm_runtime.engines.open_bundle import GeneratorInfo
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
