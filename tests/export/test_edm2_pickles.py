"""Pickles of EDM2 and edm2_sCM: what is read from them, and that the resulting network computes the same as the original."""

from __future__ import annotations

import copy
import json
import math
import tracemalloc
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from edm2_networks import MPConv, Precond, TrigFlowPrecond, filled
from edm2_pickles import EasyDict, Recorded, snapshot, write_pickle
from scm_export import Options, export, plan
from scm_export.checkpoints import Checkpoint, SamplerSpec
from scm_export.checkpoints.edm2_pickles import load_edm2_pickle
from scm_export.errors import CheckpointError
from scm_export.families import BuildOptions, build_model
from scm_export.model import Model
from scm_export.parametrisation import sample
from scm_export.samplers import karras_sigmas
from scm_runtime import Generator

T_MAX = math.atan(80 / 0.5)

# Three levels, widths that are not powers of two, several heads, and every number differs from its default at least once.
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "edm2": lambda: Precond(16, 3, 5, model_channels=12, channel_mult=[1, 3, 2], num_blocks=1, attn_resolutions=[8], channels_per_head=12),
    "scm": lambda: TrigFlowPrecond(16, 3, 5, model_channels=12, channel_mult=[3, 1, 2], num_blocks=1, attn_resolutions=[8, 16], channels_per_head=12),
    "unconditional": lambda: TrigFlowPrecond(
        img_resolution=16, img_channels=1, label_dim=0, model_channels=16, channel_mult=[1, 2, 3], num_blocks=1, attn_resolutions=[], channels_per_head=16
    ),
    "segments": lambda: TrigFlowPrecond(
        16, 3, 5, model_channels=12, channel_mult=[1, 2, 3], num_blocks=1, attn_resolutions=[8], channels_per_head=12, segment_conditioning=True
    ),
    "balances": lambda: Precond(
        16,
        3,
        5,
        sigma_data=0.7,
        model_channels=12,
        channel_mult=[1, 2],
        channel_mult_noise=3,
        channel_mult_emb=1,
        num_blocks=2,
        attn_resolutions=[8],
        channels_per_head=8,
        label_balance=0.4,
        concat_balance=0.6,
        res_balance=0.2,
        attn_balance=0.45,
        clip_act=1.0,
    ),
    "no clipping, heads of 18 channels and of none": lambda: TrigFlowPrecond(
        16, 3, 0, model_channels=12, channel_mult=[1, 3], num_blocks=1, attn_resolutions=[16], channels_per_head=17, clip_act=None
    ),
}


def original(name: str) -> Any:
    torch.manual_seed(0)
    return filled(NETWORKS[name]()).eval()


def through_a_pickle(network: nn.Module, folder: Path, protocol: int = 4, **others: Any) -> Checkpoint:
    """Save a network as a pickle and read it; the network gets the stored (rounded) weights, as float32."""
    path = write_pickle(snapshot(network, **others), folder / "network.pkl", protocol=protocol)
    network.float()
    return load_edm2_pickle(path)


def built(checkpoint: Checkpoint) -> Model:
    return build_model(checkpoint, BuildOptions(latents=checkpoint.sampler.latent_mean is not None))


def our_network(checkpoint: Checkpoint) -> Any:
    return built(checkpoint).step.network


