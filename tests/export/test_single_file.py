"""Single files of Stable Diffusion in the original layout: the same model as from a diffusers folder with the same weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers", reason="diffusers is in the test extra")
from diffusers import EulerDiscreteScheduler
from safetensors.torch import load_file, save_file

from scm_export import export
from scm_export.checkpoints import load
from scm_export.errors import CheckpointError
from scm_export.families import BuildOptions, build_model, find_family
from scm_export.model import ImageNetwork
from scm_runtime.errors import InvalidArgumentError
from tiny_stable_diffusion import SD_NOISE, TRAILING, embeddings, make_networks, noises, save_folder, save_single_file

SIZE = (16, 24)  # pixels


@pytest.fixture(scope="module", params=[False, True], ids=["sd", "sdxl"])
def xl(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture(scope="module")
def file(xl: bool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    text = {"conditioner.embedders.0.transformer.weight": torch.zeros(3), "alphas_cumprod": torch.ones(3)}
    return save_single_file(tmp_path_factory.mktemp("file") / "model.safetensors", *make_networks(xl=xl), text)


@torch.no_grad()
def test_a_file_is_the_model_of_the_folder(xl: bool, file: Path, tmp_path: Path) -> None:
    folder = save_folder(tmp_path / "folder", EulerDiscreteScheduler(**SD_NOISE, **TRAILING), xl=xl)
    assert find_family(load(file)) == "sd-distilled"
    found, expected = (
        build_model(load(file), BuildOptions(scheduler="euler", size=SIZE, with_encoder=True)),
        build_model(load(folder), BuildOptions(with_encoder=True)),
    )
    assert (found.sample_shape, found.output, found.conditioning, found.times) == (
        expected.sample_shape,
        expected.output,
        expected.conditioning,
        expected.times,
    )
    text = embeddings(2, xl=xl, guidance=False)
    x, noise = noises([1, 2], 1)
    t = torch.full((2,), 499.0)
    torch.testing.assert_close(found.step(x, t, t - 100, noise, text), expected.step(x, t, t - 100, noise, text), atol=0, rtol=0)
    assert torch.equal(found.decode(x), expected.decode(x))
    assert isinstance(found.encoder, ImageNetwork)
    assert isinstance(expected.encoder, ImageNetwork)
    image = torch.randint(256, (1, *SIZE, 3), dtype=torch.uint8)
    assert torch.equal(found.encoder.network(image), expected.encoder.network(image))


def test_missing_parts_are_named(xl: bool, file: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no scheduler. Give the one that the model card names with --scheduler"):
        build_model(load(file))
    tensors = load_file(file)

    def without(*prefixes: str) -> Path:
        path = tmp_path / "partial.safetensors"
        save_file({name: tensor for name, tensor in tensors.items() if not name.startswith(prefixes)}, path)
        return path

    options = BuildOptions(scheduler="euler", size=SIZE)
    with pytest.raises(CheckpointError, match=r"has no U-Net .model.diffusion_model.*only the autoencoder, a text encoder. Export the file of the whole model"):
        load(without("model.diffusion_model."))
    with pytest.raises(CheckpointError, match=r"missing decoder.*--decoder FOLDER"):
        build_model(load(without("first_stage_model.")), options)
    with pytest.raises(CheckpointError, match=r"must have the tensor model.diffusion_model.out.2.weight"):
        build_model(load(without("model.diffusion_model.out.2.weight")), options)
    with pytest.raises(CheckpointError, match=r"do not match the config: missing: mid_block.resnets.0.conv1.weight"):
        build_model(load(without("model.diffusion_model.middle_block.0.in_layers.2.weight")), options)
    with pytest.raises(CheckpointError, match=r"decoder.conv_norm_out"):
        build_model(load(without("first_stage_model.decoder.norm_out")), options)
    with pytest.raises(CheckpointError, match=r"same number of layers on each level of its U-Net.*got 1, 0"):
        build_model(load(without("model.diffusion_model.input_blocks.3.")), options)


def test_tensors_that_diffusers_ignores_are_refused(xl: bool, file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    save_file({**load_file(file), "model.diffusion_model.time_embed.cond_proj.weight": torch.ones(32, 4)}, other)
    with pytest.raises(CheckpointError, match=r"has tensors that a U-Net of Stable Diffusion has not, such as '.*cond_proj.weight'"):
        build_model(load(other), BuildOptions(scheduler="euler", size=SIZE))


def test_options_for_other_files_are_refused(xl: bool, file: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match=r"parametrisation was given for .* in the original layout.*--prediction-type"):
        export(file, tmp_path / "x.scm", parametrisation="x0")
