"""The family latent-consistency: bundles of small random U-Nets, compared with diffusers' scheduler and pipeline for the same noise and embeddings."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from both_ways import check_both_ways
from scm_export import Options, export, ops, plan
from scm_export.checkpoints import load
from scm_export.errors import CheckpointError, VerificationError
from scm_export.exporter import Exported, export_model
from scm_export.families import BuildOptions, build_model, find_family
from scm_export.parametrisation import sample
from scm_runtime import Generator
from scm_runtime.bundle.manifest import Source
from scm_runtime.errors import InvalidArgumentError
from text_encoders import save_clip

pytest.importorskip("diffusers", reason="diffusers is in the test extra")
from diffusers import AutoencoderKL, LatentConsistencyModelPipeline, LCMScheduler, UNet2DConditionModel

SIZE = (6, 10)  #  height and width of the latents
TEXT = 24
RANDN = "diffusers.schedulers.scheduling_lcm.randn_tensor"
INDEX = {
    "_class_name": "LatentConsistencyModelPipeline",
    "scheduler": ["diffusers", "LCMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def save(folder: Path, scheduler: dict[str, Any] | None = None, *, vae: bool = True, **config: Any) -> Path:
    """Write the folder of a pipeline with random weights: two levels, two heads. It has no text encoder.

    Only the outer level of the U-Net has attention. test_readme.py has attention in the middle block, test_autoencoders.py in the autoencoder.
    """
    blocks = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
    sizes = {"sample_size": SIZE, "block_out_channels": (8, 16), "layers_per_block": 1, "attention_head_dim": 2, "norm_num_groups": 4, "mid_block_type": None}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DConditionModel(**{**blocks, **sizes, "cross_attention_dim": TEXT, "time_cond_proj_dim": 15, **config})
        autoencoder = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 16),
            norm_num_groups=4,
            mid_block_add_attention=False,
        )
    for network in (unet, autoencoder):  # float16 holds these weights exactly: a bundle in half precision is compared as one in float32 is
        network.half().float()
    unet.save_pretrained(folder / "unet")
    LCMScheduler(**(scheduler or {})).save_pretrained(folder / "scheduler")
    if vae:
        autoencoder.save_pretrained(folder / "vae")
    (folder / "model_index.json").write_text(json.dumps(INDEX))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose states have the magnitude of a trained model's. With random noise predictions, one step gives states about 15 times larger."""
    folder = save(tmp_path_factory.mktemp("lcm") / "lcm", {"prediction_type": "v_prediction"})
    save_clip(folder, hidden=TEXT)
    return folder


