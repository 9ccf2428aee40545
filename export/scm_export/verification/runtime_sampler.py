"""``RuntimeSampler``: scm_runtime's own sampling loop over a bundle in one dtype, so that verification runs the code that hosts run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scm_export.verification.references import ReferenceSamples
from scm_runtime.bundle.manifest import Dtype, Manifest
from scm_runtime.bundle.solver_tables import SolverTables
from scm_runtime.common.runs import RunRegistry
from scm_runtime.engines.host import HostEngine
from scm_runtime.engines.sessions import BundleSessions
from scm_runtime.inputs.arguments import CallArguments
from scm_runtime.ort.session import Session
from scm_runtime.sampling.loop import SamplingLoop
from scm_runtime.sampling.nonfinite import NonFiniteHandler
from scm_runtime.sampling.request import read_request


class RuntimeSampler:
    """Samples a bundle as a Generator on the CPU does, from sessions opened by the caller."""

    def __init__(self, folder: Path, manifest: Manifest, dtype: Dtype, open_session: Callable[[Path], Session]) -> None:
        """Open the bundle's noise, step and decode graphs, and combine if it has samplers. Raises what ``open_session`` raises."""

        def open_engine(dtype: Dtype) -> HostEngine:
            return HostEngine(BundleSessions(folder, manifest, dtype, open_session), dtype, manifest.initial_scale)

        self._manifest, self._solver_tables = manifest, SolverTables(folder, manifest)
        engine = open_engine(dtype)
        self.step: Session = engine.graphs().step
        # NaN and infinity are logged, and fail the comparison that follows.
        nonfinite = NonFiniteHandler(engine, "warn", lambda: open_engine("fp32"))
        self._loop = SamplingLoop(engine, nonfinite, RunRegistry(), manifest, {}, None)

    def sample(self, reference: ReferenceSamples, n: int, *, decode: bool) -> tuple[NDArray[np.float32], NDArray[Any] | None]:
        """Compute the last n samples of a reference in one batch.

        Returns:
            The final state, float32 ``[n, *sample]``, and the output of the decode graph; None unless ``decode`` is True.
        """
        states: list[NDArray[np.float32]] = []

        def keep_state(_owner: object, _step: int, _t: float, values: dict[str, NDArray[np.float32]]) -> None:
            states[:] = [values["latents"]]

        arguments: CallArguments = {
            "conditioning": {name: values[-n:] for name, values in reference.conditioning.items()},
            "seed": reference.seeds[-n:],
            "sampler": reference.sampler,
            "num_inference_steps": reference.steps,
            "output_type": "np" if decode else "latent",
            "callback_on_step_end": keep_state,
        }
        samples = self._loop.sample(read_request(self._manifest, self._solver_tables, None, arguments))
        return states[0], samples.array if decode else None
