"""diffusers' schedulers for few-step models as steps of one form: LCM, Euler, Euler ancestral, DDIM and TCD.

The state is variance preserving for all of them, ``x = sqrt(alpha_t) data + sqrt(1 - alpha_t) noise``, where alpha is the schedulers' ``alphas_cumprod``.
diffusers' Euler schedulers keep ``x / sqrt(alpha_t)`` instead, and ``scale_model_input`` converts it to this state. Times are training timesteps, which are
integers; 0 is the end.

A network's output gives a prediction of the data and of the noise in the state. A scheduler combines both with fresh noise into the next state, by
coefficients that depend on the two timesteps only.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from scm_export.choices import SchedulerName
from scm_export.errors import CheckpointError
from scm_runtime.bundle.manifest import Conditioning
from scm_runtime.common.message_text import printable

CLASSES: dict[SchedulerName, str] = {
    "lcm": "LCMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-ancestral": "EulerAncestralDiscreteScheduler",
    "ddim": "DDIMScheduler",
    "tcd": "TCDScheduler",
}
STEPS = range(1, 9)
ETA = 0.3  # TCDScheduler's default

# Settings that the steps below implement.
_TRAILING: dict[str, tuple[Any, ...]] = {"timestep_spacing": ("trailing",)}
_SUPPORTED: dict[SchedulerName, dict[str, tuple[Any, ...]]] = {
    "lcm": {"thresholding": (False,)},
    "euler": {
        **_TRAILING,
        "use_karras_sigmas": (False, None),
        "use_exponential_sigmas": (False, None),
        "use_beta_sigmas": (False, None),
        "interpolation_type": ("linear",),
        "timestep_type": ("discrete",),
        "final_sigmas_type": ("zero",),
    },
    "euler-ancestral": _TRAILING,
    "ddim": {**_TRAILING, "clip_sample": (False,), "thresholding": (False,)},
    "tcd": {},
}
_PREDICTIONS: dict[SchedulerName, tuple[str, ...]] = {
    "lcm": ("epsilon", "sample", "v_prediction"),
    "euler": ("epsilon", "sample", "v_prediction"),
    "euler-ancestral": ("epsilon", "v_prediction"),
    "ddim": ("epsilon", "sample", "v_prediction"),
    "tcd": ("epsilon", "sample", "v_prediction"),
}


class FewStepSampler(nn.Module):
    """One step with a network from timestep t to t_next, integers in float32."""

    def __init__(self, network: nn.Module, scheduler: Transition) -> None:
        """Create a step from a network, ``(x, t, **conditioning)`` to its prediction, and a scheduler."""
        super().__init__()
        self.network, self.scheduler = network, scheduler

    def forward(self, x: Tensor, t: Tensor, t_next: Tensor, noise: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        own = {item.name: conditioning[item.name] for item in self.scheduler.conditioning}
        y = self.network(x, t.round(), **{name: value for name, value in conditioning.items() if name not in own})
        x_next: Tensor = self.scheduler(x, y, t.round(), t_next.round(), noise, **own)
        return x_next


class Transition(nn.Module):
    """Base class: a scheduler's part of a step, ``(x, y, t, t_next, noise)`` to the next state, where y is what the network predicts."""

    departure: Tensor
    arrival: Tensor
    conditioning: tuple[Conditioning, ...] = ()
    """Inputs of the step that are for the scheduler and not for the network."""

    def __init__(self, scheduler: Any, last_alpha: float) -> None:
        """Take the tables of an instance of diffusers' class.

        Args:
            scheduler: the instance.
            last_alpha: alpha at the end, after the last step.

        Raises:
            CheckpointError: the table of alphas cannot be used.
        """
        super().__init__()
        self.prediction: str = scheduler.config.prediction_type
        alphas = scheduler.alphas_cumprod.float()
        lowest = 0.0 if self.prediction == "epsilon" else -1.0  # a prediction of the noise is divided by alpha
        if not all(lowest < alpha < 1 for alpha in alphas.tolist()):
            raise CheckpointError(
                f"the {type(scheduler).__name__} must have finite betas, with alphas_cumprod between 0 and 1. Check its scheduler_config.json."
            )
        self.register_buffer("departure", _signal_and_spread(alphas))  # [T, 3], indexed by t
        self.register_buffer("arrival", _signal_and_spread(torch.cat([torch.tensor([last_alpha]), alphas[1:]])))  # [T, 3], indexed by t_next

    def forward(self, x: Tensor, y: Tensor, t: Tensor, t_next: Tensor, noise: Tensor, **own: Tensor) -> Tensor:
        raise NotImplementedError

    def predict(self, x: Tensor, y: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return the data and the noise in the state x at timesteps t according to the network's output y."""
        signal, spread, _ = rows(self.departure, t)
        match self.prediction:
            case "epsilon":
                return (x - spread * y) / signal, y
            case "v_prediction":
                return signal * x - spread * y, signal * y + spread * x
            case _:
                return y, (x - signal * y) / spread


class LCM(Transition):
    """LCMScheduler: Algorithm 3 of arXiv 2310.04378. The data is predicted, and noise of the next level added."""

    boundary: Tensor

    def __init__(self, scheduler: Any) -> None:
        super().__init__(scheduler, last_alpha=1.0)
        config = scheduler.config
        self.clip = float(config.clip_sample_range) if config.clip_sample else None
        boundary = torch.stack(scheduler.get_scalings_for_boundary_condition_discrete(torch.arange(len(scheduler.alphas_cumprod))), dim=1)
        if not torch.isfinite(boundary).all() or (self.clip is not None and not 0 < self.clip < math.inf):
            raise CheckpointError("the LCMScheduler must have finite timestep_scaling, and a positive clip_sample_range. Check its configuration.")
        self.register_buffer("boundary", boundary)  # [T, 2]: c_skip and c_out, indexed by t

    def forward(self, x: Tensor, y: Tensor, t: Tensor, t_next: Tensor, noise: Tensor, **own: Tensor) -> Tensor:
        data, _ = self.predict(x, y, t)
        if self.clip is not None:
            data = data.clamp(-self.clip, self.clip)
        c_skip, c_out = rows(self.boundary, t)
        signal, spread, _ = rows(self.arrival, t_next)
        return signal * (c_out * data + c_skip * x) + spread * noise


class Euler(Transition):
    """EulerDiscreteScheduler: the first-order step of the ODE (arXiv 2206.00364, algorithm 1), which is DDIM's with eta = 0 (arXiv 2010.02502)."""

    def __init__(self, scheduler: Any) -> None:
        super().__init__(scheduler, last_alpha=1.0)

    def forward(self, x: Tensor, y: Tensor, t: Tensor, t_next: Tensor, noise: Tensor, **own: Tensor) -> Tensor:
        data, predicted = self.predict(x, y, t)
        signal, spread, _ = rows(self.arrival, t_next)
        return signal * data + spread * predicted


class DDIM(Euler):
    """DDIMScheduler with eta = 0. It is Euler's step, from a first state of standard deviation 1, and to the end that the scheduler sets."""

    def __init__(self, scheduler: Any) -> None:
        Transition.__init__(self, scheduler, last_alpha=float(scheduler.final_alpha_cumprod))


class EulerAncestral(Transition):
    """EulerAncestralDiscreteScheduler: a step of the ODE to a lower level, and as much noise as leads back to the next level.

    With sigma = spread / signal and r = sigma_next / sigma, diffusers' sigma_down is ``sigma_next r``, and its sigma_up ``sigma_next sqrt(1 - r^2)``.
    """

    def __init__(self, scheduler: Any) -> None:
        super().__init__(scheduler, last_alpha=1.0)

    def forward(self, x: Tensor, y: Tensor, t: Tensor, t_next: Tensor, noise: Tensor, **own: Tensor) -> Tensor:
        data, predicted = self.predict(x, y, t)
        signal_from, spread_from, _ = rows(self.departure, t)
        signal, spread, _ = rows(self.arrival, t_next)
        ratio = spread * signal_from / (signal * spread_from)
        return signal * data + spread * (ratio * predicted + (1 - ratio**2).clamp(min=0).sqrt() * noise)


class TCD(Transition):
    """TCDScheduler (arXiv 2402.19159): a step of the ODE to timestep ``(1 - eta) t_next``, and noise from there to t_next. eta is an input, from 0 to 1."""

    conditioning = (Conditioning(name="eta", kind="scalar", dtype="float32", default=ETA),)

    def __init__(self, scheduler: Any) -> None:
        super().__init__(scheduler, last_alpha=float(scheduler.alphas_cumprod[0]))

    def forward(self, x: Tensor, y: Tensor, t: Tensor, t_next: Tensor, noise: Tensor, **own: Tensor) -> Tensor:
        data, predicted = self.predict(x, y, t)
        signal, spread, alpha = rows(self.departure, ((1 - own["eta"].clamp(0, 1)) * t_next).floor())
        _, _, alpha_next = rows(self.arrival, t_next)
        return (alpha_next / alpha).sqrt() * (signal * data + spread * predicted) + (1 - alpha_next / alpha).clamp(min=0).sqrt() * noise


TRANSITIONS: dict[SchedulerName, type[LCM | Euler | EulerAncestral | TCD]] = {
    "lcm": LCM,
    "euler": Euler,
    "euler-ancestral": EulerAncestral,
    "ddim": DDIM,
    "tcd": TCD,
}


def check_scheduler(name: SchedulerName, config: Mapping[str, Any], where: str) -> None:
    """Raise CheckpointError for a scheduler's settings that its step does not implement. ``where`` is the checkpoint, for the message."""
    kind = CLASSES[name]
    for setting, values in {**_SUPPORTED[name], "prediction_type": _PREDICTIONS[name]}.items():
        if config[setting] not in values:
            allowed = repr(values[0]) if setting != "prediction_type" else f"one of {', '.join(values)}"
            remedy = f". --scheduler {name} sets it" if setting == "timestep_spacing" else ""
            raise CheckpointError(f"{setting} of the {kind} of {where} must be {allowed}, got {config[setting]!r:.100}{remedy}")
    counts = ["num_train_timesteps", *(["original_inference_steps"] if name in ("lcm", "tcd") else [])]
    for setting in counts:
        if not (isinstance(config[setting], int) and config[setting] >= 1):
            raise CheckpointError(f"{setting} of the {kind} of {where} must be an integer of at least 1, got {printable(config[setting])}")
    total, betas = config["num_train_timesteps"], config.get("trained_betas")
    if betas is not None and len(betas) != total:
        raise CheckpointError(f"trained_betas of the {kind} of {where} must have num_train_timesteps = {total} values, got {len(betas)}")
    if "original_inference_steps" in counts and config["original_inference_steps"] > total:
        found = config["original_inference_steps"]
        raise CheckpointError(f"original_inference_steps of the {kind} of {where} must be at most num_train_timesteps = {total}, got {found}")


def scheduler_times(name: SchedulerName, scheduler: Any, steps: Collection[int] = STEPS) -> dict[int, tuple[float, ...]]:
    """Return the times of a diffusers scheduler by number of steps, each with the end time 0, for the numbers that it has distinct timesteps above 0 for.

    DDIMScheduler steps by a whole number of timesteps wherever the next one is. Numbers of steps for which it is elsewhere are left out, such as 3.
    """
    config = scheduler.config
    most = min(config.num_train_timesteps, config.get("original_inference_steps") or config.num_train_timesteps)
    times = {}
    for count in (count for count in steps if count <= most):
        scheduler.set_timesteps(count)
        found = (*map(float, scheduler.timesteps.tolist()), 0.0)
        uneven = name == "ddim" and config.num_train_timesteps % count
        if not uneven and all(a > b for a, b in pairwise(found)):
            times[count] = found
    return times


def initial_scale(name: SchedulerName, scheduler: Any) -> float:
    """Standard deviation of the first state: ``init_noise_sigma``, which Euler's schedulers divide by ``sqrt(sigma^2 + 1)`` before the network reads it."""
    sigma = float(scheduler.init_noise_sigma)
    return sigma if name not in ("euler", "euler-ancestral") else sigma / math.sqrt(sigma**2 + 1)


def rows(table: Tensor, t: Tensor) -> list[Tensor]:
    """Look up the rows of a table ``[T, K]`` for timesteps ``[N]``: K tensors ``[N, 1, 1, 1]``, which broadcast to the state."""
    found = table[t.long().clamp(0, len(table) - 1)]
    return [column.reshape(-1, 1, 1, 1) for column in found.unbind(1)]


def _signal_and_spread(alphas: Tensor) -> Tensor:
    """``[T, 3]``: factors of data and noise, and alpha."""
    return torch.stack([alphas.sqrt(), (1 - alphas).sqrt(), alphas], dim=1)