def inputs(network: Any, n: int = 3) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return a non-square state, one time per sample, and labels."""
    generator = torch.Generator().manual_seed(1)
    x = 0.5 * torch.randn(n, network.img_channels, 16, 8, generator=generator)
    return x, torch.linspace(0.3, 1.5, n), torch.arange(n) % network.label_dim if network.label_dim else None


def one_hot(labels: Tensor | None, network: Any) -> Tensor | None:
    return None if labels is None else functional.one_hot(labels, network.label_dim).float()


def conditioning(labels: Tensor | None) -> dict[str, Tensor]:
    return {} if labels is None else {"class_labels": labels}


# ----------------------------------------------------------------------------
# The network computes the same function.


@pytest.mark.parametrize("name", NETWORKS)
def test_the_network_computes_what_the_original_computes(name: str, tmp_path: Path) -> None:
    network = original(name)
    ours = our_network(through_a_pickle(network, tmp_path))
    x, t, labels = inputs(network)
    end = {"t_end": t / 2} if name == "segments" else {}
    with torch.no_grad():
        expected = network.unet(x, t, one_hot(labels, network), *end.values())
        torch.testing.assert_close(ours(x, t, **conditioning(labels), **end), expected, rtol=0, atol=1e-4)
    assert expected.std() > 0.1


def test_attributes_count_as_they_are_and_not_as_the_constructor_had_them(tmp_path: Path) -> None:
    network = original("edm2")
    network.sigma_data, network.unet.label_balance, network.unet.concat_balance = 0.6, 0.3, 0.7
    for block in [*network.unet.enc.values(), *network.unet.dec.values()]:
        block.res_balance, block.clip_act = 0.5, 2.0
    checkpoint = through_a_pickle(network, tmp_path)
    x, t, labels = inputs(network)
    with torch.no_grad():
        expected = network.unet(x, t, one_hot(labels, network))
        torch.testing.assert_close(our_network(checkpoint)(x, t, class_labels=labels), expected, rtol=0, atol=1e-4)
    assert checkpoint.sampler.sigma_data == 0.6


@pytest.mark.parametrize(
    ("name", "ending"),
    [
        ("edm2", "emb_gain"),
        ("edm2", "out_gain"),
        ("edm2", "emb_label.weight"),
        ("edm2", "emb_fourier.phases"),
        ("edm2", "attn_qkv.weight"),
        ("scm", "emb_pos.freqs"),
        ("scm", "emb_linear.weight"),
        ("segments", "emb_t_k.weight"),
    ],
)
def test_every_kind_of_tensor_matters(name: str, ending: str, tmp_path: Path) -> None:
    network = original(name)
    changed = copy.deepcopy(network)
    with torch.no_grad():
        for key, tensor in changed.state_dict().items():
            if key.endswith(ending) and "logvar" not in key:
                tensor.copy_(tensor.flatten().roll(1).reshape(tensor.shape) * 0.7 if tensor.ndim else tensor * 0.7)
    x, t, labels = inputs(network)
    end = {"t_end": t / 2} if name == "segments" else {}
    outputs = [our_network(through_a_pickle(each, tmp_path))(x, t, **conditioning(labels), **end) for each in (network, changed)]
    assert (outputs[0] - outputs[1]).abs().max() > 1e-2


def noises(network: Any, count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(3, network.img_channels, 16, 16, generator=generator) for _ in range(count)]


def test_a_consistency_model_samples_as_edm2_scm_samples_it(tmp_path: Path) -> None:
    network = original("scm")
    model = built(through_a_pickle(network, tmp_path, loss_fn=Recorded("TrigFlowSCMLoss", mode="scd")))
    labels, drawn = torch.tensor([4, 0, 2]), noises(network, 3)
    with torch.no_grad():
        x = network(80 * math.cos(T_MAX) * drawn[0], torch.tensor(T_MAX), one_hot(labels, network))
        one_step = x
        x = network(math.cos(1.1) * x + math.sin(1.1) * 0.5 * drawn[1], torch.tensor(1.1), one_hot(labels, network))
    assert model.times.keys() == {1, 2}
    for count, expected in ((1, one_step), (2, x)):
        found = sample(model.step, drawn, model.times[count], model.initial_scale, {"class_labels": labels})
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_a_diffusion_teacher_samples_as_edm_samples_it_in_its_own_scale(tmp_path: Path) -> None:
    network = original("edm2")
    model = built(through_a_pickle(network, tmp_path))
    labels, drawn = torch.tensor([4, 0, 2]), noises(network, 9)
    sigmas = [*(torch.tensor(80 ** (1 / 7)).lerp(torch.tensor(0.002 ** (1 / 7)), i / 7).item() ** 7 for i in range(8)), 0.0]
    x = 80 * drawn[0]
    with torch.no_grad():
        for sigma, sigma_next in pairwise(sigmas):  # EDM's Euler steps
            denoised = network(x, torch.tensor(sigma), one_hot(labels, network))
            x = x + (sigma_next - sigma) * (x - denoised) / sigma
    assert model.times.keys() == {8, 16, 32}
    found = sample(model.step, drawn, model.times[8], model.initial_scale, {"class_labels": labels})
    torch.testing.assert_close(found, x, rtol=0, atol=2e-4)  # the initial state had sigma 80


def test_segments_are_sampled_as_they_were_trained(tmp_path: Path) -> None:
    network = original("segments")
    loss = Recorded("TrigFlowMSSCDLoss", num_segments=3, boundary_schedule="uniform_t", sigma_max=80.0)
    model = built(through_a_pickle(network, tmp_path, loss_fn=loss))
    labels, drawn = torch.tensor([4, 0, 2]), noises(network, 4)
    x = 80 * math.cos(T_MAX) * drawn[0]
    boundaries = torch.linspace(T_MAX, 0, 4)
    with torch.no_grad():
        for t, end in pairwise(boundaries):
            x = network(x, t, one_hot(labels, network), end)
    assert model.times.keys() == {3}
    torch.testing.assert_close(sample(model.step, drawn, model.times[3], model.initial_scale, {"class_labels": labels}), x, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "loss", "count"),
    [("scm", "TrigFlowSCMLoss", 1), ("edm2", "EDM2Loss", 8), ("segments", "TrigFlowMSSCDLoss", 4)],
)
def test_an_exported_pickle_samples_as_the_original_and_its_source_does_not_run(name: str, loss: str, count: int, tmp_path: Path) -> None:
    network, ran = original(name), tmp_path / "the-source-has-run"
    source = f"open({str(ran)!r}, 'w').close()\n"
    exec(source)  # as EDM2's loader does
    ran.unlink()
    path = write_pickle(snapshot(network, loss_fn=Recorded(loss, num_segments=4)), tmp_path / "network.pkl", source=source)
    bundle = export(path, steps=(), verify=name == "segments").path
    assert not ran.exists()
    network.float()
    with Generator(bundle) as generate:
        times = generate.manifest.times[str(count)]
        for n in (1, 2, 3, 5):
            drawn = torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(n))
            labels = torch.arange(n) % 5
            x = 0.5 * math.sin(T_MAX) * drawn
            with torch.no_grad():
                for t, end in pairwise(torch.tensor(times)):
                    x = TO_THE_END[name](network, x, t, end, one_hot(labels, network))
            found = generate(class_labels=labels.tolist(), latents=drawn.numpy(), num_inference_steps=count, output_type="latent")
            np.testing.assert_allclose(found.array, x.numpy(), rtol=0, atol=1e-4)


def edm_euler(network: Any, x: Tensor, t: Tensor, end: Tensor, labels: Tensor | None) -> Tensor:
    """EDM's step from sigma = sigma_d tan t; its state is x / cos t."""
    sigma, sigma_end, x = 0.5 * t.tan(), 0.5 * end.tan(), x / t.cos()
    x_end: Tensor = (x + (sigma_end - sigma) * (x - network(x, sigma, labels)) / sigma) * end.cos()
    return x_end


