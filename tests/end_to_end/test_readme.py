"""The commands in the table of checkpoints of docs/exporting.md: each runs as written, on a small model with random weights under the name it uses."""

from __future__ import annotations

import argparse
import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from torch import nn

from edm2_networks import Precond, TrigFlowPrecond, filled
from edm2_pickles import snapshot, write_pickle
from hub_cache import add_snapshot, commit_of, files_of
from scm_export.cli import main
from scm_export.networks.edm2 import UNet, UNetConfig
from scm_runtime import Generator
from support import ROOT

pytest.importorskip("diffusers", reason="diffusers is in the export extra")
from diffusers import (
    AutoencoderKL,
    CMStochasticIterativeScheduler,
    ConsistencyModelPipeline,
    EulerDiscreteScheduler,
    LCMScheduler,
    SanaTransformer2DModel,
    SCMScheduler,
    UNet2DConditionModel,
    UNet2DModel,
)
from huggingface_hub import constants

ROW = re.compile(r"^\| .* \| `(scm-export .*)` \|$", re.MULTILINE)
COMMANDS = ROW.findall((ROOT / "docs" / "exporting.md").read_text())

FACTORY = """
from torch import Tensor, nn

class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        return self.conv(x) + level[:, None, None, None].cos()

def make() -> nn.Module:
    return Network()
"""


# ----------------------------------------------------------------------------
# What the commands name.


def own_checkpoint(here: Path, tiny: Path) -> None:
    (here / "model.pt").write_bytes(tiny.read_bytes())


def edm2_pickle(network: nn.Module, name: str) -> Callable[[Path, Path], None]:
    def make(here: Path, tiny: Path) -> None:
        write_pickle(snapshot(filled(network)), here / name)
        autoencoder(here / "stabilityai" / "sd-vae-ft-mse")

    return make


def guided_pickle(here: Path, tiny: Path) -> None:
    edm2_pickle(Precond(8, 4, 3, **EDM2), "edm2-img512-s.pkl")(here, tiny)
    write_pickle(snapshot(filled(Precond(8, 4, 3, **{**EDM2, "model_channels": 4, "channels_per_head": 4}))), here / "edm2-img512-xs.pkl")


def autoencoder(folder: Path) -> None:
    """Without attention: test_autoencoders.py has it, and each layer takes seconds to trace."""
    blocks = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}
    AutoencoderKL(**blocks, block_out_channels=(8,), norm_num_groups=4, mid_block_add_attention=False).save_pretrained(folder)


def sana_sprint(folder: Path) -> None:
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "num_cross_attention_heads": 2, "cross_attention_head_dim": 8, "cross_attention_dim": 16}
    network = SanaTransformer2DModel(in_channels=4, out_channels=4, num_layers=1, caption_channels=6, sample_size=8, guidance_embeds=True, **sizes)
    pipeline(folder, "SanaSprintPipeline", transformer=network, scheduler=SCMScheduler(prediction_type="trigflow", sigma_data=0.5))


def latent_consistency(folder: Path) -> None:
    pipeline(folder, "LatentConsistencyModelPipeline", unet=text_unet(time_cond_proj_dim=8), scheduler=LCMScheduler())


def sd_turbo(folder: Path) -> None:
    pipeline(folder, "StableDiffusionPipeline", unet=text_unet(), scheduler=EulerDiscreteScheduler(timestep_spacing="trailing"))


def text_unet(**config: Any) -> Any:
    """With attention to the text in its middle block alone: test_latent_consistency.py and test_sd_distilled.py have the other blocks."""
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    sizes = {"sample_size": 8, "block_out_channels": (8,), "layers_per_block": 1, "attention_head_dim": 2, "norm_num_groups": 4}
    return UNet2DConditionModel(**blocks, **sizes, cross_attention_dim=6, **config)


def pipeline(folder: Path, name: str, **parts: Any) -> None:
    """A pipeline's folder without its text encoder, and with a small autoencoder of the channels it needs."""
    for part, model in parts.items():
        model.save_pretrained(folder / part)
    autoencoder(folder / "vae")
    index = {part: ["diffusers", type(model).__name__] for part, model in parts.items()} | {"vae": ["diffusers", "AutoencoderKL"]}
    (folder / "model_index.json").write_text(json.dumps({"_class_name": name, **index}))


def consistency(folder: Path) -> None:
    """With one level: test_consistency.py has several."""
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    network = UNet2DModel(**blocks, sample_size=8, block_out_channels=(8,), layers_per_block=1, attention_head_dim=4, norm_num_groups=4, num_class_embeds=3)
    ConsistencyModelPipeline(network, CMStochasticIterativeScheduler()).save_pretrained(folder)


