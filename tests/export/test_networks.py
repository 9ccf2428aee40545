"""The EDM2 U-Net: published sizes, exact folding, and the effect of every option."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from scm_export.networks.edm2 import PRESETS, UNet, UNetConfig

# Millions of parameters of the EDM2 family, arXiv 2312.02696, table 6 (to one decimal, as counted from the released code).
PUBLISHED = {"XXS": 31.3, "XS": 124.7, "S": 280.2, "M": 497.8, "L": 777.5, "XL": 1119.3, "XXL": 1523.2}

TINY = UNetConfig(
    img_resolution=8, img_channels=3, label_dim=4, model_channels=16, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(8,), channels_per_head=16
)


def network(config: UNetConfig) -> UNet:
    torch.manual_seed(0)
    net = UNet(config)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.endswith("gain"):
                parameter.fill_(0.7)
    return net.eval()


def inputs(n: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 3, 8, 8, generator=generator), torch.linspace(0.3, 1.5, n), torch.arange(n) % 4


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_published_sizes(name: str) -> None:
    with torch.device("meta"):
        net = UNet(PRESETS[name])
    assert round(sum(p.numel() for p in net.parameters()) / 1e6, 1) == PUBLISHED[name]


@pytest.mark.parametrize(
    "config",
    [
        TINY,
        replace(TINY, modulation="scale", time_embedding="fourier"),
        replace(TINY, patch_size=2, attn_resolutions=()),
        replace(TINY, label_dim=0),
    ],
    ids=["scm", "edm2", "patches", "unconditional"],
)
def test_folding_changes_nothing_but_the_weights(config: UNetConfig) -> None:
    net = network(config)
    x, t, labels = inputs()
    given = labels if config.label_dim else None
    with torch.no_grad():
        expected = net(x, t, given)
        folded = copy.deepcopy(net).fold()
        torch.testing.assert_close(folded(x, t, given), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(copy.deepcopy(folded).fold()(x, t, given), folded(x, t, given), rtol=0, atol=0)
    assert expected.std() > 0.01
    assert sum(p.numel() for p in folded.parameters()) == sum(p.numel() for p in net.parameters())
    assert not torch.equal(folded.state_dict()["out_conv.weight"], net.state_dict()["out_conv.weight"])


def test_samples_of_a_batch_do_not_see_each_other() -> None:
    net = network(TINY)
    x, t, labels = inputs(3)
    with torch.no_grad():
        torch.testing.assert_close(net(x, t, labels)[1:2], net(x[1:2], t[1:2], labels[1:2]), rtol=1e-5, atol=1e-5)


def test_class_time_guidance_and_segment_all_count() -> None:
    net = network(replace(TINY, guidance_embedding=True, segment_embedding=True))
    x, t, labels = inputs()
    scale, end = torch.full((2,), 1.3), torch.full((2,), 0.2)
    with torch.no_grad():
        base = net(x, t, labels, scale, end)
        for changed in (
            net(x, t * 0.5, labels, scale, end),
            net(x, t, (labels + 1) % 4, scale, end),
            net(x, t, labels, scale + 0.5, end),
            net(x, t, labels, scale, end * 0.5),
        ):
            assert (changed - base).abs().max() > 1e-4


@pytest.mark.parametrize("missing", ["class_labels", "guidance_scale", "t_end"])
def test_a_missing_condition_is_named(missing: str) -> None:
    net = network(replace(TINY, guidance_embedding=True, segment_embedding=True))
    x, t, labels = inputs()
    conditions = {"class_labels": labels, "guidance_scale": t, "t_end": t}
    del conditions[missing]
    with pytest.raises(ValueError, match=missing):
        net(x, t, **conditions)


def test_forced_normalization_keeps_the_function_and_its_derivative_is_finite() -> None:
    net = network(TINY)
    x, t, labels = inputs()
    with torch.no_grad():
        before = net(x, t, labels)
        net.normalize_weights_()
        torch.testing.assert_close(net(x, t, labels), before, rtol=1e-3, atol=1e-3)
        tangent = torch.func.jvp(lambda x, t: net(x, t, labels), (x, t), (x, torch.ones_like(t)))[1]
        step = 1e-2
        difference = (net(x * (1 + step), t + step, labels) - net(x * (1 - step), t - step, labels)) / (2 * step)
    torch.testing.assert_close(tangent, difference, rtol=0.05, atol=0.02)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"img_resolution": 9}, "img_resolution"),
        ({"channels_per_head": 5}, "channels_per_head"),
        ({"label_dim": 1}, "label_dim"),
        ({"channel_mult": ()}, "channel_mult"),
        ({"num_blocks": 0}, "num_blocks"),
    ],
)
def test_impossible_configurations_are_refused(change: dict[str, int], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        replace(TINY, **change).validate()  # type: ignore[arg-type]  # the fields under test


def test_torch_compile_sees_one_graph() -> None:
    """Training compiles the network. Each operator checks whether it is being exported; this must not break the compiled graph."""
    net, given = network(TINY), inputs()
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(*given), net(*given))
