"""One step of a TrigFlow consistency sampler."""

from __future__ import annotations

from torch import Tensor


def consistency_step(x: Tensor, F: Tensor, noise: Tensor, t: Tensor, t_next: Tensor, sigma_data: float) -> Tensor:
    """Jump to the data and noise again: ``cos t' (cos t x - sin t sigma_d F) + sin t' sigma_d noise`` (sCM, arXiv 2410.11081, section 3).

    Args:
        x: ``[N, ...]``, float32: the state at time ``t``.
        F: the network's output, shaped as ``x``.
        noise: standard normal numbers, shaped as ``x``; they do not count where ``t_next`` is 0.
        t: ``[N]``, float32, radians in [0, pi/2].
        t_next: ``[N]``, float32, radians; 0 gives the denoised sample.
        sigma_data: standard deviation of the data.
    """
    per_sample = (-1,) + (1,) * (x.ndim - 1)
    # In float64: vectorised float32 sines differ in the last bit with a sample's place in the batch.
    t, t_next = t.double().reshape(per_sample), t_next.double().reshape(per_sample)
    cos, sin, cos_next, sin_next = (wave.to(x.dtype) for wave in (t.cos(), t.sin(), t_next.cos(), t_next.sin()))
    denoised = cos * x - sin * sigma_data * F
    return cos_next * denoised + sin_next * sigma_data * noise
