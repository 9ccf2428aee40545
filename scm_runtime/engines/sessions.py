"""The open graphs of a bundle in one dtype. The optional graphs, encode, preview and text, are opened on first use."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from scm_runtime.bundle.manifest import COMBINE, Dtype, Manifest, OptionalGraph
from scm_runtime.errors import InferenceError, InvalidArgumentError, OutOfMemoryError
from scm_runtime.ort.session import ResultSpec, Session

# What an optional graph is, and how scm-export adds it to a bundle.
OPTIONAL_GRAPHS: dict[OptionalGraph, tuple[str, str]] = {
    "encode": ("encoder", "scm-export … --with-encoder"),
    "preview": ("preview decoder", "scm-export … --preview-decoder FOLDER"),
    "text": ("text encoder", "scm-export … without --no-text"),
}


class BundleSessions:
    """Sessions over the graphs of a bundle. Several threads may use them at once."""

    def __init__(self, folder: Path, manifest: Manifest, dtype: Dtype, open_session: Callable[[Path], Session]) -> None:
        """Open the graphs noise, step and decode, and combine if the bundle has samplers.

        Args:
            folder: the bundle's folder.
            manifest: the bundle's manifest.
            dtype: precision of the graphs to open.
            open_session: opens the graph at a path.

        Raises:
            InferenceError, DeviceError, NativeOpsError: raised by ``open_session``.
            BundleError: a graph returns another dtype than the manifest declares.
        """
        self._folder, self._manifest, self._dtype, self._open_session = folder, manifest, dtype, open_session
        self._lock = threading.Lock()
        self._optional: dict[str, Session] = {}
        self.noise = self._open("noise.onnx")
        self.step = self._open(f"step.{dtype}.onnx")
        self.decode = self._open(f"decode.{dtype}.onnx")
        self._combine = self._open(COMBINE) if manifest.samplers else None

    @property
    def combine(self) -> Session:
        """The combine graph, which only a bundle with samplers has."""
        assert self._combine is not None
        return self._combine

    def optional(self, kind: OptionalGraph) -> Session:
        """Return the encode, preview or text graph, opened on first use.

        Raises:
            InvalidArgumentError: the bundle does not have it.
            InferenceError: it cannot be opened.
            BundleError: it returns another dtype than the manifest declares.
        """
        with self._lock:
            if kind not in self._optional:
                name = self._manifest.optional_graph(kind, self._dtype)
                if name is None:
                    what, command = OPTIONAL_GRAPHS[kind]
                    raise InvalidArgumentError(f"the bundle {self._manifest.name!r} has no {what}. Export its checkpoint again with one: {command}")
                self._optional[kind] = self._open(name)
            return self._optional[kind]

    def encode_tokens(self, inputs: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """Run the text graph of a bundle that has one, on token ids and masks ``[N, max_length]`` by the names of its inputs.

        Returns:
            Its outputs ``[N, …]``, in the order of the manifest.

        Raises:
            What ``optional`` and a call of a Session raise.
        """
        return self.optional("text").run_all(inputs, text_results(self._manifest))

    def end_profiling(self) -> None:
        """Write the profile of each session, if profiling is on."""
        with self._lock:
            for session in (self.noise, self.step, self.decode, *([self._combine] if self._combine else []), *self._optional.values()):
                session.end_profiling()

    def _open(self, name: str) -> Session:
        try:
            session = self._open_session(self._folder / name)
        except OutOfMemoryError:
            raise
        except InferenceError as error:
            if self._dtype == "fp32":
                raise
            raise InferenceError(f"{error} Or compute in fp32, which every bundle can: dtype='fp32'.") from error
        if name.startswith("text."):
            assert self._manifest.text is not None
            session.expect_all([name for tokenizer in self._manifest.text.tokenizers for name in tokenizer.inputs], text_results(self._manifest))
        else:
            session.expect(_result_of(name.split(".")[0], self._manifest))
        return session


def _result_of(graph: str, manifest: Manifest) -> ResultSpec:
    """Return what a graph returns: docs/bundle-format.md."""
    output = manifest.output
    match graph:
        case "decode":
            return ResultSpec("uint8" if output.kind == "image" else "float32", output.shape, batch_input="x")
        case "preview":
            return ResultSpec("uint8", (None, None, output.shape[-1]), batch_input="x")
        case _:
            return ResultSpec("float32", manifest.sample.shape, batch_input={"noise": "seeds", "encode": "image"}.get(graph, "x"))


def text_results(manifest: Manifest) -> dict[str, ResultSpec]:
    """Return what the text graph returns, by output."""
    text, inputs = manifest.text, {item.name: item for item in manifest.conditioning}
    assert text is not None
    sizes = {name: tuple(size if isinstance(size, int) else None for size in inputs[name].shape) for name in text.outputs}
    return {name: ResultSpec(inputs[name].dtype, sizes[name], batch_input=text.tokenizers[0].input_ids) for name in text.outputs}
