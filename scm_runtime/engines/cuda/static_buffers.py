"""Static device buffers for single evaluations of one batch shape, with the sessions bound to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

import numpy as np

from scm_runtime.bundle.manifest import Manifest
from scm_runtime.engines.cuda.blocks import TensorBlock, TensorSpec
from scm_runtime.engines.cuda.capture import EngineSessions, RepeatedWork
from scm_runtime.engines.cuda.thread import CudaContext
from scm_runtime.ort.session import DeviceTensor

BatchShape = tuple[int, tuple[tuple[str, tuple[int, ...]], ...]]
"""Batch size N, and the name of each conditioning input with its shape without N."""


class StaticBuffers:
    """The buffers of batches of one shape, and the runs bound to them.

    Attributes:
        size: number of rows.
        may_capture: whether the runs are to be captured.
        block: all tensors but the decoder's output.
        loaded: serial numbers of the states whose seeds and conditioning are in the buffers. Rows beyond theirs hold zeros or those of earlier batches.
        noise, step, check: runs of the noise graph, the step graph and the graph that flags samples with NaN or infinity.
    """

    def __init__(
        self,
        context: CudaContext,
        sessions: EngineSessions,
        manifest: Manifest,
        shape: BatchShape,
        dtypes: Mapping[str, type[np.generic]],
        *,
        capture: bool,
    ) -> None:
        """Allocate all buffers but the decoder's output, which the first ``decode`` allocates. Raises OutOfMemoryError."""
        n, sizes = shape
        self.size, self.may_capture = n, capture
        self._context, self._sessions = context, sessions
        state: TensorSpec = (np.float32, (n, *manifest.sample.shape))
        conditioning: dict[str, TensorSpec] = {name: (dtypes[name], (n, *shape)) for name, shape in sizes}
        self.block = block = TensorBlock(
            context,
            {
                "t": (np.float32, (n,)),
                "t_next": (np.float32, (n,)),
                "draw": (np.int64, ()),
                "scale": (np.float32, ()),
                "seeds": (np.int64, (n,)),
                **{f"conditioning {name}": spec for name, spec in conditioning.items()},
                "finite": (np.float32, (n,)),
                "noise": state,
                "x": state,
                "x_next": state,
                **({} if sessions.combine is None else {"base": state, "weights": (np.float32, (n, 3))}),
            },
            cleared=True,
        )
        self.loaded: tuple[int, ...] = ()
        tensor = block.tensor
        inputs = {name: tensor(f"conditioning {name}") for name in conditioning}
        self.noise = sessions.noise.repeated({name: tensor(name) for name in ("seeds", "draw", "scale")}, tensor("noise"), capture=capture)
        self.step = sessions.step.repeated({name: tensor(name) for name in ("x", "t", "t_next", "noise")} | inputs, tensor("x_next"), capture=capture)
        flat = tensor("x_next")._replace(shape=(n, prod(manifest.sample.shape)))
        self.check = sessions.finite.repeated({"x": flat}, tensor("finite"), capture=capture)
        self._combine: RepeatedWork | None = None
        if sessions.combine is not None:
            summands = {"x": tensor("x"), "base": tensor("base"), "result": tensor("noise"), "weights": tensor("weights")}
            self._combine = sessions.combine.repeated(summands, tensor("x_next"), capture=capture)
        decoded = np.uint8 if manifest.output.kind == "image" else np.float32
        self._decoded: TensorSpec = (decoded, (n, *manifest.output.shape))
        self._decoder: tuple[TensorBlock, RepeatedWork] | None = None

    def combine(self) -> None:
        """Compute ``x_next`` from ``x``, ``base`` and the result of an evaluation, which was copied to ``noise``."""
        assert self._combine is not None
        self._combine()

    def decode(self) -> DeviceTensor:
        """Decode ``x`` and return the tensor with the result, which the next call overwrites. Raises OutOfMemoryError."""
        if self._decoder is None:
            block = TensorBlock(self._context, {"decoded": self._decoded})
            self._decoder = block, self._sessions.decode.repeated({"x": self.block.tensor("x")}, block.tensor("decoded"), capture=self.may_capture)
        block, run = self._decoder
        run()
        return block.tensor("decoded")

    @property
    def waits(self) -> bool:
        """Whether any of the runs is still to be captured."""
        return any(run.waits for run in self._runs())

    @property
    def captured(self) -> bool:
        """Whether any of the runs was captured as a CUDA graph."""
        return any(run.captured for run in self._runs())

    def release(self) -> None:
        """Free the captured graphs."""
        if self.captured:
            self._context.stream.synchronize()  # no graph is destroyed while it runs
        for run in self._runs():
            run.release()

    def _runs(self) -> Sequence[RepeatedWork]:
        optional = (self._combine, self._decoder and self._decoder[1])
        return (self.noise, self.step, self.check, *(run for run in optional if run))
