"""SANA-Sprint: a bundle generates the same images as diffusers' SanaSprintPipeline from the same noise and text embeddings."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from diffusers import AutoencoderDC, SanaSprintPipeline, SanaTransformer2DModel, SCMScheduler
from diffusers.schedulers import scheduling_scm
from numpy.typing import NDArray
from torch import Tensor

from both_ways import check_both_ways
from scm_export import export, ops
from scm_export.checkpoints import load
from scm_export.errors import CheckpointError
from scm_export.families import BuildOptions, build_model, find_family
from scm_export.families.sana_sprint import TIMES
from scm_export.parametrisation import sample
from scm_runtime import Generator
from scm_runtime.errors import InvalidArgumentError
from text_encoders import gemma_instruction, save_gemma

SIGMA_DATA = 0.25  #      not the default, 0.5: it must come from the folder
SIZE = (64, 32)  #        pixels; latents of 8 x 4
LATENT = (5, 8, 4)
CAPTION_CHANNELS = 11
TRANSFORMER = {
    "in_channels": 5,
    "out_channels": 5,
    "num_attention_heads": 3,
    "attention_head_dim": 12,
    "num_layers": 2,
    "num_cross_attention_heads": 4,
    "cross_attention_head_dim": 9,
    "cross_attention_dim": 36,
    "caption_channels": CAPTION_CHANNELS,
    "mlp_ratio": 2.5,
    "sample_size": 6,
    "guidance_embeds": True,
    "qk_norm": "rms_norm_across_heads",
}


def transformer(**config: Any) -> Any:
    """A transformer with fixed random weights. Its output has about the magnitude of its input and depends on every weight."""
    network = SanaTransformer2DModel(**{**TRANSFORMER, **config}).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            random = torch.randn(parameter.shape, generator=generator)
            match name.split(".")[-1]:
                case "scale_shift_table":
                    parameter.copy_(random * 0.7)
                case "weight" if parameter.ndim == 1:  # weight of a norm
                    parameter.copy_(1 + random * 0.2)
                case "weight":
                    parameter.copy_(random * 1.5 / math.sqrt(parameter[0].numel()))
                case _:
                    parameter.copy_(random * 0.3)
    return network


def autoencoder() -> Any:
    channels = (5, 20, 20, 20)  # three halvings: 8 pixels per latent
    blocks = ("ResBlock", "ResBlock", "ResBlock", "EfficientViTBlock")
    scales = ((), (), (), (5,))
    with torch.random.fork_rng():
        torch.manual_seed(2)
        network = AutoencoderDC(
            latent_channels=5,
            attention_head_dim=5,
            encoder_block_types=blocks,
            decoder_block_types=blocks,
            encoder_block_out_channels=channels,
            decoder_block_out_channels=channels,
            encoder_layers_per_block=(1, 1, 1, 1),
            decoder_layers_per_block=(1, 1, 1, 1),
            encoder_qkv_multiscales=scales,
            decoder_qkv_multiscales=scales,
            scaling_factor=0.41407,
        )
    return network.eval()


class Original:
    """Run diffusers' pipeline with this project's noise."""

    def __init__(self, folder: Path) -> None:
        self.pipeline = SanaSprintPipeline.from_pretrained(folder)
        self.pipeline.set_progress_bar_config(disable=True)

    def __call__(self, seeds: Sequence[int], conditioning: dict[str, Any], steps: int, output_type: str = "latent") -> NDArray[Any]:
        noises = [ops.philox_normal(torch.tensor(seeds), draw, LATENT) for draw in range(steps + 1)]
        draws = iter(noises[1:])
        arrays = {name: torch.from_numpy(value) for name, value in conditioning.items() if isinstance(value, np.ndarray)}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(scheduling_scm, "randn_tensor", lambda *_args, **_kwargs: next(draws))
            images = self.pipeline(
                **{**conditioning, **arrays},
                num_inference_steps=steps,
                intermediate_timesteps=1.3 if steps == 2 else None,
                latents=noises[0],
                height=SIZE[0],
                width=SIZE[1],
                use_resolution_binning=False,
                output_type=output_type,
            ).images
        return np.asarray(images)


def conditioning(n: int, tokens: int) -> dict[str, Any]:
    """Embeddings of texts of different lengths, all shorter than the array."""
    embeds = np.random.default_rng(n * tokens).standard_normal((n, tokens, CAPTION_CHANNELS), np.float32)
    lengths = tokens - 1 - np.arange(n)[:, None]
    return {"prompt_embeds": embeds, "prompt_attention_mask": (np.arange(tokens) < lengths).astype(np.int64), "guidance_scale": 3.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the folder of a pipeline."""
    path = tmp_path_factory.mktemp("sana") / "tiny"
    parts = {"transformer": transformer(), "vae": autoencoder(), "scheduler": SCMScheduler(sigma_data=SIGMA_DATA)}
    SanaSprintPipeline(tokenizer=None, text_encoder=None, **parts).save_pretrained(path)
    save_gemma(path, hidden=CAPTION_CHANNELS, heads=1)
    index = json.loads((path / "model_index.json").read_text())
    text = {"text_encoder": ["transformers", "Gemma2Model"], "tokenizer": ["transformers", "GemmaTokenizerFast"]}
    (path / "model_index.json").write_text(json.dumps(index | text))
    return path


