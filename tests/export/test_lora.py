"""LoRA files: every layout against diffusers' names and the formula of low-rank layers, through an export, and what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from scm_export import cli, export, ops
from scm_export.checkpoints import load
from scm_export.errors import CheckpointError, CheckpointNotFoundError
from scm_export.families import BuildOptions, build_model
from scm_export.lora import TEXT_ENCODER, TEXT_ENCODER_2, Component, merge_loras, open_lora
from scm_runtime import Generator
from scm_runtime import cli as runtime_cli
from scm_runtime.errors import InvalidArgumentError

pytest.importorskip("diffusers", reason="diffusers is in the test extra")
pytest.importorskip("transformers", reason="transformers is in the test extra")
from diffusers import LCMScheduler, SanaTransformer2DModel, UNet2DConditionModel, UNet2DModel
from diffusers.loaders import StableDiffusionXLLoraLoaderMixin
from diffusers.utils.state_dict_utils import convert_state_dict_to_diffusers, convert_state_dict_to_peft, convert_unet_state_dict_to_peft
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

RANK, TEXT = 3, 24
Weights = dict[str, Tensor]
Pairs = dict[str, tuple[Tensor, Tensor]]


def random_unet(**config: Any) -> UNet2DConditionModel:
    """A U-Net with attention on one of two levels, or as ``config`` changes it."""
    small: dict[str, Any] = {
        "sample_size": (4, 6),
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": 2,
        "norm_num_groups": 4,
        "cross_attention_dim": TEXT,
        "time_cond_proj_dim": 8,
    }
    torch.manual_seed(0)
    return UNet2DConditionModel(**(small | config)).eval().requires_grad_(False)


def layers_of(network: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    return {name: module for name, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}


def factors(network: nn.Module) -> Pairs:
    """Random factors for every layer of a network, by its name: down and up, as PEFT makes them."""
    random = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random) * 0.2

    pairs = {}
    for name, layer in layers_of(network).items():
        out, inner, *kernel = layer.weight.shape
        pairs[name] = (draw(RANK, inner, *kernel), draw(out, RANK, *(1 for _ in kernel)))
    return pairs


@contextmanager
def with_low_rank_layers(network: nn.Module, pairs: Pairs, scale: float) -> Iterator[None]:
    """Within the block, the layers of a network compute ``y + scale * up(down(x))``: a LoRA that is not merged."""

    def hook(layer: Any, args: tuple[Tensor, ...], y: Tensor, down: Tensor, up: Tensor) -> Tensor:
        if isinstance(layer, nn.Conv2d):
            return y + scale * nn.functional.conv2d(nn.functional.conv2d(args[0], down, None, layer.stride, layer.padding), up)
        return y + scale * nn.functional.linear(nn.functional.linear(args[0], down), up)

    hooks = [network.get_submodule(name).register_forward_hook(lambda layer, args, y, pair=pair: hook(layer, args, y, *pair)) for name, pair in pairs.items()]
    yield
    for one in hooks:
        one.remove()


def kohya(pairs: Pairs, prefix: str = "lora_unet_", alpha: float | None = None) -> Weights:
    weights: Weights = {}
    for name, (down, up) in pairs.items():
        base = prefix + name.replace(".", "_")
        weights |= {f"{base}.lora_down.weight": down, f"{base}.lora_up.weight": up} | ({} if alpha is None else {f"{base}.alpha": torch.tensor(alpha)})
    return weights


def dotted(pairs: Pairs, prefix: str, down_name: str = "lora_A", up_name: str = "lora_B") -> Weights:
    return {f"{prefix}{name}.{kind}.weight": part for name, pair in pairs.items() for kind, part in zip((down_name, up_name), pair, strict=True)}


def old_attention(pairs: Pairs) -> Weights:
    """The layout of attention processors, which had LoRA layers of their own."""
    weights: Weights = {}
    for name, (down, up) in pairs.items():
        block, layer = name.split(".to_")
        weights |= {f"unet.{block}.processor.to_{layer.removesuffix('.0')}_lora.{kind}.weight": part for kind, part in (("down", down), ("up", up))}
    return weights


def saved(path: Path, weights: Weights, metadata: dict[str, str] | None = None) -> Path:
    save_file({name: tensor.clone() for name, tensor in weights.items()}, path, metadata)
    return path


def merged(network: nn.Module, *files: str | Path, component: Component = "denoiser") -> nn.Module:
    loras = [open_lora(file) for file in files]
    merge_loras(loras, network, component)
    assert all(lora.merged == {component} for lora in loras)
    return network


def attention_only(pairs: Pairs) -> Pairs:
    return {name: pair for name, pair in pairs.items() if ".attn" in name}


# In kohya's layout alpha is in the file. The others have the alpha of PEFT's configuration, or the rank.
LAYOUTS: dict[str, tuple[Callable[[Pairs], Weights], dict[str, str] | None, float]] = {
    "kohya": (lambda pairs: kohya(pairs, alpha=1.5), None, 0.5),
    "diffusers": (lambda pairs: dotted(pairs, "unet."), None, 1.0),
    "diffusers with metadata": (lambda pairs: dotted(pairs, "unet."), {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 6, "unet.r": RANK})}, 2.0),
    "diffusers before PEFT": (lambda pairs: dotted(pairs, "unet.", "lora.down", "lora.up"), None, 1.0),
    "PEFT with an adapter's name": (lambda pairs: dotted(pairs, "base_model.model.", "lora_A.default", "lora_B.default"), None, 1.0),
    "attention processors": (lambda pairs: old_attention(attention_only(pairs)), None, 1.0),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_merged_network_computes_what_low_rank_layers_add(layout: str, tmp_path: Path) -> None:
    write, metadata, factor = LAYOUTS[layout]
    unet = random_unet()
    pairs = factors(unet)
    file = saved(tmp_path / "a.safetensors", write(pairs), metadata)
    inputs = (torch.randn(2, 4, 4, 6), torch.tensor([981.0, 20.0]), torch.randn(2, 5, TEXT))
    conditioning = {"timestep_cond": torch.randn(2, 8)}
    pairs = attention_only(pairs) if layout == "attention processors" else pairs
    before = unet(*inputs, **conditioning).sample
    with with_low_rank_layers(unet, pairs, 0.7 * factor):
        expected = unet(*inputs, **conditioning).sample
    found = merged(unet, f"{file}:0.7")(*inputs, **conditioning).sample
    assert (expected - before).abs().max() > 0.01
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def by_formula(network: nn.Module, state: Weights, factor: float = 1.0) -> Weights:
    """Weights of a network after ``W + factor * B A``, from tensors under PEFT's names."""
    weights = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    for name, down in state.items():
        if ".lora_A" in name:
            up = state[name.replace("lora_A", "lora_B")]
            weights[f"{name.partition('.lora_A')[0]}.weight"] += factor * torch.einsum("or,r...->o...", up.flatten(1), down)
    return weights