TO_THE_END: dict[str, Callable[[Any, Tensor, Tensor, Tensor, Tensor | None], Tensor]] = {
    "scm": lambda network, x, t, end, labels: network(x, t, labels),
    "edm2": edm_euler,
    "segments": lambda network, x, t, end, labels: network(x, t, labels, end),
}


# ----------------------------------------------------------------------------
# Contents of the file.


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_tensor_comes_back_in_every_protocol(protocol: int, tmp_path: Path) -> None:
    network = original("segments")
    checkpoint = through_a_pickle(network, tmp_path, protocol)
    expected = {name.removeprefix("unet."): tensor for name, tensor in network.half().state_dict().items() if "logvar" not in name}
    assert checkpoint.weights.keys() == expected.keys()
    for name, tensor in expected.items():
        assert checkpoint.weights[name].dtype == torch.float16
        assert torch.equal(checkpoint.weights[name], tensor)


def test_views_and_other_dtypes_are_read(tmp_path: Path) -> None:
    network = original("edm2").requires_grad_(False)
    content = snapshot(network)
    network.double()
    network.unet.out_conv.weight = nn.Parameter(torch.randn(12, 3, 3, 3, dtype=torch.bfloat16).transpose(0, 1), requires_grad=False)
    network.unet.emb_noise.weight = nn.Parameter(torch.randn(50, 12)[3:39], requires_grad=False)
    checkpoint = load_edm2_pickle(write_pickle(content, tmp_path / "views.pkl"))
    for name, tensor in checkpoint.weights.items():
        assert tensor.is_contiguous()
        assert torch.equal(tensor, network.state_dict()[f"unet.{name}"])


@pytest.mark.parametrize(
    "place",
    [
        lambda network: network,
        lambda network: {"ema": network},
        lambda network: EasyDict(ema=EasyDict(net=network, std=0.05)),
        lambda network: EasyDict(ema=[(network, "-0.050")]),
        lambda network: {"state": EasyDict(epoch=3, snapshot=snapshot(network))},
    ],
    ids=["alone", "post-hoc", "by name", "in a list", "deeper"],
)
def test_the_network_is_found_wherever_it_is_nested(place: Callable[[nn.Module], object], tmp_path: Path) -> None:
    network = original("unconditional").half()
    checkpoint = load_edm2_pickle(write_pickle(place(network), tmp_path / "nested.pkl"))
    assert torch.equal(checkpoint.weights["emb_noise.weight"], network.unet.emb_noise.weight)


