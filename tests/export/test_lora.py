"""LoRA files: every layout against diffusers' names and the formula of low-rank layers, through an export, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from scm_export.lora import TEXT_ENCODER, TEXT_ENCODER_2, Component, merge_loras, open_lora

pytest.importorskip("diffusers", reason="diffusers is in the test extra")
pytest.importorskip("transformers", reason="transformers is in the test extra")
from diffusers import UNet2DConditionModel
from diffusers.loaders import StableDiffusionXLLoraLoaderMixin
from diffusers.utils.state_dict_utils import convert_state_dict_to_diffusers, convert_state_dict_to_peft, convert_unet_state_dict_to_peft
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

RANK, TEXT = 3, 24
Weights = dict[str, Tensor]


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


def factors(network: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
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
def with_low_rank_layers(network: nn.Module, pairs: dict[str, tuple[Tensor, Tensor]], scale: float) -> Iterator[None]:
    """Within the block, the layers of a network compute ``y + scale * up(down(x))``: a LoRA that is not merged."""

    def hook(layer: Any, args: tuple[Tensor, ...], y: Tensor, down: Tensor, up: Tensor) -> Tensor:
        if isinstance(layer, nn.Conv2d):
            return y + scale * nn.functional.conv2d(nn.functional.conv2d(args[0], down, None, layer.stride, layer.padding), up)
        return y + scale * nn.functional.linear(nn.functional.linear(args[0], down), up)

    hooks = [network.get_submodule(name).register_forward_hook(lambda layer, args, y, pair=pair: hook(layer, args, y, *pair)) for name, pair in pairs.items()]
    yield
    for one in hooks:
        one.remove()


def kohya(pairs: dict[str, tuple[Tensor, Tensor]], prefix: str = "lora_unet_", alpha: float | None = None) -> Weights:
    weights = {}
    for name, (down, up) in pairs.items():
        base = prefix + name.replace(".", "_")
        weights |= {f"{base}.lora_down.weight": down, f"{base}.lora_up.weight": up} | ({} if alpha is None else {f"{base}.alpha": torch.tensor(alpha)})
    return weights


def dotted(pairs: dict[str, tuple[Tensor, Tensor]], prefix: str, down_name: str = "lora_A", up_name: str = "lora_B") -> Weights:
    return {f"{prefix}{name}.{kind}.weight": part for name, pair in pairs.items() for kind, part in zip((down_name, up_name), pair, strict=True)}


def old_attention(pairs: dict[str, tuple[Tensor, Tensor]]) -> Weights:
    """The layout of attention processors, which had LoRA layers of their own."""
    weights = {}
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


def attention_only(pairs: dict[str, tuple[Tensor, Tensor]]) -> dict[str, tuple[Tensor, Tensor]]:
    return {name: pair for name, pair in pairs.items() if ".attn" in name}


# In kohya's layout alpha is in the file. The others have the alpha of PEFT's configuration, or the rank.
LAYOUTS: dict[str, tuple[Callable[[dict[str, tuple[Tensor, Tensor]]], Weights], dict[str, str] | None, float]] = {
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


def by_formula(network: nn.Module, state: Weights, alphas: dict[str, float] | None, scale: float) -> Weights:
    """Weights of a network after ``W + scale * alpha / rank * B A``, from tensors under PEFT's names."""
    weights = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    for name, down in state.items():
        if ".lora_A" in name:
            layer, up = name.partition(".lora_A")[0], state[name.replace("lora_A", "lora_B")]
            alpha = down.shape[0] if alphas is None else alphas[layer]
            weights[f"{layer}.weight"] += scale * alpha / down.shape[0] * torch.einsum("or,r...->o...", up.flatten(1), down)
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
    expected = by_formula(unet, converted, dict.fromkeys(layers.values(), 2.0), 1.0)
    found = merged(unet, saved(tmp_path / "sdxl.safetensors", weights)).state_dict()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, msg=name)


@pytest.mark.parametrize("layout", ["kohya", "diffusers", "diffusers before PEFT", "attention processors"])
def test_the_layers_of_text_encoders_are_found(layout: str, tmp_path: Path) -> None:
    config = CLIPTextConfig(
        vocab_size=50, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2, projection_dim=6, bos_token_id=1, eos_token_id=2
    )
    torch.manual_seed(0)
    first, second = CLIPTextModel(config).eval(), CLIPTextModelWithProjection(config).eval()
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
        for name in [name for name in peft if name not in encoder.state_dict() and component == TEXT_ENCODER]:
            peft[name.removeprefix("text_model.")] = peft.pop(name)
        expected = by_formula(encoder, peft, None, factor)
        assert any(not torch.equal(tensor, encoder.state_dict()[name]) for name, tensor in expected.items())
        found = merged(encoder, file, component=component).state_dict()
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, msg=name)