def test_names_of_the_original_code_are_those_that_diffusers_reads(tmp_path: Path) -> None:
    """kohya's files for SDXL name the layers as the original code does."""
    unet = random_unet(
        block_out_channels=(4, 8, 8),
        layers_per_block=2,
        norm_num_groups=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=32,
        time_cond_proj_dim=None,
    )
    layers = {  # of a file for SDXL: one of each kind, and the first and last block of each level
        "input_blocks_0_0": "conv_in",
        "out_2": "conv_out",
        "time_embed_0": "time_embedding.linear_1",
        "time_embed_2": "time_embedding.linear_2",
        "label_emb_0_0": "add_embedding.linear_1",
        "label_emb_0_2": "add_embedding.linear_2",
        "input_blocks_1_0_in_layers_2": "down_blocks.0.resnets.0.conv1",
        "input_blocks_3_0_op": "down_blocks.0.downsamplers.0.conv",
        "input_blocks_4_0_skip_connection": "down_blocks.1.resnets.0.conv_shortcut",
        "input_blocks_5_0_emb_layers_1": "down_blocks.1.resnets.1.time_emb_proj",
        "input_blocks_5_1_proj_in": "down_blocks.1.attentions.1.proj_in",
        "input_blocks_8_1_transformer_blocks_0_attn2_to_k": "down_blocks.2.attentions.1.transformer_blocks.0.attn2.to_k",
        "middle_block_0_out_layers_3": "mid_block.resnets.0.conv2",
        "middle_block_1_transformer_blocks_0_ff_net_0_proj": "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj",
        "middle_block_2_in_layers_2": "mid_block.resnets.1.conv1",
        "output_blocks_2_1_transformer_blocks_0_attn1_to_out_0": "up_blocks.0.attentions.2.transformer_blocks.0.attn1.to_out.0",
        "output_blocks_2_2_conv": "up_blocks.0.upsamplers.0.conv",
        "output_blocks_3_0_in_layers_2": "up_blocks.1.resnets.0.conv1",
        "output_blocks_5_2_conv": "up_blocks.1.upsamplers.0.conv",
        "output_blocks_8_0_out_layers_3": "up_blocks.2.resnets.2.conv2",
    }
    pairs = factors(unet)
    weights = kohya({original: pairs[name] for original, name in layers.items()}, alpha=2.0)
    state, alphas = StableDiffusionXLLoraLoaderMixin.lora_state_dict(dict(weights), unet_config=unet.config)
    converted = {name.removeprefix("unet."): tensor for name, tensor in convert_unet_state_dict_to_peft(state).items()}
    assert {name.partition(".lora_")[0] for name in converted} == set(layers.values())
    assert set(alphas.values()) == {2.0}
    expected = by_formula(unet, converted, 2 / RANK)
    found = merged(unet, saved(tmp_path / "sdxl.safetensors", weights)).state_dict()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, msg=name)