@pytest.fixture(scope="module")
def original(folder: Path) -> Original:
    return Original(folder)


@pytest.fixture(scope="module")
def bundle(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(folder, tmp_path_factory.mktemp("bundle") / "tiny.scm", dtype="fp32", size=SIZE, steps=(1, 2), verify=False).path


@pytest.fixture(scope="module")
def generate(bundle: Path) -> Iterator[Generator]:
    with Generator(bundle, session_options={"scm.float32_matmul_precision": "highest"}) as generator:  # torch's default
        yield generator


@pytest.mark.parametrize("tokens", [7, 300])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_latents_are_those_of_the_pipeline(generate: Generator, original: Original, steps: int, n: int, tokens: int) -> None:
    seeds, given = list(range(5, 5 + n)), conditioning(n, tokens)
    expected = original(seeds, given, steps)
    found = generate(**given, seed=seeds, num_inference_steps=steps, output_type="latent").array
    np.testing.assert_allclose(found / SIGMA_DATA, expected, atol=1e-4)
    assert expected.std() > 0.5


def test_pictures_are_those_of_the_pipeline(generate: Generator, original: Original) -> None:
    seeds, given = [5, 6, 7], conditioning(3, 7)
    expected = original(seeds, given, 2, "np") * 255
    found = generate(**given, seed=seeds).array
    assert found.shape == (3, *SIZE, 3)
    np.testing.assert_allclose(found, expected, atol=0.51)
    assert expected.std() > 10
    assert ((expected > 0) & (expected < 255)).mean() > 0.5


def test_latents_of_prompts_are_those_of_the_pipeline(generate: Generator, original: Original) -> None:
    given: dict[str, Any] = {"prompt": ["A lighthouse at dusk ", "", "灯台の夕暮れ, маяк"], "guidance_scale": 3.0}
    expected = original([5, 6, 7], given, 2)
    found = generate(**given, seed=[5, 6, 7], output_type="latent").array
    np.testing.assert_allclose(found / SIGMA_DATA, expected, atol=1e-4)
    embeds, mask = generate.encode_prompt(given["prompt"]).values()
    wanted = original.pipeline.encode_prompt(given["prompt"], complex_human_instruction=gemma_instruction())
    np.testing.assert_array_equal(mask, wanted[1])
    np.testing.assert_allclose(embeds, wanted[0].detach(), atol=1e-4)


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_a_sample_is_the_same_in_any_batch(generate: Generator, n: int) -> None:
    given = conditioning(5, 12)
    rows = {name: value[:n] if name != "guidance_scale" else value for name, value in given.items()}
    five, some = (generate(**values, seed=list(range(count)), output_type="latent").array for values, count in ((given, 5), (rows, n)))
    np.testing.assert_allclose(some, five[:n], atol=1e-5)


def test_tokens_that_the_mask_leaves_out_do_not_count_and_without_a_mask_all_do(generate: Generator) -> None:
    given = conditioning(2, 9)
    embeds, mask = given["prompt_embeds"], given["prompt_attention_mask"]
    changed = np.where(mask[..., None] == 1, embeds, 7)
    masked, elsewhere = (generate(prompt_embeds=e, prompt_attention_mask=mask, seed=[1, 2], output_type="latent").array for e in (embeds, changed))
    np.testing.assert_allclose(elsewhere, masked, atol=1e-6)
    every, none_given = (generate(prompt_embeds=embeds, prompt_attention_mask=m, seed=[1, 2], output_type="latent").array for m in (mask**0, None))
    np.testing.assert_array_equal(none_given, every)
    assert np.abs(every - masked).max() > 1e-2


def test_guidance_counts_and_is_the_pipelines_unless_given(generate: Generator) -> None:
    embeds = conditioning(1, 7)["prompt_embeds"]
    default, same, other = (generate(prompt_embeds=embeds, guidance_scale=g, seed=1, output_type="latent").array for g in (None, 4.5, 1.0))
    np.testing.assert_array_equal(default, same)
    assert np.abs(other - default).max() > 1e-2


def test_without_embeddings_there_is_an_error_that_names_them(generate: Generator) -> None:
    with pytest.raises(InvalidArgumentError, match="prompt_embeds"):
        generate(seed=1)


def test_every_graph_opens_bare_and_with_the_native_library(bundle: Path) -> None:
    check_both_ways(bundle)


def test_bfloat16_is_the_default_and_close_to_the_scheduler_of_diffusers(folder: Path, tmp_path: Path) -> None:
    manifest = export(folder, tmp_path / "half.scm", latents=True, size=SIZE, steps=()).manifest
    assert (manifest.weights_dtype, manifest.dtypes, manifest.opset) == ("bf16", ("bf16", "fp32"), 22)
    assert manifest.output.kind == "latent"
    assert manifest.verification is not None
    assert manifest.verification.reference.startswith("SCMScheduler of diffusers")
    cases = manifest.verification.cases
    assert {(case.dtype, case.batch_size, case.steps) for case in cases} >= {(dtype, n, k) for dtype in ("bf16", "fp32") for n in (1, 3) for k in (1, 2)}
    text = {(case.dtype, case.output): case for case in cases if case.graph == "text"}
    assert set(text) == {(dtype, name) for dtype in ("bf16", "fp32") for name in ("prompt_embeds", "prompt_attention_mask")}
    assert all(case.max_abs == 0 for (_, output), case in text.items() if output == "prompt_attention_mask")
    psnr = text["fp32", "prompt_embeds"].psnr, text["bf16", "prompt_embeds"].psnr
    assert psnr[0] is not None
    assert psnr[1] is not None
    assert psnr[0] > psnr[1] > 40
    assert all(case.psnr is not None and case.psnr >= 40 for case in cases if case.output != "prompt_attention_mask")


def test_float16_is_refused_with_the_reason(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match=r"sana-sprint cannot be exported in fp16.*overflow.*bf16"):
        export(folder, tmp_path / "half.scm", dtype="fp16", latents=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("config", [{"qk_norm": None}, {"interpolation_scale": 2.0}, {"patch_size": 2, "attention_bias": True, "sample_size": 8}])
def test_variants_of_the_transformer_step_as_diffusers_samples(tmp_path: Path, config: dict[str, Any]) -> None:
    original = transformer(**config)
    original.save_pretrained(tmp_path)
    for size, shape in ((None, (5, *[original.config.sample_size] * 2)), ((128, 192), (5, 4, 6))):
        model = build_model(load(tmp_path), BuildOptions(latents=True, size=size))
        assert model.sample_shape == shape
        given = {name: torch.as_tensor(value) for name, value in conditioning(2, 7).items()} | {"guidance_scale": torch.tensor([2.0, 5.0])}
        noises = [torch.randn(2, *shape, generator=torch.Generator().manual_seed(draw)) for draw in range(3)]
        found = sample(model.step, noises, model.times[2], model.initial_scale, given)
        expected = _loop(original, noises, given)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
        assert model.reference is not None
        torch.testing.assert_close(model.reference.sample(noises, model.times[2], given), expected, atol=1e-5, rtol=0)


@torch.no_grad()
def _loop(network: Any, noises: Sequence[Tensor], given: dict[str, Tensor]) -> Tensor:
    """SANA-Sprint's two steps written out (arXiv 2503.09641, algorithm 2), in units of sigma_data: x0 = cos t x - sin t F."""
    x = noises[0]
    for t, t_next, noise in ((1.5708, 1.3, noises[1]), (1.3, 0.0, noises[2])):
        sin, cos = math.sin(t), math.cos(t)
        u = sin / (sin + cos)
        h = x / (sin + cos)
        v = network(
            h,
            given["prompt_embeds"],
            torch.full((len(x),), u),
            given["guidance_scale"] * 0.1,
            given["prompt_attention_mask"],
        ).sample
        x0 = h - u * v
        x = math.cos(t_next) * x0 + math.sin(t_next) * noise
    return x * 0.5


def test_opset_23_which_has_an_attention_of_its_own_exports_and_verifies(tmp_path: Path) -> None:
    transformer(num_layers=1, qk_norm=None).save_pretrained(tmp_path / "tiny")
    done = export(tmp_path / "tiny", dtype="fp32", size=(64, 128), latents=True, opset=23, steps=())
    nodes = {node.op_type for node in onnx.load(done.path / "step.fp32.onnx", load_external_data=False).graph.node}
    assert "MaskedAttention" in nodes
    assert "Softmax" not in nodes


def test_times_are_those_of_the_scheduler() -> None:
    scheduler = SCMScheduler()
    for steps, times in TIMES.items():
        scheduler.set_timesteps(steps, intermediate_timesteps=1.3 if steps == 2 else None)
        np.testing.assert_allclose(times, scheduler.timesteps, atol=1e-6)


def test_without_a_decoder_there_is_an_error_that_says_what_to_give(tmp_path: Path) -> None:
    transformer().save_pretrained(tmp_path)
    assert find_family(load(tmp_path)) == "sana-sprint"
    with pytest.raises(CheckpointError, match=r"(?s)missing decoder.*--decoder.*--latents"):
        build_model(load(tmp_path))


def test_sana_itself_is_no_sana_sprint(tmp_path: Path) -> None:
    transformer(guidance_embeds=False).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="no known family"):
        build_model(load(tmp_path), BuildOptions(latents=True))
    with pytest.raises(CheckpointError, match="guidance_embeds"):
        build_model(load(tmp_path), BuildOptions(latents=True), "sana-sprint")


def test_a_size_between_latents_is_refused(folder: Path) -> None:
    with pytest.raises(InvalidArgumentError, match=r"multiples of 8 .*64x36"):
        build_model(load(folder), BuildOptions(size=(64, 36)))


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("scheduler/scheduler_config.json", {"prediction_type": "epsilon"}, "prediction_type .*'epsilon'"),
        ("scheduler/scheduler_config.json", {"sigma_data": 0}, "sigma_data .* above 0, got 0"),
        ("transformer/config.json", {"num_layers": 3}, r"do not match the config: missing: transformer_blocks\.2\."),
        ("transformer/config.json", {"out_channels": 10}, "out_channels .* 5, got 10"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused(folder: Path, tmp_path: Path, part: str, change: dict[str, Any], message: str) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(folder, changed)
    config = json.loads((changed / part).read_text())
    (changed / part).write_text(json.dumps(config | change))
    with pytest.raises(CheckpointError, match=message):
        build_model(load(changed), BuildOptions(latents=True))


def test_the_reference_takes_no_weights_of_its_own(folder: Path) -> None:
    model = build_model(load(folder), BuildOptions(latents=True, size=SIZE))
    assert model.reference is not None
    given = {name: torch.as_tensor(value) for name, value in conditioning(1, 7).items()} | {"guidance_scale": torch.ones(1)}
    noises = [torch.ones(1, *LATENT)] * 2
    before = model.reference.sample(noises, (1.5, 0.0), given)
    for parameter in model.step.parameters():
        parameter.data.zero_()
    assert not torch.equal(model.reference.sample(noises, (1.5, 0.0), given), before)
