"""Open ONNX graphs, ready to run. ``open_session`` makes them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from scm_runtime.common.load_onnxruntime import load_onnxruntime
from scm_runtime.common.memory import SMALLER_BATCH, is_out_of_memory, out_of_memory_error
from scm_runtime.common.message_text import escape_controls
from scm_runtime.common.process import leave_to_parent
from scm_runtime.common.runs import Run, RunRegistry
from scm_runtime.errors import BundleError, DeviceError, InferenceError, InvalidArgumentError, ScmError
from scm_runtime.ort.options import RECORD_PLACEMENT, SessionSettings

Result = TypeVar("Result")

NO_CODE = "no kernel image is available"  # CUDA's words when a library has no code for the GPU
UNCAPTURED = {"gpu_graph_id": "-1"}  # run option: host arrays have no fixed addresses that a CUDA graph could replay


# ONNX Runtime's names of types.
ELEMENT_TYPES = {"float32": "tensor(float)", "uint8": "tensor(uint8)", "int64": "tensor(int64)"}


class ResultSpec(NamedTuple):
    """The result that a graph must return, ``[N, *shape]``."""

    dtype: Literal["float32", "uint8", "int64"]
    shape: tuple[int | None, ...]
    """Shape of a sample. A size that is None may be any number."""
    batch_input: str
    """An input of shape ``[N, …]``."""


class DeviceTensor(NamedTuple):
    """A tensor in device memory."""

    address: int
    dtype: type[np.generic]
    shape: tuple[int, ...]


class Session:
    """An ONNX graph with one output, or the text graph with several. Several threads may run it at once."""

    def __init__(self, path: Path, session: Any, settings: SessionSettings) -> None:
        """Wrap an open graph.

        Args:
            path: the ``.onnx`` file, named in errors.
            session: the ``onnxruntime.InferenceSession``.
            settings: those that it was opened with.

        Raises:
            DeviceError: ONNX Runtime fell back to another execution provider.
            InferenceError: a graph other than the text graph does not have exactly one output.
        """
        leave_to_parent(session)
        self.path, self.settings = path, settings
        self._session: Any = session
        self.provider: str = session.get_providers()[0]
        if self.provider != (wanted := settings.placement.providers[0][0]):
            raise DeviceError(f"ONNX Runtime was to open '{path}' on {wanted} and opened it on {self.provider}. scm-runtime doctor shows what is missing.")
        self._outputs: list[str] = [output.name for output in session.get_outputs()]
        if len(self._outputs) != 1 and not path.name.lstrip(".").startswith("text."):
            raise InferenceError(f"'{path}' must have one output, got {', '.join(self._outputs)}. Export the checkpoint again.")
        self.output: str = self._outputs[0]
        """Name of the first output."""
        self._output_types: dict[str, str] = {output.name: output.type for output in session.get_outputs()}
        self._expected: ResultSpec | None = None
        self.shapes: dict[str, tuple[int | str | None, ...]] = {value.name: tuple(value.shape) for value in session.get_inputs()}
        """Shape of each input by name. A dynamic dimension is a name or None."""

    def expect(self, expected: ResultSpec) -> None:
        """Check the dtype of the output now, and its shape after every run. Raises BundleError.

        After a run on bound tensors, ONNX Runtime itself checks that the output has the shape of its tensor.
        """
        self._check_type(self.output, expected)
        self._expected = expected

    def expect_all(self, inputs: Collection[str], expected: Mapping[str, ResultSpec]) -> None:
        """Check the names of the inputs, and the names, order and dtypes of the outputs, of the text graph. Raises BundleError."""
        for what, wanted, found in (("inputs", sorted(inputs), sorted(self.shapes)), ("outputs", list(expected), self._outputs)):
            if wanted != found:
                raise BundleError(f"'{self.path}' must have the {what} {', '.join(wanted)}, got {', '.join(found)}. Export the checkpoint again.")
        for name, result in expected.items():
            self._check_type(name, result)

    def _check_type(self, output: str, expected: ResultSpec) -> None:
        if (found := self._output_types[output]) != (wanted := ELEMENT_TYPES[expected.dtype]):
            raise BundleError(f"'{self.path}' must return {wanted}, got {found}. Export the checkpoint again.")

    def __call__(self, **inputs: NDArray[Any]) -> NDArray[Any]:
        """Run the graph on host arrays, named as its inputs, and return its output.

        Raises:
            OutOfMemoryError: memory ran out.
            InferenceError: ONNX Runtime failed in the graph.
            BundleError: the output has another shape than ``expect`` says.
            GeneratorClosedError, or the error of a cancelled CancelScope: the run was terminated.
        """
        shared = self.settings.runs.current_run()
        if shared is not None:
            return self._run(inputs, shared)
        return self.settings.runs.call_in_run(_run_options(UNCAPTURED), partial(self._run, inputs))

    def run_all(self, inputs: Mapping[str, NDArray[Any]], expected: Mapping[str, ResultSpec]) -> list[NDArray[Any]]:
        """Run a graph with several outputs, and return them in order. ``expected`` are those of ``expect_all``; the errors are those of a call."""
        results = self.settings.runs.call_in_run(_run_options(UNCAPTURED), partial(self._outputs_of, inputs))
        for result, wanted in zip(results, expected.values(), strict=True):
            _check_shape(self.path, result, wanted, inputs)
        return results

    def _run(self, inputs: Mapping[str, NDArray[Any]], run: Run) -> NDArray[Any]:
        result = self._outputs_of(inputs, run)[0]
        expected = self._expected
        if expected is not None and result.shape != (len(inputs[expected.batch_input]), *expected.shape):
            _check_shape(self.path, result, expected, inputs)
        return result

    def _outputs_of(self, inputs: Mapping[str, NDArray[Any]], run: Run) -> list[NDArray[Any]]:
        try:
            results: list[NDArray[Any]] = self._session.run(self._outputs, inputs, run.options)
        except Exception as error:
            if not _raised_by_onnxruntime(error.__traceback__):  # by a signal handler, which Python calls on the main thread
                raise
            batch = max((len(array) for array in inputs.values() if array.ndim), default=1)
            raise run_error(self.path, error, run, f"a batch of {batch} on {self.settings.placement.device}") from error
        return results

    def bind(self, inputs: Mapping[str, DeviceTensor], output: DeviceTensor, *, run_options: Mapping[str, str] | None = None) -> BoundSession:
        """Bind the inputs and the output to tensors in the memory of the session's CUDA device."""
        return BoundSession(self, inputs, output, run_options or {})

    def node_placement(self) -> dict[str, Counter[str]]:
        """Return how many nodes of each operator run on each execution provider. Empty if ``session_options`` turned the record off."""
        if self._session.get_session_options().get_session_config_entry(RECORD_PLACEMENT) != "1":
            return {}
        placed: dict[str, Counter[str]] = {}
        for part in self._session.get_provider_graph_assignment_info():
            placed.setdefault(part.ep_name, Counter()).update(node.op_type for node in part.get_nodes())
        return placed

    def end_profiling(self) -> None:
        """Write the profile, if the settings have a ``profile_dir``."""
        if self.settings.profile_dir is not None:
            self._session.end_profiling()


