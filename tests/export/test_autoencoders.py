"""Autoencoders: small random ones of diffusers' classes, in PyTorch and in ONNX Runtime, compared with diffusers' decode and encode."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from onnxscript import ir
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from both_ways import check_both_ways
from scm_export import export
from scm_export.checkpoints import SamplerSpec, load_checkpoint, save_checkpoint
from scm_export.errors import CheckpointError
from scm_export.families import BuildOptions, build_model
from scm_export.families.autoencoders import SCM_STATISTICS, ImageNetworks, LatentStatistics, image_networks
from scm_export.graphs.trace import trace_map
from scm_export.model import ImageNetwork, Latents
from scm_runtime import Generator

pytest.importorskip("diffusers", reason="diffusers is in the test extra")
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny

from scm_runtime.common.load_onnxruntime import load_onnxruntime

onnxruntime = load_onnxruntime()

LATENTS = (6, 10)
SIGMA_DATA = 0.5
WEIGHTS = "diffusion_pytorch_model.safetensors"


def make_kl(**config: Any) -> Any:
    """Three levels with attention in the middle."""
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    return AutoencoderKL(**blocks, block_out_channels=(8, 12, 16), norm_num_groups=4, latent_channels=4, **config)


def make_dc() -> Any:
    """Three levels, the last with two heads of linear attention at two scales."""
    halves = {
        f"{half}_{name}": value
        for half in ("encoder", "decoder")
        for name, value in {
            "block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"),
            "block_out_channels": (8, 16, 32),
            "layers_per_block": (1, 1, 1),
            "qkv_multiscales": ((), (), (5,)),
        }.items()
    }
    return AutoencoderDC(latent_channels=8, attention_head_dim=16, scaling_factor=0.41407, **halves)


def make_tiny() -> Any:
    channels, blocks = (8, 8, 8), {"num_encoder_blocks": (1, 1, 1), "num_decoder_blocks": (1, 1, 1)}
    return AutoencoderTiny(encoder_block_out_channels=channels, decoder_block_out_channels=channels, **blocks)


MAKE = {
    "kl": make_kl,
    "kl-statistics": make_kl,
    "kl-convolutions": lambda: make_kl(mid_block_add_attention=False),  # without the attention, which takes time to trace
    "kl-shift": lambda: make_kl(shift_factor=0.3, use_quant_conv=False),
    "dc": make_dc,
    "tiny": make_tiny,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Save an autoencoder, by its name above, with diffusers; return its folder."""
    root = tmp_path_factory.mktemp("autoencoders")

    def folder(name: str) -> Path:
        if not (root / name).exists():
            with torch.random.fork_rng():
                torch.manual_seed(0)
                network: Any = MAKE[name]()
            network.save_pretrained(root / name)
        return root / name

    return folder


def original(folder: Path) -> Any:
    config = json.loads((folder / "config.json").read_text())
    classes: tuple[Any, ...] = (AutoencoderKL, AutoencoderDC, AutoencoderTiny)
    found = next(one for one in classes if one.__name__ == config["_class_name"])
    return found.from_pretrained(folder, low_cpu_mem_usage=False).eval()


def made(folder: Path, channels: int, statistics: LatentStatistics | None = None, **options: Any) -> ImageNetworks:
    return image_networks(BuildOptions(decoder=folder, **options), (channels, *LATENTS), SIGMA_DATA, statistics=statistics)


def states(n: int, channels: int) -> Tensor:
    return torch.randn(n, channels, *LATENTS, generator=torch.Generator().manual_seed(n)) * SIGMA_DATA


def column(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values).reshape(-1, 1, 1)


def scale(network: Any, x: Tensor, statistics: LatentStatistics | None) -> Any:
    """Convert a state to the autoencoder's latents, as in the paper or in diffusers' pipelines."""
    if statistics is not None:
        return x / SIGMA_DATA * column(statistics.std) + column(statistics.mean)
    return x / SIGMA_DATA / network.config.scaling_factor + (network.config.get("shift_factor") or 0.0)


@torch.no_grad()
def decoded(network: Any, x: Tensor, statistics: LatentStatistics | None) -> Tensor:
    """Decode with diffusers, to pixels of about [-1, 1]."""
    pixels: Tensor = network.decode(scale(network, x, statistics)).sample
    return pixels


def levels(pixels: Tensor) -> NDArray[np.float64]:
    """Convert pixels to levels as diffusers' pipelines do, without rounding."""
    return ((pixels / 2 + 0.5).clamp(0, 1) * 255).permute(0, 2, 3, 1).double().numpy()


def network_of(part: object) -> Any:
    assert isinstance(part, ImageNetwork)
    return part.network


CASES = [("kl", 4, None), ("kl-statistics", 4, SCM_STATISTICS), ("kl-shift", 4, None), ("dc", 8, None), ("tiny", 4, None)]