@pytest.mark.parametrize("layout", ["kohya", "diffusers", "diffusers before PEFT", "attention processors"])
def test_the_layers_of_text_encoders_are_found(layout: str, tmp_path: Path) -> None:
    config = CLIPTextConfig(
        vocab_size=50, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2, projection_dim=6, bos_token_id=1, eos_token_id=2
    )
    torch.manual_seed(0)
    first, second = CLIPTextModel(config), CLIPTextModelWithProjection(config)
    # Files have the names of transformers before version 5, where the model of the first encoder was in text_model, too.
    named = {f"text_model.{name}" if not name.startswith("text_model.") else name: pair for name, pair in factors(first).items()}
    attention = {name: pair for name, pair in named.items() if "self_attn" in name}
    projection = {"text_projection": factors(second)["text_projection"]}
    match layout:
        case "kohya":
            weights = kohya(named, "lora_te1_", alpha=1.5) | kohya(named | projection, "lora_te2_", alpha=1.5)
            state, alphas = StableDiffusionXLLoraLoaderMixin.lora_state_dict(dict(weights))
            assert set(alphas.values()) == {1.5}
        case "attention processors":
            old = {name.replace("_proj", "").replace("self_attn.", "self_attn.to_"): pair for name, pair in attention.items()}
            weights = {
                f"{encoder}.{name}_lora.{kind}.weight": part
                for encoder in ("text_encoder", "text_encoder_2")
                for name, pair in old.items()
                for kind, part in zip(("down", "up"), pair, strict=True)
            }
            state = dict(weights)
        case _:
            kinds = ("lora_A", "lora_B") if layout == "diffusers" else ("lora_linear_layer.down", "lora_linear_layer.up")
            weights = dotted(named, "text_encoder.", *kinds) | dotted(named, "text_encoder_2.", *kinds)
            state = dict(weights)
    factor = 0.5 if layout == "kohya" else 1.0
    file = saved(tmp_path / "text.safetensors", weights)
    components: list[tuple[Component, nn.Module]] = [(TEXT_ENCODER, first), (TEXT_ENCODER_2, second)]
    for component, encoder in components:
        own = {name.removeprefix(f"{component}."): tensor for name, tensor in state.items() if name.startswith(f"{component}.")}
        peft = own if layout == "diffusers" else convert_state_dict_to_peft(convert_state_dict_to_diffusers(own))
        if not hasattr(encoder, "text_model"):
            peft = {name.removeprefix("text_model."): tensor for name, tensor in peft.items()}
        expected = by_formula(encoder, peft, factor)
        assert any(not torch.equal(tensor, encoder.state_dict()[name]) for name, tensor in expected.items())
        found = merged(encoder, file, component=component).state_dict()
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, msg=name)