def test_one_of_several_networks_is_chosen_by_name(tmp_path: Path) -> None:
    networks: list[Any] = [filled(NETWORKS["unconditional"](), seed).half() for seed in (1, 2)]
    path = write_pickle(EasyDict(ema=[(networks[0], "-0.050"), (networks[1], "-0.100")]), tmp_path / "two.pkl")
    with pytest.raises(CheckpointError, match=r"two.pkl' holds 2 networks: ema.0.0, ema.1.0; got None. Choose one with --weights NAME"):
        load_edm2_pickle(path)
    assert torch.equal(load_edm2_pickle(path, "ema.1.0").weights["out_gain"], networks[1].unet.out_gain)
    planned = plan(path, options=Options(weights="ema.1.0", verify=False))
    assert planned.source.weights == "ema.1.0"
    with pytest.raises(CheckpointError, match=r"got 'ema\.2'"):
        plan(path, options=Options(weights="ema.2", verify=False))


@pytest.mark.parametrize(
    ("place", "key"),
    [(lambda network: network, None), (lambda network: {"ema": network}, "ema"), (lambda network: {"ema": {"\x1b\ud800": network}}, r"ema.\x1b\ud800")],
)
def test_where_the_network_lay_is_recorded(place: Callable[[Any], Any], key: str | None, tmp_path: Path) -> None:
    path = write_pickle(place(filled(NETWORKS["unconditional"](), 1).half()), tmp_path / "one.pkl")
    planned = plan(path, options=Options(verify=False))
    assert planned.source.weights == key
    assert key is None or json.loads(planned.to_json())["source"]["weights"] == key


