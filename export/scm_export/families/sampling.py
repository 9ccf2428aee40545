"""Converts the sampler section of a checkpoint's header to fields of a Model."""

from __future__ import annotations

from typing import Any

from scm_export.checkpoints import SamplerSpec
from scm_export.parametrisation import default_times
from scm_export.samplers import make_tables, teacher_times


def sampling_fields(sampler: SamplerSpec, *, segments: bool = False) -> dict[str, Any]:
    """Return the keyword arguments of :class:`~scm_export.model.Model` for sampling.

    Args:
        sampler: the sampler section of the header.
        segments: True if the network has the end time of a step as an input.
    """
    diffusion = sampler.diffusion if sampler.diffusion is not None else sampler.solver == "ddim" and not segments
    times = (teacher_times if diffusion else default_times)(sampler.sigma_data)
    if sampler.times is not None:
        times = {int(count): values for count, values in sampler.times.items()}
    return {
        "sigma_data": sampler.sigma_data,
        "initial_scale": sampler.sigma_data if sampler.initial_scale is None else sampler.initial_scale,
        "times": times,
        "solver": sampler.solver,
        "samplers": make_tables(sampler.sigma_data, max(map(max, times.values()))) if diffusion else {},
    }
