"""The family sd-distilled: small random U-Nets, compared with diffusers' pipelines and schedulers for the same noise and embeddings."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers", reason="diffusers is in the test extra")
from diffusers import DDIMScheduler, EulerAncestralDiscreteScheduler, EulerDiscreteScheduler, LCMScheduler, PNDMScheduler, TCDScheduler
from safetensors.torch import load_file, save_file

from scm_export import export
from scm_export.checkpoints import load
from scm_export.errors import CheckpointError
from scm_export.families import BuildOptions, build_model, find_family
from scm_export.parametrisation import sample
from scm_runtime import Generator
from scm_runtime.errors import InvalidArgumentError
from tiny_stable_diffusion import SD_NOISE, TRAILING, add_text, embeddings, make_pipeline, noises, run_pipeline, save_folder

GUIDANCE = 1.75
SEEDS = [3, 4]


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SD-Turbo's folder."""
    scheduler = EulerDiscreteScheduler(**SD_NOISE, **TRAILING)
    return save_folder(tmp_path_factory.mktemp("sd") / "sd-turbo", scheduler, middle=False)


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SDXL-Turbo's folder. States of a random network that predicts noise are far larger than a trained model's, hence v_prediction."""
    scheduler = EulerAncestralDiscreteScheduler(**SD_NOISE, **TRAILING, prediction_type="v_prediction")
    return save_folder(tmp_path_factory.mktemp("sdxl") / "sdxl-turbo", scheduler, xl=True, middle=False)


# Options of the export, the scheduler of diffusers' model card, arguments of the pipeline's call.
CASES: dict[str, tuple[dict[str, Any], type[Any], dict[str, Any]]] = {
    "the folder's own": ({}, EulerDiscreteScheduler, {}),
    "Hyper-SD": ({"scheduler": "ddim"}, DDIMScheduler, {}),
    "SDXL-Lightning in one step": ({"scheduler": "euler", "prediction_type": "sample"}, EulerDiscreteScheduler, {}),
    "SDXL-Turbo": ({"scheduler": "euler-ancestral"}, EulerAncestralDiscreteScheduler, {}),
    "LCM-LoRA": ({"scheduler": "lcm", "guidance": True}, LCMScheduler, {"guidance_scale": GUIDANCE}),
    "TCD": ({"scheduler": "tcd"}, TCDScheduler, {"eta": 0.3}),
    "TCD without noise": ({"scheduler": "tcd", "prediction_type": "v_prediction"}, TCDScheduler, {"eta": 0.0}),
    "TCD with guidance": ({"scheduler": "tcd", "guidance": True}, TCDScheduler, {"eta": 0.8, "guidance_scale": GUIDANCE}),
}


@pytest.mark.parametrize("case", CASES)
def test_every_scheduler_makes_the_latents_of_diffusers_pipeline(sd: Path, case: str) -> None:
    options, scheduler, arguments = CASES[case]
    model = build_model(load(sd), BuildOptions(latents=True, **options))
    settings = {"prediction_type": options["prediction_type"]} if "prediction_type" in options else {}
    pipeline = make_pipeline(sd, scheduler.from_config(EulerDiscreteScheduler.load_config(sd / "scheduler"), **TRAILING, **settings))
    text = embeddings(2, xl=False, guidance="guidance" in options)
    own = {name: torch.full((2,), value) for name, value in arguments.items()}
    assert sorted(item.name for item in model.conditioning) == sorted([*text, *own])
    assert sorted(model.times) == ([1, 2, 4, 5, 8] if scheduler is DDIMScheduler else list(range(1, 9)))
    for steps in (1, 2, 4, 8):
        expected = run_pipeline(pipeline, SEEDS, steps, "latent", **text, **{"guidance_scale": 0.0, **arguments})
        found = sample(model.step, noises(SEEDS, steps), model.times[steps], model.initial_scale, {**text, **own})
        torch.testing.assert_close(found, expected, atol=1e-4 * max(1.0, float(expected.std())), rtol=0)
    assert model.reference is not None
    by_reference = model.reference.sample(noises(SEEDS, steps), model.times[steps], {**text, **own})
    torch.testing.assert_close(by_reference, expected, atol=1e-5 * max(1.0, float(expected.std())), rtol=0)


@pytest.mark.parametrize("guidance", [False, True])
def test_sdxl_reads_the_pooled_embedding_and_the_size(sdxl: Path, guidance: bool) -> None:
    model = build_model(load(sdxl), BuildOptions(guidance=guidance))
    pipeline = make_pipeline(sdxl, EulerAncestralDiscreteScheduler.from_pretrained(sdxl / "scheduler"))
    text = embeddings(2, xl=True, guidance=guidance)
    own = {"guidance_scale": torch.full((2,), GUIDANCE)} if guidance else {}
    expected = run_pipeline(pipeline, SEEDS, 2, "latent", **text, guidance_scale=GUIDANCE if guidance else 0.0)
    found = sample(model.step, noises(SEEDS, 2), model.times[2], model.initial_scale, {**text, **own})
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_a_unet_with_an_embedded_guidance_scale(tmp_path: Path) -> None:
    """As LCM's for SDXL."""
    folder = save_folder(tmp_path / "lcm", LCMScheduler(**SD_NOISE, prediction_type="v_prediction"), xl=True, time_cond_proj_dim=15)
    assert find_family(load(folder)) == "sd-distilled"
    model = build_model(load(folder), BuildOptions(latents=True))
    text = embeddings(2, xl=True, guidance=False)
    pipeline = make_pipeline(folder, LCMScheduler.from_pretrained(folder / "scheduler"))
    for steps in (1, 4):
        expected = run_pipeline(pipeline, SEEDS, steps, "latent", **text, guidance_scale=GUIDANCE)
        found = sample(model.step, noises(SEEDS, steps), model.times[steps], model.initial_scale, {**text, "guidance_scale": torch.full((2,), GUIDANCE)})
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    with pytest.raises(CheckpointError, match=r"--guidance is for U-Nets without time_cond_proj_dim.*leave it out"):
        build_model(load(folder), BuildOptions(latents=True, guidance=True))


