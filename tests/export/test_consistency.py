"""The family consistency: bundles of small random U-Nets, compared with diffusers' scheduler and pipeline for the same noise."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from both_ways import check_both_ways
from conftest import write_tiny_checkpoint
from scm_export import Options, export, ops, plan
from scm_export.checkpoints import load
from scm_export.errors import CheckpointError
from scm_export.families import BuildOptions, build_model, find_family
from scm_export.parametrisation import sample
from scm_runtime import Generator
from scm_runtime.errors import InvalidArgumentError

pytest.importorskip("diffusers", reason="diffusers is in the test extra")
from diffusers import CMStochasticIterativeScheduler, ConsistencyModelPipeline, UNet2DModel

SIZE = (12, 20)
LEVELS = 40
TWO_STEPS = [22, 0]  # the model cards' timesteps, as indices of noise levels
RANDN = "diffusers.schedulers.scheduling_consistency_models.randn_tensor"


def save(folder: Path, **config: Any) -> Path:
    """Write the folder of a pipeline with random weights: three levels, several heads; by default with the blocks of OpenAI's networks."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        openai = {
            "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D", "ResnetUpsampleBlock2D"),
            "downsample_type": "resnet",
            "upsample_type": "resnet",
            "resnet_time_scale_shift": "scale_shift",
            "attn_norm_num_groups": 4,
        }
        common = {"sample_size": SIZE, "block_out_channels": (8, 16, 24), "layers_per_block": 1, "attention_head_dim": 8, "norm_num_groups": 4}
        unet = UNet2DModel(**{**common, **openai, **config})
    ConsistencyModelPipeline(unet, CMStochasticIterativeScheduler(num_train_timesteps=LEVELS)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("labelled") / "cm", num_class_embeds=5)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unconditional pipeline for square images, with resampling convolutions."""
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("UpBlock2D", "UpBlock2D")}
    resampling = {"downsample_type": "conv", "upsample_type": "conv", "resnet_time_scale_shift": "default"}
    return save(tmp_path_factory.mktemp("plain") / "cm", sample_size=16, block_out_channels=(8, 16), **blocks, **resampling)


@pytest.fixture(scope="module")
def bundle(labelled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    done = export(labelled, tmp_path_factory.mktemp("bundle") / "cm.scm", steps=(2,))
    assert done.manifest.verification is not None
    assert "CMStochasticIterativeScheduler" in done.manifest.verification.reference
    return done.path


def noises(seeds: Sequence[int], shape: tuple[int, ...], count: int) -> list[Tensor]:
    return [ops.philox_normal(torch.tensor(seeds), draw, shape) for draw in range(count + 1)]


@torch.no_grad()
def with_scheduler(folder: Path, seeds: Sequence[int], timesteps: list[int], shape: tuple[int, ...], **conditioning: Tensor) -> list[NDArray[np.float32]]:
    """Run diffusers' loop with the U-Net as diffusers loads it; return the states after each step."""
    unet, scheduler = (
        UNet2DModel.from_pretrained(folder / "unet", low_cpu_mem_usage=False),
        CMStochasticIterativeScheduler.from_pretrained(folder / "scheduler"),
    )
    unet.eval()
    scheduler.set_timesteps(timesteps=timesteps)
    x, *draws = noises(seeds, shape, len(timesteps))
    x, states = x * scheduler.init_noise_sigma, []
    with mock.patch(RANDN, side_effect=draws):
        for t in scheduler.timesteps:
            output = unet(scheduler.scale_model_input(x, t), t, return_dict=False, **conditioning)[0]
            x = scheduler.step(output, t, x, return_dict=False)[0]
            states.append(x.numpy())
    return states


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_one_and_two_steps_equal_the_scheduler_in_any_batch(labelled: Path, bundle: Path, n: int) -> None:
    seeds, labels = list(range(7, 7 + n)), [(3 * i + 1) % 5 for i in range(n)]
    with Generator(bundle) as generate:
        for timesteps in ([0], TWO_STEPS):
            states: list[NDArray[np.float32]] = []
            found = generate(
                labels,
                seed=seeds,
                num_inference_steps=len(timesteps),
                callback_on_step_end=lambda _generator, _step, _t, values, states=states: states.append(values["latents"]),  # type: ignore[misc]
            )
            expected = with_scheduler(labelled, seeds, timesteps, (3, *SIZE), class_labels=torch.tensor(labels))
            for state, exact in zip(states, expected, strict=True):
                np.testing.assert_allclose(state, exact, atol=1e-4 * max(1.0, exact.std()))
            image = np.round((expected[-1] / 2 + 0.5).clip(0, 1) * 255).transpose(0, 2, 3, 1)
            assert np.abs(found.array.astype(int) - image).max() <= 1
            assert image.std() > 10


def test_the_pipeline_of_diffusers_makes_the_same_images(plain: Path) -> None:
    model = build_model(load(plain))
    pipeline = ConsistencyModelPipeline.from_pretrained(plain, low_cpu_mem_usage=False)
    pipeline.set_progress_bar_config(disable=True)
    for timesteps in ([0], TWO_STEPS):
        first, *draws = noises([1, 2, 3], model.sample_shape, len(timesteps))
        with mock.patch(RANDN, side_effect=draws):
            images = pipeline(3, num_inference_steps=None, timesteps=timesteps, latents=first, output_type="np").images
        x = sample(model.step, [first, *draws], model.times[len(timesteps)], model.initial_scale, {})
        np.testing.assert_allclose(((x / 2 + 0.5).clamp(0, 1)).permute(0, 2, 3, 1).numpy(), images, atol=1e-5)
        assert images.std() > 0.05