@pytest.mark.parametrize(("name", "channels", "statistics"), CASES, ids=[name for name, *_ in CASES])
@torch.no_grad()
def test_decoder_and_encoder_are_the_originals(folders: Callable[[str], Path], name: str, channels: int, statistics: LatentStatistics | None) -> None:
    network, found = original(folders(name)), made(folders(name), channels, statistics, with_encoder=True)
    x = states(3, channels)
    exact = decoded(network, x, statistics)
    decoder = network_of(found.decoder)
    assert isinstance(found.decoder, ImageNetwork)
    assert found.decoder.shape == (24, 40, 3)
    torch.testing.assert_close(decoder.network(x * decoder.scale + decoder.shift), exact, atol=1e-4, rtol=0)
    image = decoder(x)
    assert np.abs(image.numpy() - levels(exact)).max() <= 0.51
    assert image.float().std() > 5

    encoded = network.encode(image.permute(0, 3, 1, 2) / 127.5 - 1)
    latents = encoded.latent_dist.mean if hasattr(encoded, "latent_dist") else encoded[0]
    again = network_of(found.encoder)(image)
    torch.testing.assert_close(scale(network, again, statistics), latents, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("name", "channels", "dtype"), [("kl-statistics", 4, "fp32"), ("kl-statistics", 4, "fp16"), ("dc", 8, "fp32"), ("tiny", 4, "fp16")])
def test_the_graphs_are_the_originals_in_any_batch(folders: Callable[[str], Path], name: str, channels: int, dtype: str) -> None:
    statistics = SCM_STATISTICS if name == "kl-statistics" else None
    network, found = original(folders(name)), made(folders(name), channels, statistics, with_encoder=True)
    decode, encode = network_of(found.decoder), network_of(found.encoder)
    for part in (decode, encode):
        part.network.compute_dtype = {"fp32": torch.float32, "fp16": torch.float16}[dtype]
    image = torch.zeros(2, 24, 40, 3, dtype=torch.uint8)
    sessions = [
        onnxruntime.InferenceSession(ir.to_proto(graph).SerializeToString(), providers=["CPUExecutionProvider"])
        for graph in (trace_map("decode", decode, states(2, channels), "x", "image", 20), trace_map("encode", encode, image, "image", "x", 20))
    ]
    encode.network.compute_dtype = torch.float32
    for n in (1, 2, 3, 5):
        x = states(n, channels)
        pixels = sessions[0].run(None, {"x": x.numpy()})[0]
        exact = levels(decoded(network, x, statistics))
        again, exact_again = sessions[1].run(None, {"image": pixels})[0], encode(torch.from_numpy(pixels)).detach().numpy()
        if dtype == "fp32":
            assert np.abs(pixels - exact).max() <= 1
            np.testing.assert_allclose(again, exact_again, atol=1e-4)
        else:
            assert 10 * np.log10(255**2 / np.square(pixels - exact).mean()) >= 40
            np.testing.assert_allclose(again, exact_again, atol=0.01 * exact_again.std())


def test_a_preview_decoder_takes_the_latents_of_the_large_one(folders: Callable[[str], Path]) -> None:
    """TAESD expects Stable Diffusion's latents as scaled by diffusers, regardless of the scale that the model was trained with."""
    x, small, large = states(2, 4), original(folders("tiny")), original(folders("kl"))
    for statistics in (None, SCM_STATISTICS):
        found = made(folders("kl"), 4, statistics, preview_decoder=folders("tiny"))
        scaled = scale(large, x, statistics) * large.config.scaling_factor
        with torch.no_grad():
            exact = levels(small.decode(scaled).sample)
            assert np.abs(network_of(found.preview)(x).numpy() - exact).max() <= 0.51
    alone = image_networks(BuildOptions(latents=True, preview_decoder=folders("tiny")), (4, *LATENTS), SIGMA_DATA, statistics=SCM_STATISTICS)
    assert isinstance(alone.decoder, Latents)
    assert torch.equal(network_of(alone.preview)(x), network_of(found.preview)(x))


def test_old_names_of_attention_are_read(folders: Callable[[str], Path], tmp_path: Path) -> None:
    """Use the old names of attention layers, as in sd-vae-ft-mse."""
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = load_file(folders("kl") / WEIGHTS)
    for new, name in old.items():
        weights = {key.replace(f"attentions.0.{new}.", f"attentions.0.{name}."): tensor for key, tensor in weights.items()}
    assert sum(".query." in key for key in weights) == 4
    (tmp_path / "config.json").write_bytes((folders("kl") / "config.json").read_bytes())
    save_file(weights, tmp_path / WEIGHTS)
    x = states(1, 4)
    assert torch.equal(network_of(made(tmp_path, 4).decoder)(x), network_of(made(folders("kl"), 4).decoder)(x))