def test_reading_takes_the_memory_of_the_network_alone(tmp_path: Path) -> None:
    """No memory for other bytes in the file, nor for the teacher in a distillation loss."""
    network = original("edm2").half()
    network.unet.emb_noise = MPConv(12, 100_000, kernel=[])  # large compared with the memory that Python needs for names
    network.unet.emb_label = MPConv(5, 200_000, kernel=[])
    teacher = copy.deepcopy(network)
    loss = Recorded("EDMConsistencyDistillLoss", S=2)
    loss.__dict__["_init_kwargs"]["teacher_net"] = teacher
    path = write_pickle(snapshot(network, loss_fn=loss), tmp_path / "large.pkl")
    held = sum(tensor.nbytes for name, tensor in network.state_dict().items() if name.startswith("unet."))
    tracemalloc.start()
    checkpoint = load_edm2_pickle(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert path.stat().st_size > 2 * held
    assert sum(tensor.nbytes for tensor in checkpoint.weights.values()) == held
    assert peak < 1.25 * held


# ----------------------------------------------------------------------------
# Sampler and pixels.


def uniform(m: int) -> list[float]:
    return [T_MAX * (m - k) / m for k in range(m + 1)]


def karras(n: int) -> list[float]:
    return [math.atan(sigma / 0.5) for sigma in karras_sigmas(n)]


@pytest.mark.parametrize(
    ("name", "loss", "parametrisation", "solver", "times"),
    [
        ("scm", None, "trigflow", "consistency", {"1": [T_MAX, 0], "2": [T_MAX, 1.1, 0]}),
        ("scm", Recorded("TrigFlowSCMLoss", mode="sct"), "trigflow", "consistency", {"1": [T_MAX, 0], "2": [T_MAX, 1.1, 0]}),
        ("scm", Recorded("TrigFlowLoss", P_mean=-0.8), "trigflow", "ddim", {"8": karras(8), "16": karras(16), "32": karras(32)}),
        ("edm2", None, "edm", "ddim", {"8": karras(8), "16": karras(16), "32": karras(32)}),
        ("edm2", Recorded("EDMConsistencyDistillLoss", S=4, student_sigma_mids=None), "edm", "ddim", {"4": karras(4)}),
        (
            "edm2",
            Recorded("EDMConsistencyDistillLoss", S=2, student_sigma_mids=(1.1,)),
            "edm",
            "ddim",
            {"2": [T_MAX, math.atan(1.1 / 0.5), 0]},
        ),
        ("segments", None, "trigflow", "ddim", {"1": uniform(1), "2": uniform(2), "4": uniform(4)}),
        ("segments", Recorded("TrigFlowMSSCDLoss", num_segments=8, boundary_schedule="uniform_t"), "trigflow", "ddim", {"8": uniform(8)}),
        (
            "segments",
            Recorded("TrigFlowMSSCDLoss", num_segments=2, boundary_schedule="uniform_log_snr"),
            "trigflow",
            "ddim",
            {"2": [T_MAX, math.atan(math.sqrt(1e-6 * 160)), 0]},  # the middle in log tan t
        ),
    ],
)
def test_the_loss_says_how_a_network_is_sampled(
    name: str, loss: object, parametrisation: str, solver: str, times: dict[str, list[float]], tmp_path: Path
) -> None:
    sampler = through_a_pickle(original(name), tmp_path, loss_fn=loss).sampler
    assert (sampler.parametrisation, sampler.solver) == (parametrisation, solver)
    assert sampler.initial_scale == pytest.approx(0.5 * math.sin(T_MAX))
    assert sampler.times is not None
    assert sampler.times.keys() == times.keys()
    for count, values in times.items():
        np.testing.assert_allclose(sampler.times[count], values)


def test_the_noise_levels_are_edms() -> None:
    """Values of EDM's formula for 4 steps, computed independently with 30 digits."""
    assert karras_sigmas(4) == pytest.approx([80.0, 9.7232013552601, 0.4699790579977, 0.002, 0.0], rel=1e-10)


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_the_statistics_of_latents_come_from_the_encoder(protocol: int, tmp_path: Path) -> None:
    mean, std = np.array([[5.81, 3.25, 0.12, -2.15], [4.17, 4.62, 3.71, 3.28]], np.float32)
    scale = np.float32(0.5) / std
    encoder = Recorded("StabilityVAEEncoder", vae_name="stabilityai/sd-vae-ft-mse", scale=scale, bias=np.float32(0) - mean * scale, batch_size=8, _vae=None)
    network = Precond(16, 4, 0, model_channels=16, channel_mult=[1], num_blocks=1, attn_resolutions=[], channels_per_head=16)
    sampler = through_a_pickle(network, tmp_path, protocol, encoder=encoder).sampler
    assert sampler.latent_mean == pytest.approx(mean.tolist(), rel=1e-5)
    assert sampler.latent_std == pytest.approx(std.tolist(), rel=1e-5)
    assert sampler.pixel_scale == 255
    assert through_a_pickle(network, tmp_path, encoder=None).sampler.latent_std == pytest.approx(std.tolist())
    assert through_a_pickle(network, tmp_path).sampler.latent_std is None  # snapshot() has a pixel model


def test_decoded_pixels_are_cut_to_whole_levels_as_edm2_cuts_them(tmp_path: Path) -> None:
    network = Precond(16, 4, 0, model_channels=16, channel_mult=[1], num_blocks=1, attn_resolutions=[], channels_per_head=16)
    sampler = through_a_pickle(network, tmp_path, encoder=None).sampler
    decoded = torch.cat([torch.linspace(-0.1, 1.1, 997), torch.arange(256) / 255])
    theirs = (decoded.clamp(0, 1) * 255).to(torch.uint8)
    ours = (decoded * sampler.pixel_scale + sampler.pixel_offset).round().clamp(0, 255).to(torch.uint8)
    assert torch.equal(ours, theirs)


# ----------------------------------------------------------------------------
# Networks that cannot be exported.


def renamed(name: str, module: str = "") -> Callable[[Any], None]:
    return lambda network: network.get_submodule(module).__dict__.update(_class_name=name)


def argument(**changes: object) -> Callable[[Any], None]:
    return lambda network: network.unet._init_kwargs.update(changes)


def without_a_unet(network: Any) -> None:
    del network.unet


def spoiled(network: Any) -> None:
    network.unet.enc["8x8_down"].conv_res0.weight[2, 1] = math.nan


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (renamed("TrigflowPrecond"), "the network is of the unknown class 'TrigflowPrecond'. The closest known one is 'TrigFlowPrecond'"),
        (renamed("TrigFlowDDPMPPPrecond"), "The closest known one is 'TrigFlowPrecond'; known are Precond, TrigFlowPrecond"),
        (renamed("DhariwalUNet", "unet"), "unet is of the unknown class 'DhariwalUNet'. The closest known one is 'TrigFlowUNet'"),
        (renamed("MPConv3D", "unet.dec.4x4_in0.conv_res1"), "unet.dec.4x4_in0.conv_res1 is of the unknown class 'MPConv3D'. The closest known one is 'MPConv'"),
        (without_a_unet, "a Precond must have a submodule 'unet'"),
        (argument(window_size=8), "the Precond was built with window_size, which the known class Precond does not have"),
        (argument(num_blocks="two"), "num_blocks"),
        (argument(num_blocks=10**9), "num_blocks must be at least 1 and at most 100, got 1000000000"),
        (lambda network: network.__dict__.update(label_dim=2**62), f"label_dim must be 0 or from 2 to 1000000, got {2**62}"),
        (argument(num_blocks=10**5000), "an integer must have at most 128 bits, got 16610"),
        (argument(channel_mult=[{}]), "channel_mult must be a number, text or a short list of numbers, got list"),
        (argument(channels_per_head=18), "unet.enc.8x8_block0 has 3 heads for 36 channels, which does not match channels_per_head = 18"),
        (argument(channel_mult=[1, 1, 1]), "the weights do not match the config"),
        (lambda network: network.__dict__.update(sigma_data=0.0), "sigma_data must be above 0 and finite, got 0.0"),
        (lambda network: network.unet.enc["8x8_down"].__dict__.update(res_balance=0.5), "all blocks must have the same res_balance"),
        (
            lambda network: [block.__dict__.update(resample_filter=[1, 3, 3, 1]) for block in network.unet.enc.values()],
            "all blocks must have the same resample_filter",
        ),
        (spoiled, "weights must be finite, got NaN or infinity in: enc.8x8_down.conv_res0.weight"),
    ],
)
def test_what_is_not_edm2s_is_named(spoil: Callable[[Any], object], said: str, tmp_path: Path) -> None:
    network = original("edm2").requires_grad_(False)
    spoil(network)
    with pytest.raises(CheckpointError) as refused:
        built(through_a_pickle(network, tmp_path))
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"weights": [1, 2]}, "holds no network: a snapshot of EDM2 is a dict with one under 'ema'"),
        (EasyDict(ema=None), "holds no network"),
        ([1.5, "text"], "holds no network"),
    ],
)
def test_a_pickle_without_a_network_is_refused(content: object, said: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=said):
        load_edm2_pickle(write_pickle(content, tmp_path / "other.pkl"))