def test_samples_of_a_batch_may_have_different_etas_and_be_at_different_steps(sd: Path) -> None:
    model = build_model(load(sd), BuildOptions(latents=True, scheduler="tcd"))
    text, x = embeddings(3, xl=False, guidance=False), noises([1, 2, 3], 1)
    t, t_next, eta = torch.tensor([999.0, 759.0, 259.0]), torch.tensor([759.0, 0.0, 19.0]), torch.tensor([0.0, 0.3, 1.0])
    with torch.no_grad():
        together = model.step(x[0], t, t_next, x[1], {**text, "eta": eta})
        alone = [
            model.step(*(value[i : i + 1] for value in (x[0], t, t_next, x[1])), {name: value[i : i + 1] for name, value in {**text, "eta": eta}.items()})
            for i in range(3)
        ]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("name", "xl"), [("sd", False), ("sdxl", True)])
def test_images_of_a_bundle_are_those_of_the_pipeline(name: str, xl: bool, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    folder = add_text(request.getfixturevalue(name), tmp_path / "turbo", xl=xl)
    lora = save_text_lora(tmp_path / "lora.safetensors", folder, xl=xl)
    done = export(folder, tmp_path / "turbo.scm", dtype="fp32", steps=(2,), lora=[f"{lora}:0.5"])
    manifest = done.manifest
    assert (manifest.family, manifest.time_unit, manifest.output.shape) == ("sd-distilled", "timestep", (16, 24, 3))
    assert manifest.times["4"] == (999.0, 749.0, 499.0, 249.0, 0.0)
    assert manifest.verification is not None
    assert f"Euler{'Ancestral' * xl}DiscreteScheduler of diffusers" in manifest.verification.reference
    assert manifest.text is not None
    assert manifest.text.outputs == ("prompt_embeds", "pooled_prompt_embeds")[: 1 + xl]
    scheduler = EulerAncestralDiscreteScheduler if xl else EulerDiscreteScheduler
    pipeline = make_pipeline(folder, scheduler.from_pretrained(folder / "scheduler"))
    merge_text_lora(pipeline, lora, 0.5)
    with Generator(done.path) as generate:
        for n, steps in ((1, 1), (3, 4)):
            seeds = list(range(5, 5 + n))
            prompts = ["a lighthouse at dusk", "", "Маяк на закате 灯台 " * 30][:n]  # the last is too long
            expected = run_pipeline(pipeline, seeds, steps, "np", prompt=prompts, guidance_scale=0.0) * 255
            found = generate(prompt=prompts, seed=seeds, num_inference_steps=steps, output_type="np").array
            assert np.abs(found - expected).max() <= 0.6
            assert expected.std() > 10
        text = embeddings(2, xl=xl, guidance=False, tokens=5)
        expected = run_pipeline(pipeline, SEEDS, 2, "np", **text, guidance_scale=0.0) * 255
        found = generate(conditioning={name: value.numpy() for name, value in text.items()}, seed=SEEDS, num_inference_steps=2, output_type="np").array
        assert np.abs(found - expected).max() <= 0.6


def save_text_lora(path: Path, folder: Path, *, xl: bool) -> Path:
    """Write a LoRA of kohya's layout for one layer of each text encoder, with an alpha of half the rank."""
    tensors: dict[str, torch.Tensor] = {}
    for i, suffix in enumerate(("", "_2")[: 1 + xl]):
        size = json.loads((folder / f"text_encoder{suffix}" / "config.json").read_text())["hidden_size"]
        name = f"lora_te{i + 1 if xl else ''}_text_model_encoder_layers_1_mlp_fc1"
        generator = torch.Generator().manual_seed(i)
        tensors |= {f"{name}.lora_down.weight": torch.randn(4, size, generator=generator), f"{name}.lora_up.weight": torch.randn(48, 4, generator=generator)}
        tensors[f"{name}.alpha"] = torch.tensor(2.0)
    save_file(tensors, path)
    return path


def merge_text_lora(pipeline: Any, path: Path, scale: float) -> None:
    tensors = load_file(path)
    for name in {key.split(".")[0] for key in tensors}:
        encoder = pipeline.text_encoder_2 if "te2" in name else pipeline.text_encoder
        layer = getattr(encoder, "text_model", encoder).encoder.layers[1].mlp.fc1
        layer.weight.data += scale * 2 / 4 * tensors[f"{name}.lora_up.weight"] @ tensors[f"{name}.lora_down.weight"]


def test_a_bundle_with_a_negative_prompt_and_eta(sd: Path, tmp_path: Path) -> None:
    done = export(sd, tmp_path / "tcd.scm", scheduler="tcd", guidance=True, latents=True, dtype="fp32", steps=())
    names = [(item.name, item.default) for item in done.manifest.conditioning]
    assert names == [("prompt_embeds", None), ("negative_prompt_embeds", None), ("guidance_scale", 1.5), ("eta", 0.3)]
    pipeline = make_pipeline(sd, TCDScheduler.from_pretrained(sd / "scheduler"))
    text = embeddings(2, xl=False, guidance=True, tokens=5)
    arrays = {name: value.numpy() for name, value in text.items()}
    with Generator(done.path) as generate:
        other = {"guidance_scale": 3.0, "eta": 1.0}
        without = {"guidance_scale": 0.0, "eta": 0.0}  # the negative prompt has no effect
        calls: list[tuple[dict[str, float], dict[str, float]]] = [({}, {"guidance_scale": 1.5, "eta": 0.3}), (other, other), (without, without)]
        for given, arguments in calls:
            expected = run_pipeline(pipeline, SEEDS, 4, "latent", **text, **arguments)
            found = generate(conditioning={**arrays, **given}, seed=SEEDS, num_inference_steps=4, output_type="latent").array
            np.testing.assert_allclose(found, expected, atol=1e-4 * max(1.0, float(expected.std())))


def test_what_cannot_be_sampled_in_few_steps_is_refused(sd: Path, tmp_path: Path) -> None:
    refused: list[tuple[Any, dict[str, Any], str]] = [
        (PNDMScheduler(), {}, "has a PNDMScheduler, which is not for few steps. Give .* --scheduler lcm.euler"),
        (
            EulerDiscreteScheduler(timestep_spacing="leading"),
            {},
            "timestep_spacing of .* must be 'trailing', got 'leading'. --scheduler euler",
        ),
        (EulerDiscreteScheduler(**TRAILING, use_karras_sigmas=True), {}, "use_karras_sigmas .* must be False, got True"),
        (EulerAncestralDiscreteScheduler(**TRAILING), {"prediction_type": "sample"}, "prediction_type of the EulerAncestral.* one of epsilon, v_prediction"),
        (TCDScheduler(original_inference_steps=0), {}, "original_inference_steps of the TCDScheduler"),
        (LCMScheduler(beta_end=math.nan), {}, "must have finite betas"),
        (LCMScheduler(thresholding=True), {}, "thresholding of the LCMScheduler .* must be False"),
    ]
    for i, (scheduler, options, message) in enumerate(refused):
        scheduler.save_pretrained(tmp_path / str(i) / "scheduler")
        index = (sd / "model_index.json").read_text().replace("EulerDiscreteScheduler", type(scheduler).__name__)
        (tmp_path / str(i) / "model_index.json").write_text(index)
        (tmp_path / str(i) / "unet").symlink_to(sd / "unet")
        with pytest.raises(CheckpointError, match=message):
            build_model(load(tmp_path / str(i)), BuildOptions(latents=True, **options))


def test_inputs_of_other_models_are_refused(tmp_path: Path) -> None:
    refused: list[tuple[dict[str, Any], str]] = [
        ({"in_channels": 9}, "out_channels .* must be 9, got 4"),
        ({"num_class_embeds": 3}, "num_class_embeds .* must be None, got 3"),
        ({"addition_embed_type": "text"}, "addition_embed_type .* must be None or 'text_time', got 'text'"),
    ]
    for i, (config, message) in enumerate(refused):
        folder = save_folder(tmp_path / str(i), EulerDiscreteScheduler(**TRAILING), **config)
        with pytest.raises(CheckpointError, match=message):
            build_model(load(folder), BuildOptions(latents=True))


def test_the_folder_of_a_unet_needs_a_scheduler(sd: Path) -> None:
    assert find_family(load(sd / "unet")) == "sd-distilled"
    with pytest.raises(CheckpointError, match=r"has no scheduler. Give the one that the model card names with --scheduler"):
        build_model(load(sd / "unet"), BuildOptions(latents=True))
    model = build_model(load(sd / "unet"), BuildOptions(decoder=sd / "vae", scheduler="lcm", size=(32, 48)))
    assert (model.sample_shape, model.output.shape) == ((4, 16, 24), (32, 48, 3))


def test_options_of_the_family_are_refused_for_others(small_checkpoint: Path, sd: Path, tmp_path: Path) -> None:
    given: list[dict[str, Any]] = [{"scheduler": "lcm"}, {"prediction_type": "sample"}, {"guidance": True}]
    for options in given:
        with pytest.raises(InvalidArgumentError, match=rf"{next(iter(options))} was given, but the family edm2 has no use for it"):
            export(small_checkpoint, tmp_path / "x.scm", **options)
    with pytest.raises(InvalidArgumentError, match=r"scheduler must be one of lcm, euler, euler-ancestral, ddim, tcd, got 'heun'"):
        export(sd, tmp_path / "x.scm", scheduler="heun")  # type: ignore[arg-type]