@pytest.fixture(scope="module")
def exported(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The bundle in the family's default dtype, verified."""
    return export(folder, tmp_path_factory.mktemp("bundle") / "lcm.scm", steps=(2,))


@pytest.fixture(scope="module")
def bundle(exported: Exported) -> Path:
    assert exported.manifest.time_unit == "timestep"
    return exported.path


def noises(seeds: Sequence[int], count: int, size: tuple[int, int] = SIZE) -> list[Tensor]:
    return [ops.philox_normal(torch.tensor(seeds), draw, (4, *size)) for draw in range(count + 1)]


def embeddings(n: int, tokens: int) -> Tensor:
    return torch.randn(n, tokens, TEXT, generator=torch.Generator().manual_seed(tokens))


@torch.no_grad()
def with_scheduler(folder: Path, seeds: Sequence[int], steps: int, text: Tensor, guidance: Sequence[float]) -> list[NDArray[np.float32]]:
    """Run diffusers' loop with the U-Net as diffusers loads it; return the states after each step."""
    unet = UNet2DConditionModel.from_pretrained(folder / "unet", low_cpu_mem_usage=False).eval()
    scheduler = LCMScheduler.from_pretrained(folder / "scheduler")
    scheduler.set_timesteps(steps)
    embed = LatentConsistencyModelPipeline.get_guidance_scale_embedding
    w = embed(None, torch.tensor(guidance) - 1, embedding_dim=unet.config.time_cond_proj_dim)
    (x, *draws), states = noises(seeds, steps), []
    with mock.patch(RANDN, side_effect=draws):
        for t in scheduler.timesteps:
            output = unet(x, t, timestep_cond=w, encoder_hidden_states=text, return_dict=False)[0]
            x = scheduler.step(output, t, x, return_dict=False)[0]
            states.append(x.numpy())
    return states


@pytest.mark.parametrize(("n", "tokens", "steps"), [(1, 77, 1), (3, 77, 2), (2, 1, 4), (5, 7, 8)])
def test_the_bundle_equals_the_scheduler_for_any_batch_and_length_of_text(folder: Path, bundle: Path, n: int, tokens: int, steps: int) -> None:
    seeds, text, guidance = list(range(3, 3 + n)), embeddings(n, tokens), [8.5, 1.0, 4.25, 7.0, 2.5][:n]
    states: list[NDArray[np.float32]] = []
    with Generator(bundle, dtype="fp32") as generate:
        found = generate(
            prompt_embeds=text.numpy(),
            guidance_scale=guidance,
            seed=seeds,
            num_inference_steps=steps,
            callback_on_step_end=lambda _generator, _step, _t, values: states.append(values["latents"]),
        )
    expected = with_scheduler(folder, seeds, steps, text, guidance)
    assert len(expected) == steps
    for state, exact in zip(states, expected, strict=True):
        np.testing.assert_allclose(state, exact, atol=1e-4)
        assert 0.2 < exact.std() < 2
    vae = AutoencoderKL.from_pretrained(folder / "vae", low_cpu_mem_usage=False).eval()
    with torch.no_grad():
        image = vae.decode(torch.from_numpy(expected[-1]) / vae.config.scaling_factor).sample
    levels = (image / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy() * 255
    assert np.abs(found.array - levels).max() <= 0.51
    assert levels.std() > 10


def test_prompts_give_the_latents_of_the_pipelines_embeddings(folder: Path, bundle: Path) -> None:
    prompts, guidance = ["a lighthouse at dusk", "Маяк на закате 灯台", "a lighthouse at dusk"], [8.5, 4.0, 2.0]
    encoder, tokenizer = CLIPTextModel.from_pretrained(folder / "text_encoder"), CLIPTokenizer.from_pretrained(folder / "tokenizer")
    others = dict.fromkeys(("vae", "unet", "scheduler", "safety_checker", "feature_extractor"))
    pipeline = LatentConsistencyModelPipeline(text_encoder=encoder, tokenizer=tokenizer, **others, requires_safety_checker=False)
    with torch.no_grad():
        text, _ = pipeline.encode_prompt(prompts, torch.device("cpu"), 1, False)
    expected = with_scheduler(folder, [3, 4, 5], 2, text, guidance)
    with Generator(bundle, dtype="fp32") as generate:
        found = generate(prompt=prompts, guidance_scale=guidance, seed=[3, 4, 5], num_inference_steps=2, output_type="latent").array
        np.testing.assert_allclose(generate.encode_prompt(prompts)["prompt_embeds"], text, atol=1e-4)
    np.testing.assert_allclose(found, expected[-1], atol=1e-4)
    assert np.abs(found[0] - found[1]).max() > 0.1


def test_the_guidance_scale_is_the_pipelines_by_default_and_has_effect(bundle: Path) -> None:
    text = embeddings(1, 5).numpy()
    with Generator(bundle, dtype="fp32") as generate:
        default, same, other = (generate(prompt_embeds=text, guidance_scale=scale, seed=1, output_type="latent").array for scale in (None, 8.5, 3.0))
    np.testing.assert_array_equal(default, same)
    assert np.abs(other - same).max() > 1e-3


def test_the_pipeline_of_diffusers_makes_the_same_latents(tmp_path: Path) -> None:
    folder = save(tmp_path / "lcm")  # predicts the noise, like published models
    assert find_family(load(folder)) == "latent-consistency"
    model = build_model(load(folder), BuildOptions(size=(16, 24)))  # the pipeline requires multiples of 8
    assert (model.sample_shape, model.output.shape) == ((4, 8, 12), (16, 24, 3))
    parts = {
        "unet": UNet2DConditionModel.from_pretrained(folder / "unet", low_cpu_mem_usage=False),
        "vae": AutoencoderKL.from_pretrained(folder / "vae", low_cpu_mem_usage=False),
        "scheduler": LCMScheduler.from_pretrained(folder / "scheduler"),
    }
    nothing = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    pipeline = LatentConsistencyModelPipeline(**parts, **nothing, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    text = embeddings(2, 77)
    for steps in (1, 2, 4, 8):
        first, *draws = noises([1, 2], steps, (8, 12))
        arguments = {"prompt_embeds": text, "latents": first, "num_inference_steps": steps, "guidance_scale": 7.5, "height": 16, "width": 24}
        with mock.patch(RANDN, side_effect=draws):
            expected = pipeline(**arguments, output_type="latent").images
        found = sample(model.step, [first, *draws], model.times[steps], model.initial_scale, {"prompt_embeds": text, "guidance_scale": torch.full((2,), 7.5)})
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("changes", [{"prediction_type": "sample", "clip_sample": True, "clip_sample_range": 0.2}, {"timestep_scaling": 0.001}])
def test_other_schedulers_settings_are_followed(tmp_path: Path, changes: dict[str, Any]) -> None:
    folder = save(tmp_path / "lcm", changes)
    model = build_model(load(folder))
    text, guidance = embeddings(2, 3), [8.5, 2.0]
    found = sample(model.step, noises([4, 5], 2), model.times[2], 1.0, {"prompt_embeds": text, "guidance_scale": torch.tensor(guidance)})
    np.testing.assert_allclose(found, with_scheduler(folder, [4, 5], 2, text, guidance)[-1], atol=1e-4)


def test_configurations_may_have_infinities_and_byte_order_marks(tmp_path: Path) -> None:
    """Published schedulers have "lambda_min_clipped": -Infinity. Some editors write a byte order mark."""
    folder = save(tmp_path / "lcm", vae=False)
    for file, more in (("scheduler/scheduler_config.json", {"lambda_min_clipped": -math.inf}), ("unet/config.json", {})):
        config = json.loads((folder / file).read_text()) | more
        (folder / file).write_text(json.dumps(config), encoding="utf-8-sig")
    build_model(load(folder), BuildOptions(latents=True))


def test_half_precision_stays_above_40_db(exported: Exported) -> None:
    done = exported
    assert done.manifest.dtypes == ("fp16", "fp32")  # the family's default
    assert done.manifest.verification is not None
    assert "LCMScheduler" in done.manifest.verification.reference
    cases = [case for case in done.manifest.verification.cases if case.graph == "step"]
    assert {(case.dtype, case.batch_size, case.steps) for case in cases} >= {(name, n, k) for name in ("fp16", "fp32") for n in (1, 3) for k in (1, 2)}
    assert all(case.psnr is None or case.psnr >= 40 for case in cases)
    check_both_ways(done.path)


def test_the_bundle_has_the_text_encoder_and_how_it_was_verified(folder: Path, exported: Exported) -> None:
    manifest = exported.manifest
    assert manifest.text is not None
    assert (manifest.text.outputs, manifest.text.weights_dtype, manifest.text.licence) == (("prompt_embeds",), "fp16", None)
    assert {"text.fp16.onnx", "text.fp32.onnx", "tokenizer.json"} <= set(manifest.files)
    assert manifest.verification is not None
    cases = [case for case in manifest.verification.cases if case.graph == "text"]
    assert {(case.dtype, case.batch_size, case.output) for case in cases} == {(dtype, n, "prompt_embeds") for dtype in ("fp16", "fp32") for n in (1, 4)}
    assert all(case.max_abs < 0.02 for case in cases)
    assert exported.notes == ()
    planned = plan(folder)
    assert planned.parameters["text"] == sum(tensor.numel() for tensor in load_file(folder / "text_encoder" / "model.safetensors").values())
    assert {*planned.graphs, *planned.files} - {"sample-1.fp16.onnx"} >= {"text.fp16.onnx", "text.fp32.onnx", "tokenizer.json"}
    assert planned.weights_bytes["fp16"] == pytest.approx(manifest.files["weights.onnx.data"].size, rel=0.1)


def test_a_text_encoder_can_be_quantized_or_left_out(folder: Path, tmp_path: Path) -> None:
    small: dict[str, Any] = {"dtype": "fp32", "steps": (), "latents": True, "size": (8, 8)}
    quantized = export(folder, tmp_path / "int4.scm", **small, text_dtype="int4").manifest
    assert quantized.text is not None
    assert quantized.text.weights_dtype == "int4"
    nodes = {node.op_type for node in onnx.load(tmp_path / "int4.scm" / "text.fp32.onnx", load_external_data=False).graph.node}
    assert "MatMulNBits" in nodes
    assert "MatMul" not in nodes
    assert quantized.verification is not None
    (worst,) = (case.max_abs for case in quantized.verification.cases if case.graph == "text" and case.batch_size == 4)
    assert 0.05 < worst < 5
    assert plan(folder, options=Options(text=False)).text is None


def test_a_wrong_tokenizer_in_the_bundle_fails_the_export(folder: Path, tmp_path: Path) -> None:
    model = build_model(load(folder), BuildOptions(latents=True, size=(8, 8)))
    assert model.text is not None
    changed = json.loads(model.text.tokenizers["tokenizer.json"])
    changed["normalizer"] = None
    model.text.tokenizers["tokenizer.json"] = json.dumps(changed).encode()
    with pytest.raises(VerificationError, match=r"tokenizer\.json gives other token ids than transformers for .* of 4 prompts.*--no-text"):
        export_model(model, tmp_path / "wrong.scm", Source(file="lcm", sha256="0" * 64), Options(steps=()))
    assert not (tmp_path / "wrong.scm").exists()


def test_no_graph_has_a_matrix_of_attention_scores(bundle: Path) -> None:
    for name in ("step", "sample-2"):
        nodes = {node.op_type for node in onnx.load(bundle / f"{name}.fp16.onnx", load_external_data=False).graph.node}
        assert "Attention" in nodes
        assert "Softmax" not in nodes


def test_another_size_is_asked_for_in_pixels(folder: Path) -> None:
    model = build_model(load(folder), BuildOptions(size=(20, 28), with_encoder=True))
    assert (model.sample_shape, model.output.shape) == ((4, 10, 14), (20, 28, 3))
    assert model.encoder is not None
    assert model.encoder.shape == (20, 28, 3)
    with pytest.raises(InvalidArgumentError, match="multiples of 2 pixels, got 21x28"):
        build_model(load(folder), BuildOptions(size=(21, 28)))


def test_what_the_pipeline_cannot_run_is_refused(tmp_path: Path) -> None:
    refused: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        ({}, {"time_cond_proj_dim": None}, "must have time_cond_proj_dim.*LCM-LoRA"),
        (
            {},
            {"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 32},
            "addition_embed_type .* 'text_time'",
        ),
        ({}, {"num_class_embeds": 3}, "num_class_embeds .* must be None, got 3"),
        ({}, {"in_channels": 9}, "out_channels .* must be 9, got 4"),
        ({"thresholding": True}, {}, "thresholding of the LCMScheduler .* must be False, got True"),
        ({"original_inference_steps": 0}, {}, "original_inference_steps of the LCMScheduler"),
        ({"beta_end": math.nan}, {}, "must have finite betas"),
        ({"clip_sample": True, "clip_sample_range": math.inf}, {}, "a positive clip_sample_range"),
        ({}, {"norm_eps": math.inf}, "norm_eps must be finite"),
        ({"prediction_type": "velocity"}, {}, "must be one of epsilon, sample, v_prediction, got 'velocity'"),
    ]
    for i, (scheduler, unet, message) in enumerate(refused):
        with pytest.raises(CheckpointError, match=message):
            build_model(load(save(tmp_path / str(i), scheduler, vae=False, **unet)), BuildOptions(latents=True))


def test_a_folder_without_its_parts_is_refused_with_what_is_missing(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"missing decoder.*--decoder FOLDER.*--latents"):
        build_model(load(save(tmp_path / "no-vae", vae=False)))
    assert build_model(load(tmp_path / "no-vae"), BuildOptions(latents=True)).output.kind == "latent"
    assert build_model(load(tmp_path / "no-vae"), BuildOptions(decoder=folder / "vae")).output.shape == (12, 20, 3)

    without = save(tmp_path / "no-weights")
    weights = without / "unet" / "diffusion_pytorch_model.safetensors"
    data = weights.read_bytes()
    weights.unlink()
    with pytest.raises(CheckpointError, match="has no weights"):
        build_model(load(without))
    weights.write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match=r"is not a readable \.safetensors file"):
        build_model(load(without))

    text_model = tmp_path / "text"
    text_model.mkdir()
    (text_model / "config.json").write_text(json.dumps({"architectures": ["CLIPTextModel"], "model_type": "clip_text_model"}))
    with pytest.raises(CheckpointError, match=r"belongs to no known family. Looked for:(.|\n)*latent-consistency: a diffusers folder of"):
        build_model(load(text_model))
