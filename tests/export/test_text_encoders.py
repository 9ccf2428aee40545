"""Text encoders of diffusers' folders: token ids are those of transformers' tokenizers, and embeddings those of diffusers' pipelines."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import transformers
from diffusers import LatentConsistencyModelPipeline, PixArtAlphaPipeline, SanaSprintPipeline, StableDiffusionXLPipeline
from numpy.typing import NDArray
from onnxscript import ir
from safetensors.torch import load_file, save_file
from torch import Tensor

from scm_export.checkpoints import DiffusersFolder
from scm_export.errors import CheckpointError
from scm_export.families.text import clip_pair_text, clip_text, gemma_text, t5_text
from scm_export.graphs.quantize import quantize_linear_layers
from scm_export.graphs.trace import trace_text
from scm_export.model import TextEncoder
from scm_export.verification.text import text_inputs
from scm_export.writer import BundleWriter
from scm_runtime.ort.open_session import open_session
from scm_runtime.ort.session import ResultSpec
from text_encoders import gemma_instruction, save_clip, save_gemma, save_t5, strings, write_index

HIDDEN = 24
PROMPTS = ["a lighthouse at dusk", "", "  Маяк на закате, 4K 灯台 🌅 ", "many words " * 90]
INSTRUCTION = gemma_instruction()
KINDS = ("clip", "pair", "gemma", "t5", "umt5")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of each kind."""
    made = {kind: tmp_path_factory.mktemp(kind) for kind in KINDS}
    save_clip(made["clip"])
    save_clip(made["pair"], seed=1)
    save_clip(made["pair"], "_2", hidden=16, projection=20, pad_token="!", seed=2)
    save_gemma(made["gemma"])
    save_t5(made["t5"])
    save_t5(made["umt5"], umt5=True)
    clip = {"text_encoder": "CLIPTextModel", "tokenizer": "CLIPTokenizer"}
    write_index(made["clip"], "LatentConsistencyModelPipeline", **clip)
    write_index(made["pair"], "StableDiffusionXLPipeline", **clip, text_encoder_2="CLIPTextModelWithProjection", tokenizer_2="CLIPTokenizer")
    write_index(made["gemma"], "SanaSprintPipeline", text_encoder="Gemma2Model", tokenizer="GemmaTokenizerFast")
    write_index(made["t5"], "PixArtAlphaPipeline", text_encoder="T5EncoderModel", tokenizer="T5TokenizerFast")
    write_index(made["umt5"], "PixArtAlphaPipeline", text_encoder="UMT5EncoderModel", tokenizer="T5Tokenizer")
    return made


def read(kind: str, folder: Path) -> TextEncoder | None:
    opened = DiffusersFolder(folder)
    match kind:
        case "clip":
            return clip_text(opened, HIDDEN)
        case "pair":
            return clip_pair_text(opened, HIDDEN + 16, 20)
        case "gemma":
            return gemma_text(opened, HIDDEN)
        case _:
            return t5_text(opened, HIDDEN, 30, strip=True, lowercase=True)


def encoder(kind: str, folder: Path) -> TextEncoder:
    text = read(kind, folder)
    assert text is not None
    return text


def write_tokenizers(text: TextEncoder, folder: Path) -> Path:
    for name, contents in text.tokenizers.items():
        (folder / name).write_bytes(contents)
    return folder


def components(folder: Path, *names: str) -> dict[str, Any]:
    """Load components as diffusers does, by the classes in ``model_index.json``."""
    index = json.loads((folder / "model_index.json").read_text())
    return {name: getattr(transformers, index[name][1]).from_pretrained(folder / name) for name in names}