def test_an_epsilon_in_a_denominator_stays_in_the_graph() -> None:
    """onnxscript's optimizer replaces 1e-15 by 0, and linear attention would divide by it where no query is positive."""

    class Ratio(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x / (x + 1e-15)

    graph = trace_map("ratio", Ratio(), torch.ones(2, 3), "x", "y", 20)
    session = onnxruntime.InferenceSession(ir.to_proto(graph).SerializeToString(), providers=["CPUExecutionProvider"])
    np.testing.assert_array_equal(session.run(None, {"x": np.array([[0, 1, 2]], np.float32)})[0], [[0, 1, 1]])


def test_an_autoencoder_that_does_not_fit_is_refused(folders: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(CheckpointError, match=r"missing decoder.*\[4, 6, 10\].*--decoder FOLDER.*--latents"):
        image_networks(BuildOptions(), (4, *LATENTS), SIGMA_DATA)
    with pytest.raises(CheckpointError, match=r"missing encoder.*--decoder FOLDER\.$"):
        image_networks(BuildOptions(latents=True, with_encoder=True), (4, *LATENTS), SIGMA_DATA)
    refused: list[tuple[Path, int, LatentStatistics | None, str]] = [
        (tmp_path / "nowhere", 4, None, "which does not exist. A repository of the hub has the form org/name, such as stabilityai/sd-vae-ft-mse"),
        (tmp_path / "text", 4, None, "--decoder must hold one of AutoencoderKL, AutoencoderDC, AutoencoderTiny, got .*UNet2DModel"),
        (folders("dc"), 4, None, r"AutoencoderDC in .* does not fit the model's latents, \[4, 6, 10\]"),
        (folders("dc"), 8, SCM_STATISTICS, "one value per channel, 8"),
    ]
    for folder, channels, statistics, message in refused:
        with pytest.raises(CheckpointError, match=message):
            made(folder, channels, statistics)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda weights: {**weights, "decoder.conv_in.bias": weights["decoder.conv_in.bias"] * torch.nan}, "NaN or infinity in: decoder.conv_in.bias"),
        (lambda weights: {name: tensor for name, tensor in weights.items() if name != "decoder.conv_out.weight"}, "missing: decoder.conv_out.weight"),
        (lambda weights: {**weights, "decoder.conv_out.bias": torch.zeros(5)}, r"decoder.conv_out.bias must have \[3\], got \[5\]"),
    ],
    ids=["NaN", "missing", "shape"],
)
def test_weights_that_do_not_fit_are_named(
    folders: Callable[[str], Path], tmp_path: Path, spoil: Callable[[dict[str, Tensor]], dict[str, Tensor]], message: str
) -> None:
    (tmp_path / "config.json").write_bytes((folders("kl") / "config.json").read_bytes())
    save_file(spoil(load_file(folders("kl") / WEIGHTS)), tmp_path / WEIGHTS)
    with pytest.raises(CheckpointError, match=f"the AutoencoderKL in '.*': .*{message}"):
        made(tmp_path, 4)


def test_an_edm2_checkpoint_of_latents_needs_its_decoder_and_becomes_images(folders: Callable[[str], Path], tiny_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(tiny_checkpoint)
    checkpoint.config["img_channels"] = 4
    for name, axis in (("enc.8x8_conv.weight", 1), ("out_conv.weight", 0)):
        weight = checkpoint.weights[name]
        checkpoint.weights[name] = torch.cat([weight, weight.narrow(axis, 0, 1).flip(2)], dim=axis)
    save_checkpoint(checkpoint, tmp_path / "pixels.pt")
    assert build_model(load_checkpoint(tmp_path / "pixels.pt")).output.shape == (8, 8, 4)  # without statistics, four channels are RGBA pixels
    assert build_model(load_checkpoint(tmp_path / "pixels.pt"), BuildOptions(decoder=folders("kl-convolutions"))).output.shape == (32, 32, 3)

    # Like EDM2's latents: separate statistics, for an autoencoder that gets images in [0, 1].
    checkpoint.sampler = SamplerSpec(latent_mean=(5.81, 3.25, 0.12, -2.15), latent_std=(4.17, 4.62, 3.71, 3.28), pixel_scale=255.0, pixel_offset=0.0)
    save_checkpoint(checkpoint, tmp_path / "latents.pt")
    with pytest.raises(CheckpointError, match="missing decoder"):
        build_model(load_checkpoint(tmp_path / "latents.pt"))
    done = export(tmp_path / "latents.pt", decoder=folders("kl-convolutions"), with_encoder=True, preview_decoder=folders("tiny"), steps=(2,), verify=False)
    assert {"decode.fp32.onnx", "encode.fp32.onnx", "preview.fp32.onnx"} <= set(done.manifest.files)
    assert done.manifest.output.shape == (32, 32, 3)
    with Generator(done.path) as generate:
        x, image = (generate([1, 2], seed=[3, 4], output_type=kind).array for kind in ("latent", "np"))
    network = original(folders("kl-convolutions"))
    statistics = LatentStatistics(checkpoint.sampler.latent_mean or (), checkpoint.sampler.latent_std or ())
    pixels = decoded(network, torch.from_numpy(x), statistics)
    assert np.abs(image - (pixels.clamp(0, 1) * 255).permute(0, 2, 3, 1).numpy()).max() <= 1
    assert image.std() > 5
    check_both_ways(done.path)