# ----------------------------------------------------------------------------
# Through an export.


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A latent consistency model with random weights."""
    path = tmp_path_factory.mktemp("lcm") / "lcm"
    random_unet(mid_block_type=None).save_pretrained(path / "unet")
    LCMScheduler(prediction_type="v_prediction").save_pretrained(path / "scheduler")
    index = {"_class_name": "LatentConsistencyModelPipeline", "unet": ["diffusers", "UNet2DConditionModel"], "scheduler": ["diffusers", "LCMScheduler"]}
    (path / "model_index.json").write_text(json.dumps(index))
    return path


@pytest.fixture(scope="module")
def pairs(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    return factors(UNet2DConditionModel.from_pretrained(folder / "unet", low_cpu_mem_usage=False))


@pytest.fixture(scope="module")
def file(pairs: dict[str, tuple[Tensor, Tensor]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file in kohya's layout, in half precision, with a layer for a text encoder."""
    path = tmp_path_factory.mktemp("lora") / "style.safetensors"
    text = {"text_model.encoder.layers.0.self_attn.q_proj": (torch.ones(RANK, 8), torch.ones(8, RANK))}
    weights = kohya(pairs, alpha=1.5) | kohya(text, "lora_te_", alpha=1.5)
    return saved(path, {name: tensor.half() for name, tensor in weights.items()})


def test_a_bundle_with_loras_equals_the_network_with_low_rank_layers(
    folder: Path, file: Path, pairs: dict[str, tuple[Tensor, Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    original = weights.read_bytes()
    second = saved(tmp_path / "second.safetensors", dotted(attention_only(pairs), "unet."))
    given = ["--lora", f"{file}:0.8", "--lora", str(second), "--lora", f"{second}:-0.5"]
    out = tmp_path / "lcm.scm"
    result = CliRunner().invoke(cli.main, [str(folder), "-o", str(out), "--latents", "--dtype", "fp32", "--steps", "", *given])
    assert result.exit_code == 0, result.output
    assert "the 1 layers that the LoRA 'style.safetensors' has for the text encoder were left out" in " ".join(result.output.split())
    assert weights.read_bytes() == original

    source = json.loads((out / "scm.json").read_text())["source"]
    assert [(lora["file"], lora["scale"]) for lora in source["loras"]] == [(file.name, 0.8), ("second.safetensors", 1.0), ("second.safetensors", -0.5)]
    shown = CliRunner().invoke(runtime_cli.main, ["inspect", str(out)]).output
    assert "style.safetensors × 0.8" in shown
    assert "second.safetensors × -0.5" in shown

    unet = UNet2DConditionModel.from_pretrained(folder / "unet", low_cpu_mem_usage=False).eval()
    text, seeds = torch.randn(2, 5, TEXT), [3, 4]
    with Generator(out) as generate:
        arguments: dict[str, Any] = {"prompt_embeds": text.numpy(), "guidance_scale": 1.0, "num_inference_steps": 1, "seed": seeds}
        x = generate(**arguments).array
        states = generate.noise(seeds) if hasattr(generate, "noise") else None
    del states
    scheduler = LCMScheduler.from_pretrained(folder / "scheduler")
    scheduler.set_timesteps(1)
    from scm_export import ops

    noise = ops.philox_normal(torch.tensor(seeds), 0, (4, 4, 6))
    half = {name: (down.half().float(), up.half().float()) for name, (down, up) in pairs.items()}
    with torch.no_grad(), with_low_rank_layers(unet, half, 0.8 * 0.5), with_low_rank_layers(unet, attention_only(pairs), 0.5):
        w = torch.cat([torch.zeros(2, 4), torch.ones(2, 4)], dim=1)  # the embedding of a guidance scale of 1
        y = unet(noise, scheduler.timesteps[0], encoder_hidden_states=text, timestep_cond=w).sample
    expected = scheduler.step(y, scheduler.timesteps[0], noise).denoised
    np.testing.assert_allclose(x, expected.numpy(), atol=1e-4)