class BoundSession:
    """A session with its inputs and output at fixed device addresses; each call reads and writes there."""

    def __init__(self, session: Session, inputs: Mapping[str, DeviceTensor], output: DeviceTensor, run_options: Mapping[str, str]) -> None:
        index = session.settings.placement.index
        if index is None:
            raise InvalidArgumentError(f"tensors are bound to the memory of a CUDA device, and the session is on {session.settings.placement.device}")
        self._path, self._session, self._runs = session.path, session._session, session.settings.runs
        self._what = f"a batch of {output.shape[0] if output.shape else 1} on {session.settings.placement.device}"
        self._binding = self._session.io_binding()
        for name, tensor in inputs.items():
            self._binding.bind_input(name, "cuda", index, tensor.dtype, tensor.shape, tensor.address)
        self._binding.bind_output(session.output, "cuda", index, output.dtype, output.shape, output.address)
        self._run_options = dict(run_options)

    def __call__(self) -> None:
        """Run the graph. Raises what a call of a Session raises."""
        options = _run_options(self._run_options)
        with self._runs.run(options) as run:
            try:
                self._session.run_with_iobinding(self._binding, options)
            except Exception as error:
                raise run_error(self._path, error, run, self._what) from error


def in_one_run(runs: RunRegistry, work: Callable[[], Result]) -> Result:
    """Call a function and return its result. Its calls of sessions with this registry, on this thread, are one run in flight."""
    return runs.call_in_run(_run_options(UNCAPTURED), lambda _: work(), shared=True)


def _raised_by_onnxruntime(traceback: TracebackType | None) -> bool:
    """Return True for the traceback of an error that arose in ONNX Runtime's Python code, or in the library that it calls."""
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    return traceback is not None and str(traceback.tb_frame.f_globals.get("__name__")).partition(".")[0] == "onnxruntime"


def _check_shape(path: Path, result: NDArray[Any], expected: ResultSpec, inputs: Mapping[str, NDArray[Any]]) -> None:
    sizes = (len(inputs[expected.batch_input]), *expected.shape)
    if len(result.shape) != len(sizes) or any(size not in (None, found) for size, found in zip(sizes, result.shape, strict=True)):
        wanted = ", ".join("*" if size is None else str(size) for size in sizes)
        raise BundleError(f"'{path.name}' must return {expected.dtype} [{wanted}], got {result.dtype} {list(result.shape)}. Export the checkpoint again.")


def _run_options(entries: Mapping[str, str]) -> Any:
    """New ``onnxruntime.RunOptions`` for one run, or for several that are terminated together, by a flag in them."""
    options = load_onnxruntime().RunOptions()
    for name, value in entries.items():
        options.add_run_config_entry(name, value)
    return options


def run_error(path: Path, error: Exception, run: Run, what: str) -> ScmError:
    """The error of this package for an exception that ONNX Runtime raised in a run of ``what``: "a batch of 8 on cpu"."""
    if run.terminated:
        return run.error()
    if is_out_of_memory(error):
        return out_of_memory_error(f"{what} in '{path.name}'", error, SMALLER_BATCH)
    if NO_CODE in str(error):
        return DeviceError(
            f"this build of ONNX Runtime, or of the native kernels, has no code for the GPU: {what} in '{path.name}' failed: {escape_controls(str(error))}. "
            "Use device='cpu', or install an onnxruntime-gpu that supports the GPU; native_ops=False does without the native kernels."
        )
    return InferenceError(f"'{path.name}' failed: {escape_controls(str(error))}.")
