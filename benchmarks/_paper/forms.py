"""The forms in which the CUDA provider can run a step, as lists of launches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from _paper import kernels
from _paper.gpus import FILL_S, LAUNCH_S, Gpu
from _paper.layers import Operation
from _paper.own import own


@dataclass(frozen=True)
class Launch:
    """A kernel of a step."""

    what: str
    """Kind of the operation, or of the work that only this form needs: "transposes", "conversions"."""
    resolution: int
    seconds: float
    flop: float = 0.0
    nbytes: float = 0.0
    count: int = 1
    """Launches. 0 for kernels that a library launches itself, which the list of launches does not show."""


Form = Callable[[Gpu, Sequence[Operation]], list[Launch]]


def channels_first(gpu: Gpu, step: Sequence[Operation]) -> list[Launch]:
    """Return the launches with transposes around every convolution and pooling, as ONNX Runtime makes them without prefer_nhwc.

    cuDNN's tensor-core kernels are channels last. For channels-first maps it converts the input, the output and the weights in every run.
    """
    launches = []
    convolutions = [one for one in step if one.kind == "convolution"]
    for one in step:
        launches += _unfused(gpu, one)
        if one.kind == "convolution":
            converted = 2.0 * (one.map_bytes + one.weight_bytes)
            launches.append(Launch("conversions by cuDNN", one.resolution, kernels.memory_seconds(gpu, converted) + 3 * LAUNCH_S, nbytes=converted, count=0))
        if one.kind == "convolution" or one.name == "downsample":
            # The state is channels first: there is no transpose before the first convolution and after the last one.
            sides = [
                side for side, at_border in ((one.inputs, one is convolutions[0]), (one.outputs or one.inputs / 5, one is convolutions[-1])) if not at_border
            ]
            for channels in sides if one.kind == "convolution" else [4 * one.inputs / 5, one.inputs / 5]:
                moved = 2.0 * 2 * one.pixels * channels
                launches.append(Launch("transposes", one.resolution, kernels.memory_seconds(gpu, moved) + LAUNCH_S, nbytes=moved))
    return launches


def channels_last(gpu: Gpu, step: Sequence[Operation]) -> list[Launch]:
    """Return the launches with cuDNN's channels-last kernels, and every other operation in a kernel of its own."""
    return [*_state_transposes(gpu, step), *(launch for one in step for launch in _unfused(gpu, one))]


def fused(gpu: Gpu, step: Sequence[Operation]) -> list[Launch]:
    """Return the launches with our kernel for convolutions and for products before a sum, cuBLAS for other products, and one product for all modulations."""
    return _with_own(gpu, step, lambda one, ours, library: ours if one.kind == "convolution" or one.follower else library)


def best_of_both(gpu: Gpu, step: Sequence[Operation]) -> list[Launch]:
    """Return the same with our kernel only where it is faster than cuDNN or cuBLAS and a kernel for the operation that follows."""
    return _with_own(gpu, step, lambda _, *forms: min(forms, key=lambda launches: sum(launch.seconds for launch in launches)))


def _with_own(gpu: Gpu, step: Sequence[Operation], choose: Callable[[Operation, list[Launch], list[Launch]], list[Launch]]) -> list[Launch]:
    launches = _state_transposes(gpu, step)
    modulations = [one for one in step if one.kind == "modulation"]
    nbytes, flop = sum(one.weight_bytes for one in modulations), sum(one.flop for one in modulations)
    launches += [Launch("modulation", 0, kernels.memory_seconds(gpu, nbytes) + FILL_S + LAUNCH_S, flop, nbytes), *_additions(modulations[0])]
    for one in step:
        if one.kind in ("convolution", "product"):
            product = Launch(f"{one.kind}, ours", one.resolution, own(gpu, one).seconds, one.flop, one.weight_bytes + one.map_bytes)
            ours = [product, *(_follower(gpu, one) if one.follower == "norm_modulate" else [])]
            launches += choose(one, ours, _unfused(gpu, one))
        elif one.kind != "modulation":
            launches += _unfused(gpu, one)
    return launches


def _state_transposes(gpu: Gpu, step: Sequence[Operation]) -> list[Launch]:
    """Return the launches that turn the state, which is channels first, to channels last, and the result back."""
    first, *_, last = (one for one in step if one.kind == "convolution")
    sizes = (4 * first.pixels * first.inputs, 4 * last.pixels * last.outputs)
    return [Launch("transposes", first.resolution, kernels.memory_seconds(gpu, nbytes) + LAUNCH_S, nbytes=nbytes) for nbytes in sizes]


FORMS: dict[str, Form] = {"channels first": channels_first, "channels last": channels_last, "fused": fused, "best of both": best_of_both}


def ideal_seconds(gpu: Gpu, step: Sequence[Operation]) -> float:
    """Return the roofline of a step: each convolution and product at the data sheet's rates, everything else free."""
    products = [one for one in step if one.kind in ("convolution", "product", "modulation")]
    return sum(max(one.flop / gpu.tensor_flop, (one.weight_bytes + one.map_bytes) / gpu.memory_bytes) for one in products)


def _unfused(gpu: Gpu, one: Operation) -> list[Launch]:
    """Return the launches of one operation, with the operation that follows in a kernel of its own."""
    if one.kind in ("convolution", "product"):
        launches = [Launch(one.kind, one.resolution, kernels.library(gpu, one).seconds, one.flop, one.weight_bytes + one.map_bytes)]
        return [*launches, *_follower(gpu, one)]
    if one.kind == "modulation":
        seconds = kernels.memory_seconds(gpu, one.weight_bytes) + FILL_S + LAUNCH_S
        return [Launch("modulation", 0, seconds, one.flop, one.weight_bytes), *_additions(one)]
    return [Launch(one.kind, one.resolution, kernels.elementwise(gpu, one), nbytes=one.map_bytes)]


def _additions(modulation: Operation) -> list[Launch]:
    """Return the launch that adds 1 to the result of a modulation's product, if it does."""
    return [Launch("modulation", 0, LAUNCH_S)] if modulation.name.endswith("+ 1") else []


def _follower(gpu: Gpu, one: Operation) -> list[Launch]:
    """Return the launch of the operation that follows a convolution or product, if there is one."""
    return [Launch("elementwise", one.resolution, kernels.follower(gpu, one), nbytes=kernels.follower_bytes(one))] if one.follower else []
