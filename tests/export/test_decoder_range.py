"""Autoencoders whose activations overflow float16: their fp16 graphs compute in float32, and a note names the layer."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from scm_export.exporter import export_model
from scm_export.families import BuildOptions
from scm_export.families.autoencoders import image_networks
from scm_export.model import ImageNetwork, Model
from scm_export.options import Options
from scm_export.verification.half_range import fitting_float16
from scm_runtime import Generator
from scm_runtime.bundle.manifest import Source
from text_model import STATE, text_model

pytest.importorskip("diffusers", reason="diffusers is in the test extra")
from diffusers import AutoencoderKL

SOURCE = Source(file="none", sha256="0" * 64)


def autoencoder(folder: Path, factor: float) -> Path:
    """Write an autoencoder whose decoder has a residual stream ``factor`` times as large as usual. The norms divide by it, so that images are alike."""
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",), "block_out_channels": (8,)}
    network = AutoencoderKL(**blocks, norm_num_groups=4, mid_block_add_attention=False, layers_per_block=1, scaling_factor=0.5)
    with torch.no_grad():
        for parameter in network.decoder.conv_in.parameters():
            parameter *= factor
    network.half().float().save_pretrained(folder)
    return folder


def model_with(decoder: Path, **options: Any) -> Model:
    """The small text model with this autoencoder."""
    model = text_model(extras=False)
    images = image_networks(BuildOptions(decoder=decoder, **options), STATE, model.sigma_data)
    return replace(model, decoder=images.decoder, encoder=images.encoder)


def measured(decoder: Path) -> Model:
    model = model_with(decoder, with_encoder=True)
    with fitting_float16(model):
        pass
    return model


def dtypes_of_convolutions(path: Path) -> set[int]:
    """ONNX element types of what the convolutions of a graph read."""
    graph = onnx.shape_inference.infer_shapes(onnx.load(path, load_external_data=False)).graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.input)}
    return {types[node.input[0]] for node in graph.node if node.op_type in ("Conv", "Conv3x3")}


def reached(note: str) -> tuple[str, float]:
    """Name of the layer and the value in a note."""
    found = re.fullmatch(r"the decoder computes in float32 .* layer '(\S+)' reaches (\S+), and .* 65504, .*sdxl-vae-fp16-fix.* with --decoder", note)
    assert found is not None, note
    return found[1], float(found[2])


def test_a_decoder_that_overflows_float16_stays_in_float32(tmp_path: Path) -> None:
    decoder, out = autoencoder(tmp_path / "vae", 3e4), tmp_path / "out.scm"
    done = export_model(model_with(decoder), out, SOURCE, Options(dtype="fp16", steps=()))
    (note,) = done.notes
    layer, value = reached(note)
    vae = AutoencoderKL.from_pretrained(decoder, low_cpu_mem_usage=False).eval()
    assert vae.get_submodule(layer) is not None
    assert value > 65504
    latents = np.random.default_rng(0).normal(0, 0.5, (2, *STATE)).astype(np.float32)
    with Generator(out, dtype="fp16") as generate:
        images = generate.decode(latents)
    with torch.no_grad():
        expected = (vae.decode(torch.from_numpy(latents) / 0.5 / vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1) * 255
    assert np.abs(images - expected.permute(0, 2, 3, 1).numpy()).max() <= 1
    assert dtypes_of_convolutions(out / "decode.fp16.onnx") == {onnx.TensorProto.FLOAT}
    assert dtypes_of_convolutions(out / "step.fp16.onnx") == {onnx.TensorProto.FLOAT16}


def test_only_the_network_that_overflows_leaves_float16_and_half_of_the_range_is_a_margin(tmp_path: Path) -> None:
    """Without verification, the networks are measured on noise."""
    _, value = reached(measured(autoencoder(tmp_path / "vae", 3e4)).notes[0])
    for i, (peak, kept) in enumerate([(40_000, True), (30_000, False)]):
        model = measured(autoencoder(tmp_path / str(i), 3e4 * peak / value))
        assert isinstance(model.decoder, ImageNetwork)
        assert isinstance(model.encoder, ImageNetwork)
        assert len(model.notes) == kept
        model.compute_in("fp16")
        for network, dtype in ((model.decoder.network, torch.float32 if kept else torch.float16), (model.encoder.network, torch.float16)):
            assert {module.compute_dtype for module in network.modules() if hasattr(module, "compute_dtype")} == {dtype}