# ----------------------------------------------------------------------------
# Through an export.


def write_index(folder: Path, pipeline: str, **components: str) -> Path:
    index = {"_class_name": pipeline, **{name: ["diffusers", kind] for name, kind in components.items()}}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A latent consistency model with random weights and one level."""
    path = tmp_path_factory.mktemp("lcm") / "lcm"
    blocks = {"block_out_channels": (8,), "down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    random_unet(mid_block_type=None, **blocks).save_pretrained(path / "unet")
    LCMScheduler(prediction_type="v_prediction").save_pretrained(path / "scheduler")
    return write_index(path, "LatentConsistencyModelPipeline", unet="UNet2DConditionModel", scheduler="LCMScheduler")


def diffusers_unet(folder: Path) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(folder / "unet", low_cpu_mem_usage=False).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def pairs(folder: Path) -> Pairs:
    return {name: (down.half().float(), up.half().float()) for name, (down, up) in factors(diffusers_unet(folder)).items()}


@pytest.fixture(scope="module")
def file(pairs: Pairs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file in kohya's layout, in half precision, with a layer for a text encoder."""
    text = {"text_model.encoder.layers.0.self_attn.q_proj": (torch.ones(RANK, 8), torch.ones(8, RANK))}
    weights = kohya(pairs, alpha=1.5) | kohya(text, "lora_te_", alpha=1.5)
    return saved(tmp_path_factory.mktemp("lora") / "style.safetensors", {name: tensor.half() for name, tensor in weights.items()})