@torch.no_grad()
def by_pipeline(kind: str, folder: Path, prompts: list[str]) -> tuple[Tensor, ...]:
    """The outputs of ``encode_prompt`` of the pipeline that each kind belongs to."""
    one = ("text_encoder", "tokenizer")
    none = dict.fromkeys(("vae", "scheduler"))
    cpu = torch.device("cpu")
    pipeline: Any
    match kind:
        case "clip":
            more = {"unet": None, "safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
            pipeline = LatentConsistencyModelPipeline(**components(folder, *one), **none, **more)
            return tuple(pipeline.encode_prompt(prompts, cpu, 1, False)[:1])
        case "pair":
            pipeline = StableDiffusionXLPipeline(**components(folder, *one, "text_encoder_2", "tokenizer_2"), **none, unet=None)
            return tuple(pipeline.encode_prompt(prompts, device=cpu, do_classifier_free_guidance=False)[::2])
        case "gemma":
            pipeline = SanaSprintPipeline(**components(folder, *one), **none, transformer=None)
            return tuple(pipeline.encode_prompt(prompts, device=cpu, complex_human_instruction=INSTRUCTION))
        case _:
            pipeline = PixArtAlphaPipeline(**components(folder, *one), **none, transformer=None)
            return tuple(pipeline.encode_prompt(prompts, do_classifier_free_guidance=False, device=cpu, max_sequence_length=30)[:2])


def run(text: TextEncoder, graph: ir.Model, folder: Path) -> list[NDArray[Any]]:
    """Write a graph of the encoder to a folder, and run it for the tokenized prompts."""
    writer = BundleWriter(folder)
    writer.graph("text.onnx", graph)
    writer.close()
    inputs = text_inputs(write_tokenizers(text, folder), text.spec, PROMPTS)
    dtypes = {name: "int64" if name.endswith("mask") else "float32" for name in text.spec.outputs}
    expected = {
        name: ResultSpec(cast(Any, dtype), (None,) * (1 + (dtype == "float32" and "pooled" not in name)), "input_ids") for name, dtype in dtypes.items()
    }
    session = open_session(folder / "text.onnx")
    session.expect_all(list(inputs), expected)
    return session.run_all(inputs, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_token_ids_are_those_of_transformers_for_strings_of_many_scripts(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    text, folder = encoder(kind, folders[kind]), folders[kind]
    prompts = strings(500)
    found = text_inputs(write_tokenizers(text, tmp_path), text.spec, prompts)
    prefix = "\n".join(INSTRUCTION) if kind == "gemma" else ""
    given = prompts if kind in ("clip", "pair") else [prefix + prompt.lower().strip() for prompt in prompts]
    for suffix in ("", "_2") if kind == "pair" else ("",):
        tokenizer = components(folder, f"tokenizer{suffix}")[f"tokenizer{suffix}"]
        tokenizer.padding_side = "right"
        length = {"gemma": len(tokenizer.encode(prefix)) + 298, "clip": 77, "pair": 77}.get(kind, 30)
        expected = tokenizer(given, padding="max_length", max_length=length, truncation=True, return_tensors="np")
        np.testing.assert_array_equal(found[f"input_ids{suffix}"], expected.input_ids)
        if kind not in ("clip", "pair"):
            np.testing.assert_array_equal(found["attention_mask"], expected.attention_mask)
        assert len({tuple(row) for row in expected.input_ids.tolist()}) > 300  # the tokenizer distinguishes the strings


@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_are_those_of_the_pipeline(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    text = encoder(kind, folders[kind])
    expected = by_pipeline(kind, folders[kind], PROMPTS)
    inputs = {name: torch.from_numpy(values) for name, values in text_inputs(write_tokenizers(text, tmp_path), text.spec, PROMPTS).items()}
    found = text.network(*inputs.values())
    assert len(found) == len(text.spec.outputs) == len(expected)
    for one, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(one, wanted, atol=1e-5, rtol=1e-5, check_dtype=False)
    assert text.reference is not None
    for one, wanted in zip(text.reference(PROMPTS)[1], expected, strict=True):
        torch.testing.assert_close(one, wanted, atol=1e-5, rtol=1e-5, check_dtype=False)
    assert float(expected[0][0].std()) > 0.3


@pytest.mark.parametrize("kind", ["pair", "t5"])
def test_the_graph_returns_the_embeddings_of_the_pipeline(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    text = encoder(kind, folders[kind])
    for found, expected in zip(run(text, trace_text(text, 20), tmp_path), by_pipeline(kind, folders[kind], PROMPTS), strict=True):
        np.testing.assert_allclose(found, expected.numpy(), atol=5e-5)


def test_quantized_layers_take_fewer_bits_and_change_the_embeddings_little(folders: dict[str, Path], tmp_path: Path) -> None:
    text = encoder("clip", folders["clip"])
    text.store_as("int8", "fp16")
    traced = trace_text(text, 20)
    (expected,) = by_pipeline("clip", folders["clip"], PROMPTS)
    linear = sum(module.weight.numel() for module in text.network.modules() if isinstance(module, torch.nn.Linear))
    others = sum(parameter.numel() for parameter in text.network.parameters()) - linear
    for bits, error in ((8, 0.03), (4, 0.4)):
        graph = traced.clone()
        quantize_linear_layers(graph, bits)
        (tmp_path / str(bits)).mkdir()
        (found,) = run(text, graph, tmp_path / str(bits))
        assert error / 50 < np.abs(found - expected.numpy()).mean() / expected.abs().mean().item() < error
        size = (tmp_path / str(bits) / "weights.onnx.data").stat().st_size
        assert size < 2 * others + linear * (bits / 8 * 4 / 3 + 0.2) + 4096  # 24 inputs are padded to a block of 32, which has a scale


def test_a_folder_without_text_encoder_has_none(folders: dict[str, Path], tmp_path: Path) -> None:
    for kind in KINDS:
        assert read(kind, write_index(tmp_path, "LatentConsistencyModelPipeline")) is None


def copy(folders: dict[str, Path], kind: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folders[kind], tmp_path / "copy"))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_tokenizer_of_another_model_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = copy(folders, "clip", tmp_path)
    vocabulary = json.loads((folder / "tokenizer" / "vocab.json").read_text())
    edit(folder / "tokenizer" / "vocab.json", **{"lighthouses</w>": len(vocabulary)})
    with pytest.raises(CheckpointError, match=rf"ids up to {len(vocabulary)}, its text encoder only {len(vocabulary)} embeddings.*--no-text"):
        read("clip", folder)


def test_an_encoder_that_does_not_fit_is_refused_with_the_reason(folders: dict[str, Path], tmp_path: Path) -> None:
    opened = DiffusersFolder(folders["clip"])
    with pytest.raises(CheckpointError, match=r"returns prompt_embeds of size 24, the network takes 768.*--no-text"):
        clip_text(opened, 768)
    with pytest.raises(CheckpointError, match=r"must be a Gemma2Model, got 'CLIPTextModel'.*--no-text"):
        gemma_text(opened, HIDDEN)
    with pytest.raises(CheckpointError, match=r"has no text_encoder_2 and no tokenizer_2.*--no-text"):
        clip_pair_text(opened, HIDDEN, 8)

    folder = copy(folders, "clip", tmp_path)
    weights = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(weights)
    name = next(name for name in tensors if "fc1.weight" in name)
    save_file({**tensors, name: torch.full_like(tensors[name], torch.nan)}, weights)
    with pytest.raises(CheckpointError, match="must be finite"):
        read("clip", folder)
    save_file(tensors, weights)
    edit(folder / "text_encoder" / "config.json", num_hidden_layers=3)
    with pytest.raises(CheckpointError, match=r"missing: .*layers\.2\."):
        read("clip", folder)


@pytest.mark.parametrize("damage", [{"vocab.json": "{", "merges.txt": ""}, {"vocab.json": None}])
def test_a_damaged_tokenizer_is_refused(damage: dict[str, str | None], folders: dict[str, Path], tmp_path: Path) -> None:
    folder = copy(folders, "clip", tmp_path)
    for name, contents in damage.items():
        path = folder / "tokenizer" / name
        path.unlink()
        if contents is not None:
            path.write_text(contents)
    with pytest.raises(CheckpointError, match=r"(cannot read the tokenizer|has no vocabulary).*--no-text"):
        read("clip", folder)


def test_code_that_a_folder_names_is_not_run(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = copy(folders, "clip", tmp_path)
    for path in ("text_encoder/config.json", "tokenizer/tokenizer_config.json"):
        edit(folder / path, auto_map={"AutoModel": "evil.Model", "AutoTokenizer": ["evil.Tokenizer", None]}, _attn_implementation="org/kernel")
        (folder / path).with_name("evil.py").write_text("raise SystemExit('evil.py was run')")
    edit(folder / "text_encoder" / "config.json", attn_implementation="org/kernel", quantization_config={"quant_method": "gptq"})
    assert encoder("clip", folder).spec.tokenizers[0].max_length == 77


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlicense: openrail++\ntags:\n- text-to-image\n---\n# Model", "openrail++"),
        ('---\r\nlicense: other\r\nlicense_name: "sai-nc-community"\r\n---\r\n', "sai-nc-community"),
        ("# No front matter\nlicense: mit\n", None),
    ],
)
def test_the_licence_is_that_of_the_model_card(card: str, licence: str | None, folders: dict[str, Path], tmp_path: Path) -> None:
    folder = copy(folders, "clip", tmp_path)
    (folder / "README.md").write_bytes(card.encode())
    assert encoder("clip", folder).spec.licence == licence
