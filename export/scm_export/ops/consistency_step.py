"""``ConsistencyStep``: one step of a TrigFlow consistency sampler (sCM, arXiv 2410.11081, section 3)."""

from __future__ import annotations

from torch import Tensor

from scm_export.ops.operator import Operator, emits_nodes


def consistency_step(x: Tensor, F: Tensor, noise: Tensor, t: Tensor, t_next: Tensor, sigma_data: float) -> Tensor:
    """Denoise and add noise again: ``cos t' (cos t x - sin t sigma_d F) + sin t' sigma_d noise``.

    Args:
        x: ``[N, ...]``, float32: the state at time ``t``.
        F: output of the network, with the shape of ``x`` and any floating dtype.
        noise: standard normal noise, float32, with the shape of ``x``; has no effect where ``t_next`` is 0.
        t: ``[N]``, float32, radians in [0, pi/2].
        t_next: ``[N]``, float32, radians; 0 gives the denoised sample.
        sigma_data: standard deviation of the data.

    Returns:
        The state at time ``t_next``, float32, with the shape of ``x``.
    """
    if emits_nodes():
        return CONSISTENCY_STEP.node(x, F, noise, t, t_next, sigma_data=sigma_data)[0]
    per_sample = (-1,) + (1,) * (x.ndim - 1)
    # In float64: the last bit of vectorized float32 sines depends on a sample's position in the batch.
    t, t_next = t.double().reshape(per_sample), t_next.double().reshape(per_sample)
    cos, sin, cos_next, sin_next = (value.to(x.dtype) for value in (t.cos(), t.sin(), t_next.cos(), t_next.sin()))
    denoised = cos * x - sin * sigma_data * F.to(x.dtype)
    return cos_next * denoised + sin_next * sigma_data * noise


def _sinusoid_statements(t: str) -> str:
    return f"""
        {t}_double = Cast <to = 11> ({t})
        {t}_per_sample = Unsqueeze ({t}_double, axes)
        {t}_cos_double = Cos ({t}_per_sample)
        {t}_sin_double = Sin ({t}_per_sample)
        {t}_cos = Cast <to = 1> ({t}_cos_double)
        {t}_sin = Cast <to = 1> ({t}_sin_double)
        {t}_sin_sigma = Mul ({t}_sin, sigma)
    """


CONSISTENCY_STEP = Operator(
    name="ConsistencyStep",
    inputs={"x": "float", "F": "T", "noise": "float", "t": "float", "t_next": "float"},
    attributes=("sigma_data",),
    output="x_next",
    output_type="float",
    body=f"""
        axes = Constant <value_ints = {{sample_axes}}> ()
        sigma = Constant <value_float: float = @sigma_data> ()
        {_sinusoid_statements("t")}
        {_sinusoid_statements("t_next")}
        F_wide = Cast <to = 1> (F)
        kept = Mul (t_cos, x)
        predicted = Mul (t_sin_sigma, F_wide)
        denoised = Sub (kept, predicted)
        signal = Mul (t_next_cos, denoised)
        renoised = Mul (t_next_sin_sigma, noise)
        x_next = Add (signal, renoised)
    """,
)