@pytest.mark.parametrize(("levels", "size", "second"), [(40, 64, 22), (40, 256, 17), (201, 64, 106), (151, 256, 67)])
def test_two_steps_go_through_the_authors_noise_level(plain: Path, tmp_path: Path, levels: int, size: int, second: int) -> None:
    folder = tmp_path / "cm"
    scheduler = CMStochasticIterativeScheduler(num_train_timesteps=levels)
    ConsistencyModelPipeline(UNet2DModel.from_pretrained(plain / "unet", low_cpu_mem_usage=False), scheduler).save_pretrained(folder)
    scheduler.set_timesteps(timesteps=[second, 0])
    model = build_model(load(folder), BuildOptions(size=(size, size)))
    assert model.times[2] == tuple(scheduler.sigmas.tolist())
    assert model.time_unit == "sigma"


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_half_precision_stays_above_40_db(plain: Path, tmp_path: Path, dtype: Any) -> None:
    done = export(plain, tmp_path / "cm.scm", dtype=dtype, steps=(2,))
    assert done.manifest.dtypes == (dtype, "fp32")
    assert done.manifest.verification is not None
    cases = [case for case in done.manifest.verification.cases if case.graph == "step"]
    assert {(case.dtype, case.batch_size, case.steps) for case in cases} >= {(name, n, k) for name in (dtype, "fp32") for n in (1, 3) for k in (1, 2)}
    assert all(case.psnr is None or case.psnr >= 40 for case in cases)
    with Generator(done.path, dtype="fp32") as generate:
        found = generate(seed=[1, 2, 3], output_type="np").array
    expected = with_scheduler(plain, [1, 2, 3], TWO_STEPS, (3, 16, 16))[-1].transpose(0, 2, 3, 1)
    assert psnr(found, (expected * 127.5 + 127.5).clip(0, 255)) >= 40
    check_both_ways(done.path)


def psnr(a: NDArray[Any], b: NDArray[Any]) -> float:
    return float(10 * np.log10(255**2 / np.square(a.astype(np.float64) - b).mean()))


def test_the_family_is_found_and_images_can_be_encoded(labelled: Path, tmp_path: Path) -> None:
    assert find_family(load(labelled)) == "consistency"
    model = build_model(load(labelled), BuildOptions(with_encoder=True))
    assert [(item.name, item.num_classes) for item in model.conditioning] == [("class_labels", 5)]
    assert model.encoder is not None
    image = torch.arange(3 * 12 * 20).reshape(1, *SIZE, 3).to(torch.uint8)
    assert torch.equal(model.decode(model.encoder.network(image)), image)
    with pytest.raises(CheckpointError, match="--decoder is for latent models"):
        build_model(load(labelled), BuildOptions(decoder=tmp_path))


def test_what_the_pipeline_cannot_run_is_refused(plain: Path, tmp_path: Path) -> None:
    def with_config(part: str, **changes: Any) -> Path:
        folder = tmp_path / "-".join(changes)
        UNet2DModel.from_pretrained(plain / "unet", low_cpu_mem_usage=False).save_pretrained(folder / "unet")
        CMStochasticIterativeScheduler().save_pretrained(folder / "scheduler")
        (folder / "model_index.json").write_bytes((plain / "model_index.json").read_bytes())
        path = next((folder / part).glob("*config.json"))
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
        return folder

    refused: list[tuple[str, dict[str, Any], str]] = [
        ("unet", {"class_embed_type": "timestep"}, "class_embed_type of the UNet2DModel .* must be None"),
        ("unet", {"out_channels": 6}, "out_channels of the UNet2DModel .* must be 3 .* got 6"),
        ("unet", {"time_embedding_type": "fourier"}, "must be 'positional'"),
        ("unet", {"block_out_channels": [8, 12]}, "wrong shape"),
        ("unet", {"down_block_types": ["NoBlock", "DownBlock2D"]}, "diffusers .* cannot create a UNet2DModel .*NoBlock"),
        ("unet", {"sample_size": None}, "--size"),
        ("scheduler", {"sigma_min": -0.002}, "0 < sigma_min < sigma_max, got -0.002"),
    ]
    for part, changes, message in refused:
        with pytest.raises(CheckpointError, match=message):
            build_model(load(with_config(part, **changes)))
    with pytest.raises(InvalidArgumentError, match=r"cannot take a state of \[3, 15, 16\].*--size"):
        build_model(load(plain), BuildOptions(size=(15, 16)))
    ConsistencyModelPipeline.from_pretrained(plain, low_cpu_mem_usage=False).unet.save_pretrained(tmp_path / "alone")
    with pytest.raises(CheckpointError, match="belongs to no known family"):
        build_model(load(tmp_path / "alone"))
    assert build_model(load(tmp_path / "alone"), family="consistency").times == build_model(load(plain)).times


def test_a_pipeline_is_refused_as_a_guide(plain: Path, tmp_path: Path) -> None:
    teacher = write_tiny_checkpoint(tmp_path / "teacher.pt", diffusion=True)
    with pytest.raises(CheckpointError, match="the guide must be of the family edm2 too, got"):
        plan(teacher, options=Options(guide=plain))
