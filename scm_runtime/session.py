"""The only file that knows ONNX Runtime: it opens graphs and runs them."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from scm_runtime import hub
from scm_runtime.bundle import WEIGHTS
from scm_runtime.errors import InferenceError, InvalidArgumentError, MissingDependencyError, NativeOpsError

if TYPE_CHECKING:
    import onnxruntime


def _installed(distribution: str) -> bool:
    from importlib import metadata  # takes 20 ms, a third of importing scm_runtime

    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


@cache
def load_onnxruntime() -> Any:
    """Import ONNX Runtime.

    Raises:
        MissingDependencyError: it is not installed, or both of its wheels are: they overwrite each other's files.
    """
    if _installed("onnxruntime") and _installed("onnxruntime-gpu"):
        raise MissingDependencyError(
            "both onnxruntime and onnxruntime-gpu are installed; they overwrite each other. Keep one:\n"
            "  pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'scm-runtime[cpu]'   (or [gpu])"
        )
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingDependencyError(
            f"ONNX Runtime cannot be imported ({error}). Install it:\n  pip install 'scm-runtime[cpu]'   (or [gpu] for CUDA)"
        ) from error
    return onnxruntime


# Of ONNX Runtime, by name: what makes new weights out of those in the file.
COPYING_OPTIMIZERS = ("ConstantFolding", "ConvMulFusion", "NchwcTransformer")


class Session:
    """One ONNX graph, ready to run on the CPU provider. Safe to call from several threads."""

    def __init__(self, path: Path, *, threads: int | None = None, library: Path | None = None, frugal: bool = False) -> None:
        """Open a graph.

        Args:
            path: the ``.onnx`` file; its external data lie beside it.
            threads: threads inside an operator; None leaves the choice to ONNX Runtime (one a core).
            library: custom operators; their kernels take the place of the function bodies in the graph, all or none.
            frugal: slower, but with little more memory than the weights take. Otherwise they are reordered for convolutions, for a moment beside
                a first copy if they are in half precision; and in a graph that holds a step several times, scaled and packed once for each.

        Raises:
            InferenceError: ONNX Runtime refuses the graph.
            NativeOpsError: ONNX Runtime refuses the library, or the library this ONNX Runtime.
        """
        ort = load_onnxruntime()
        options = ort.SessionOptions()
        options.log_severity_level = 4  # what goes wrong is raised, not printed
        # Between runs the cores belong to the host: waiting threads sleep instead of spinning.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if threads is not None:
            options.intra_op_num_threads = threads
        if frugal:
            options.enable_cpu_mem_arena = False
            options.add_session_config_entry("session.disable_prepacking", "1")
        if library is not None:
            try:
                options.register_custom_ops_library(os.fspath(library))
            except Exception as error:
                raise NativeOpsError(
                    f"ONNX Runtime {ort.__version__} cannot use the library of native kernels '{library}': {error}. "
                    "Install an ONNX Runtime and an scm-runtime that fit, or run without the kernels: native_ops=False"
                ) from error
        self.path = path
        try:
            self._session: onnxruntime.InferenceSession = self._open(options, list(COPYING_OPTIMIZERS) if frugal else [])
        except Exception as error:
            remedy = "Upgrade it, or export the checkpoint again" + (", or run without the native kernels: native_ops=False" if library else ".")
            raise InferenceError(f"ONNX Runtime {ort.__version__} cannot open '{path}': {error}. {remedy}") from error
        self.provider: str = self._session.get_providers()[0]
        outputs = [output.name for output in self._session.get_outputs()]
        if len(outputs) != 1:
            raise InferenceError(f"'{path}' must have one output, got {', '.join(outputs)}. Export the checkpoint again.")
        self.output: str = outputs[0]
        self.shapes: dict[str, tuple[int | str | None, ...]] = {value.name: tuple(value.shape) for value in self._session.get_inputs()}
        """Of each input; a name or None for a free dimension."""

    def __call__(self, **inputs: NDArray[Any]) -> NDArray[Any]:
        """Run the graph on arrays named as its inputs and return its only output.

        Raises:
            InferenceError: ONNX Runtime failed in the graph.
        """
        try:
            result: NDArray[Any] = self._session.run([self.output], inputs)[0]
        except Exception as error:
            hint = " Out of memory: try a smaller batch." if "allocate memory" in str(error) else ""
            raise InferenceError(f"'{self.path.name}' failed: {error}.{hint}") from error
        return result

    def _open(self, options: Any, disabled_optimizers: list[str]) -> Any:
        """Open the graph, with its weights from memory where ONNX Runtime will not follow the link that the hub's cache has for them.

        ONNX Runtime reads external data in the folder of the graph alone, so that a hostile graph cannot read other files. It makes an exception for
        the cache of huggingface_hub: 1.24.1 does not, 1.24.2 to 1.31 do where the weights lie in the folder of the file that the graph is a
        link to, which huggingface_hub 2 has given up for large files, and 1.32 does always. Our own way costs the size of the weights in memory.
        """

        def attempt() -> Any:
            providers = ["CPUExecutionProvider"]
            return load_onnxruntime().InferenceSession(os.fspath(self.path), options, providers=providers, disabled_optimizers=disabled_optimizers)

        try:
            return attempt()
        except Exception:
            weights = hub.blob(self.path.with_name(WEIGHTS))
            if weights is None:
                raise
            self._weights = np.memmap(weights, np.uint8, "r")  # kept: ONNX Runtime reads it as it opens the graph, and holds on to the options
            options.add_external_initializers_from_files_in_memory([WEIGHTS], [self._weights], [len(self._weights)])
            return attempt()


def check_threads(threads: int | None) -> int | None:
    """A thread count as given, once it is known to be a positive integer or None."""
    if threads is None or (isinstance(threads, int | np.integer) and not isinstance(threads, bool) and threads >= 1):
        return None if threads is None else int(threads)
    raise InvalidArgumentError(f"threads must be an integer of at least 1 or None for one a core, got {threads!r}")