def test_a_bundle_computes_what_low_rank_layers_add_to_diffusers_network(
    folder: Path, file: Path, pairs: Pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    original, out = weights.read_bytes(), tmp_path / "lcm.scm"
    second = tmp_path / "second.pt"
    torch.save(dotted(attention_only(pairs), "unet."), second)
    given = ["--lora", f"{file}:0.8", "--lora", str(second), "--lora", f"{second}:-0.5"]
    result = CliRunner().invoke(cli.main, [str(folder), "-o", str(out), "--latents", "--dtype", "fp32", "--steps", "", "--no-verify", *given])
    assert result.exit_code == 0, result.output
    assert "the LoRA 'style.safetensors' also has 1 layer for the text encoder, which this bundle does not have" in result.output
    assert weights.read_bytes() == original

    source = json.loads((out / "scm.json").read_text())["source"]
    assert [(lora["file"], lora["scale"]) for lora in source["loras"]] == [(file.name, 0.8), ("second.pt", 1.0), ("second.pt", -0.5)]
    shown = CliRunner().invoke(runtime_cli.main, ["inspect", str(out)]).output
    assert "style.safetensors × 0.8" in shown
    assert "second.pt × -0.5" in shown

    text, seeds = torch.randn(2, 5, TEXT), [3, 4]
    with Generator(out) as generate:
        found = generate(prompt_embeds=text.numpy(), guidance_scale=1.0, num_inference_steps=1, seed=seeds).array
    unet, scheduler = diffusers_unet(folder), LCMScheduler.from_pretrained(folder / "scheduler")
    scheduler.set_timesteps(1)
    x, t = ops.philox_normal(torch.tensor(seeds), 0, (4, 4, 6)), scheduler.timesteps[0]
    w = torch.cat([torch.zeros(2, 4), torch.ones(2, 4)], dim=1)  # the embedding of a guidance scale of 1
    plain = unet(x, t, encoder_hidden_states=text, timestep_cond=w).sample
    with with_low_rank_layers(unet, pairs, 0.8 * 0.5), with_low_rank_layers(unet, attention_only(pairs), 0.5):
        y = unet(x, t, encoder_hidden_states=text, timestep_cond=w).sample
    assert (y - plain).abs().max() > 0.1
    np.testing.assert_allclose(found, scheduler.step(y, t, x).denoised.numpy(), atol=1e-4)


def test_the_networks_of_other_families_are_changed_too(tmp_path: Path) -> None:
    sana = {"in_channels": 4, "out_channels": 4, "num_layers": 1, "attention_head_dim": 4, "num_attention_heads": 2, "num_cross_attention_heads": 2}
    sana |= {"cross_attention_head_dim": 4, "cross_attention_dim": 8, "caption_channels": TEXT, "sample_size": 4, "patch_size": 1}
    blocks = {"block_out_channels": (4,), "down_block_types": ("AttnDownBlock2D",), "up_block_types": ("AttnUpBlock2D",)}
    torch.manual_seed(0)
    networks: list[tuple[str, str, Any]] = [
        ("SanaSprintPipeline", "transformer", SanaTransformer2DModel(**sana, guidance_embeds=True, qk_norm="rms_norm_across_heads")),
        ("ConsistencyModelPipeline", "unet", UNet2DModel(sample_size=8, layers_per_block=1, norm_num_groups=2, attention_head_dim=2, **blocks)),
    ]
    for pipeline, component, network in networks:
        folder = tmp_path / component
        network.save_pretrained(folder / component)
        write_index(folder, pipeline, **{component: type(network).__name__})
        state = dotted({name: pair for name, pair in factors(network).items() if "conv_depth" not in name}, "")
        file = saved(tmp_path / f"{component}.safetensors", {f"{component}.{name}": tensor for name, tensor in state.items()})
        model = build_model(load(folder), BuildOptions(loras=(open_lora(file),), latents=True))
        found = dict(model.step.named_parameters())
        for name, expected in by_formula(network, state).items():
            (own,) = (parameter for key, parameter in found.items() if key.endswith(f"network.{name}"))
            torch.testing.assert_close(own.data, expected, msg=name)


# ----------------------------------------------------------------------------
# What is refused.


def test_files_that_do_not_fit_are_refused_with_what_is_wrong(folder: Path, pairs: Pairs, tmp_path: Path) -> None:
    name, (down, up) = next((name, pair) for name, pair in pairs.items() if name.endswith("attn1.to_q"))
    good = dotted({name: (down, up)}, "unet.")
    a, b = good
    other = dotted({"single_transformer_blocks.0.proj_mlp": (down, up)}, "transformer.")
    wrong: list[tuple[Weights, str]] = [
        (
            good | {"unet.down_blocks.7.conv.lora_A.weight": down, "unet.down_blocks.7.conv.lora_B.weight": up},
            "'unet.down_blocks.7.conv.lora_A.weight'.*nearest",
        ),
        (other, "is for another model: none of its 1 layers is in the network"),
        (dotted({name: (down[:, :4], up)}, "unet."), rf"is for a weight of \[8, 4\], and '{name}' of the network has \[8, 8\]"),
        (dotted({name: (down[:1], up)}, "unet."), r"must have one rank, got 1 in \[1, 8\] and 3 in \[8, 3\]"),
        ({a: down}, r"must have two factors, missing lora_B"),
        ({a: down, b: up * math.nan}, "must be finite, got NaN or infinity in 'unet.*lora_B.weight'"),
        ({a: down.abs() * 100, b: torch.full_like(up, 3e38)}, "makes weights infinite"),
        ({a: down.int(), b: up.int()}, "must be of a floating dtype, got torch.int32"),
        (good | {f"unet.{name}.alpha": torch.ones(2)}, r"must have one number as alpha, got \[2\]"),
        (good | dotted({name: (down, up)}, "unet.", "lora.down", "lora.up"), "has two tensors for one factor"),
        (good | kohya({name.replace(".", "_"): (down, up)}), "changes the layer .* twice"),
        (good | {f"unet.{name}.lora_magnitude_vector": torch.ones(8)}, "belongs to DoRA, which is not supported"),
        ({f"lora_unet_{name.replace('.', '_')}.hada_w1_a": down}, "LoHa, LoKr.* are not supported"),
        ({"emb_params": down}, "'emb_params' .* is not a name in the layouts of kohya, PEFT or diffusers"),
        ({}, "has no tensors"),
    ]
    for i, (weights, message) in enumerate(wrong):
        file = saved(tmp_path / f"{i}.safetensors", weights)
        with pytest.raises(CheckpointError, match=message):
            merge_loras([open_lora(file)], diffusers_unet(folder))
    torch.save({a: "text"}, tmp_path / "text.pt")
    (tmp_path / "broken.safetensors").write_bytes((tmp_path / "0.safetensors").read_bytes()[:200])
    unreadable = {
        "none.safetensors": "the file does not exist",
        "": "it is a folder",
        "text.pt": "must hold tensors",
        "broken.safetensors": "is not a readable",
    }
    for path, message in unreadable.items():
        with pytest.raises(CheckpointNotFoundError if path.startswith("none") else CheckpointError, match=message):
            open_lora(tmp_path / path)


def test_options_that_do_not_fit_are_refused_before_anything_is_written(folder: Path, file: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.scm"
    for scale in ("much", "", "nan", "inf"):
        with pytest.raises(InvalidArgumentError, match=rf"lora must be FILE or FILE:SCALE, .* got '.*:{scale}'"):
            export(folder, out, lora=[f"{file}:{scale}"], latents=True)
    with pytest.raises(InvalidArgumentError, match="lora must be a list of files"):
        export(folder, out, lora=str(file))
    with pytest.raises(InvalidArgumentError, match="the family edm2 takes none, only"):
        export(tiny_checkpoint, out, lora=[file])
    text_only = saved(tmp_path / "text.safetensors", {name: tensor for name, tensor in load_file(file).items() if name.startswith("lora_te_")})
    with pytest.raises(CheckpointError, match="only has layers for the text encoder, which this bundle does not have"):
        export(folder, out, lora=[text_only], latents=True)
    result = CliRunner().invoke(cli.main, [str(folder), "-o", str(out), "--latents", "--lora", "none.safetensors"])
    assert result.exit_code == 2
    assert "no LoRA at 'none.safetensors': the file does not exist" in " ".join(result.output.split())
    assert "Traceback" not in result.output
    assert not out.exists()


def test_the_alpha_of_peft_is_in_the_file_beside(folder: Path, pairs: Pairs, tmp_path: Path) -> None:
    names = [name for name in pairs if name.endswith(("to_q", "to_k"))]
    state = dotted({name: pairs[name] for name in names}, "base_model.model.")
    file = saved(tmp_path / "adapter_model.safetensors", state)
    assert any("adapter_config.json is not beside" in note for note in open_lora(file).notes)
    config = {"r": RANK, "lora_alpha": 6, "use_rslora": True, "alpha_pattern": {"attn2.to_k": 12}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    lora, unet = open_lora(file), diffusers_unet(folder)
    assert lora.notes == ()
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    merge_loras([lora], unet)
    for name in names:
        down, up = pairs[name]
        alpha = 12 if name.endswith("attn2.to_k") else 6
        torch.testing.assert_close(unet.get_submodule(name).weight, before[f"{name}.weight"] + alpha / math.sqrt(RANK) * up @ down)
    for wrong, message in ({"lora_alpha": "big"}, "lora_alpha must be a number"), ({"lora_alpha": 1, "use_dora": True}, "DoRA is not supported"):
        (tmp_path / "adapter_config.json").write_text(json.dumps(wrong))
        with pytest.raises(CheckpointError, match=message):
            open_lora(file)