def on_the_hub(repository: str, save: Callable[[Path], None]) -> Callable[[Path, Path], None]:
    def make(here: Path, tiny: Path) -> None:
        save(here / "pushed")
        add_snapshot(Path(constants.HF_HUB_CACHE), repository, commit_of(repository), files_of(here / "pushed"), refs=("main",))

    return make


def edm2_tensors(here: Path, tiny: Path) -> None:
    config: dict[str, Any] = {"img_resolution": 8, "img_channels": 3, "label_dim": 0, "model_channels": 8, "channel_mult": [1], "num_blocks": 1}
    config |= {"attn_resolutions": [], "channels_per_head": 8}
    weights = UNet(UNetConfig(**config)).state_dict()
    save_file({**weights, "out_gain": torch.ones(())}, here / "weights.safetensors")
    (here / "edm2.toml").write_text("\n".join(['family = "edm2"', "[config]", *(f"{name} = {json.dumps(value)}" for name, value in config.items())]))


def own_network(here: Path, tiny: Path) -> None:
    (here / "my_networks.py").write_text(FACTORY)
    (here / "network.toml").write_text("[config]\nsample_shape = [3, 6, 10]\n[sampler]\nparametrisation = 'flow'\n")
    scope: dict[str, Any] = {"__name__": "my_networks"}
    exec(FACTORY, scope)
    network: nn.Module = scope["make"]().eval()
    torch.save(network.state_dict(), here / "weights.pt")
    torch.save({"model": network.state_dict(), "ema": network.state_dict(), "args": argparse.Namespace(lr=np.float64(1e-4))}, here / "training.pt")
    batch, arguments = torch.export.Dim("batch"), (torch.randn(2, 3, 6, 10), torch.rand(2))
    torch.export.save(torch.export.export(network, arguments, dynamic_shapes=({0: batch}, {0: batch})), here / "network.pt2")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # people have such files all the same
        torch.jit.trace(network, arguments).save(str(here / "network.ts"))


EDM2: dict[str, Any] = {"model_channels": 8, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": [], "channels_per_head": 8}
MAKE: dict[str, Callable[[Path, Path], None]] = {
    "model.pt": own_checkpoint,
    "edm2_scm-img512.pkl": edm2_pickle(TrigFlowPrecond(8, 4, 3, **EDM2), "edm2_scm-img512.pkl"),
    "edm2-img512-xs.pkl": edm2_pickle(Precond(8, 4, 3, **EDM2), "edm2-img512-xs.pkl"),
    "edm2-img512-s.pkl": guided_pickle,
    "Efficient-Large-Model/Sana_Sprint_1.6B_1024px_diffusers": on_the_hub("Efficient-Large-Model/Sana_Sprint_1.6B_1024px_diffusers", sana_sprint),
    "openai/diffusers-cd_imagenet64_l2": on_the_hub("openai/diffusers-cd_imagenet64_l2", consistency),
    "stabilityai/sd-turbo": on_the_hub("stabilityai/sd-turbo", sd_turbo),
    "SimianLuo/LCM_Dreamshaper_v7": on_the_hub("SimianLuo/LCM_Dreamshaper_v7", latent_consistency),
    "my-folder": lambda here, tiny: consistency(here / "my-folder"),
    "weights.safetensors": edm2_tensors,
    "weights.pt": own_network,
    "training.pt": own_network,
    "network.pt2": own_network,
    "network.ts": own_network,
}


@pytest.mark.parametrize("command", COMMANDS)
def test_the_command_makes_a_verified_bundle_that_samples(
    command: str, tiny_checkpoint: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path_factory.mktemp("hub")))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    words = command.split()[1:]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        MAKE[words[0]](tmp_path, tiny_checkpoint)
    result = CliRunner().invoke(main, [*words, "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["verification"]["cases"]
    (bundle,) = tmp_path.glob("*.scm")
    with Generator(bundle) as generate:
        text = {
            item.name: np.ones([size if isinstance(size, int) else 7 for size in item.shape])
            for item in generate.manifest.conditioning
            if item.kind == "embedding"
        }
        images = generate(seed=0, batch_size=2, conditioning=text, output_type="np", num_inference_steps=min(map(int, generate.manifest.times))).array
    assert images.dtype == np.uint8
    assert images.std() > 1


def test_every_row_has_its_command() -> None:
    assert [command.split()[1] for command in COMMANDS] == list(MAKE)


def test_the_commands_of_the_readme_are_among_them() -> None:
    commands = ROW.findall((ROOT / "README.md").read_text())
    assert len(commands) > 5
    assert set(commands) <= set(COMMANDS)