@pytest.mark.parametrize(
    ("others", "said"),
    [
        (
            {"encoder": Recorded("StabilityVAEncoder")},
            "the encoder is of the unknown class 'StabilityVAEncoder'. The closest known one is 'StabilityVAEEncoder'",
        ),
        ({"encoder": Recorded("StabilityVAEEncoder", scale=[1.0], bias=[0.0])}, "a scale other than 0 and a bias for each of the 3 channels"),
        ({"encoder": Recorded("StabilityVAEEncoder", scale=[10**400] * 3, bias=[0.0] * 3)}, "an integer must have at most 128 bits"),
        ({"encoder": Recorded("StabilityVAEEncoder", scale=[1e-300] * 3, bias=[1e300] * 3)}, "sampler.latent_mean must be finite"),
        ({"loss_fn": Recorded("EDMConsistencyDistillLoss", student_sigma_mids=(3.0, 5.0))}, "the loss does not describe how to sample"),
        ({"loss_fn": Recorded("EDMConsistencyDistillLoss", rho=1e-300)}, "the loss's rho must be a number from 0.1 to 100, got 1e-300"),
        ({"loss_fn": Recorded("EDMConsistencyDistillLoss", sigma_max=1e300)}, "the loss's sigma_max must be a number from 1e-06 to 1e+06"),
        ({"dataset_kwargs": {10**5000: 1}}, "an integer must have at most 128 bits"),
    ],
)
def test_what_goes_with_the_network_must_be_known_too(others: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as refused:
        through_a_pickle(original("edm2"), tmp_path, **others)
    assert said in str(refused.value)


def test_a_network_of_more_elements_than_torch_can_count_is_refused() -> None:
    config = {"img_resolution": 100_000, "patch_size": 100_000, "img_channels": 100_000, "model_channels": 100_000, "channel_mult": [1000], "label_dim": 0}
    with pytest.raises(CheckpointError, match="describes a network too large for torch"):
        build_model(Checkpoint(family="edm2", config=config | {"channels_per_head": 100_000}, sampler=SamplerSpec(), weights={}))
