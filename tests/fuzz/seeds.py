"""Valid files of every kind that this project reads, and how each is read. The files are small: their contents are described in seconds of thousands."""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from safetensors.torch import save_file

import scm_runtime
from conftest import write_tiny_checkpoint
from edm2_networks import TrigFlowPrecond
from edm2_pickles import snapshot, write_pickle
from own_networks import SHAPE, Plain, own
from scm_export import Options, plan
from scm_export.checkpoints import load, load_checkpoint, save_checkpoint
from scm_export.samplers import make_tables, to_json
from scm_runtime.bench.result import BundleFacts, Cell, MachinePeak, Memory, ModelCost, Result, read_result
from scm_runtime.bundle.manifest import read_manifest
from scm_runtime.bundle.solver_tables import SolverTables
from scm_runtime.cache.graph_cache import CHECKSUMS, ENTRY, GRAPH, GRAPHS, CachedFile, Entry, GraphCache
from scm_runtime.cli.embeddings import read_embeddings

EMBEDDED = Path(scm_runtime.__file__).parent / "bundles" / "digits.scm"
ENTRY_PATH = f"cache/{GRAPHS}/key/{ENTRY}"

CONFIG = """
family = "module"
licence = "Apache-2.0"

[config]
sample_shape = [3, 10, 14]
keep_fp32 = ["time_embed"]

[sampler]
parametrisation = "trigflow"
sigma_data = 0.5
times = { 1 = [1.5, 0], 2 = [1.5, 1.1, 0] }
pixel_scale = 127.5

[[conditioning]]
name = "class_labels"
kind = "class"
num_classes = 5
label_names = ["ant", "bee", "cat", "dog", "eel"]

[[conditioning]]
name = "guidance"
kind = "scalar"
default = 4.5

[[conditioning]]
name = "text"
kind = "embedding"
shape = ["tokens", 8]

[[conditioning]]
name = "text_mask"
kind = "mask"
shape = ["tokens"]
"""


@dataclass(frozen=True)
class Target:
    """Files that a reader reads, and the reader."""

    name: str
    folder: Path
    read: Callable[[Path], object]
    """Called with the folder; it must return, or raise an ScmError."""
    mutable: tuple[str, ...]
    """Files that are changed, relative to the folder."""
    writes: bool = False
    """Whether the reader may write files: a cache removes damaged entries."""


def planned(name: str, **options: Any) -> Callable[[Path], object]:
    """Read a checkpoint and build its model, as ``scm-export --dry-run`` does."""

    def read(folder: Path) -> object:
        given = {key: folder / value if key == "config" else value for key, value in options.items()}
        return plan(folder / name, folder / "never.scm", Options(verify=False, latents=True, **given))

    return read


def loaded(name: str, **options: Any) -> Callable[[Path], object]:
    return lambda folder: load(folder / name, config=folder / "config.json", **options)


def make_targets(folder: Path) -> list[Target]:
    """Write the files below a folder."""
    torch.manual_seed(0)
    targets: list[Target] = []

    def add(name: str, files: Callable[[Path], object], read: Callable[[Path], object], *mutable: str, writes: bool = False) -> None:
        place = folder / name.replace(" ", "-")
        place.mkdir(parents=True)
        (place / "config.json").write_text(json.dumps({"config": {"sample_shape": SHAPE}}))
        files(place)
        targets.append(Target(name, place, read, mutable, writes))

    tiny = write_tiny_checkpoint(folder / "tiny.pt", channel_mult=(1,), model_channels=4, channels_per_head=4)
    bare = Plain().state_dict()
    add("scm-checkpoint pt", lambda to: shutil.copy(tiny, to / "net.pt"), _edm2("net.pt"), "net.pt")
    add("scm-checkpoint safetensors", lambda to: save_checkpoint(load_checkpoint(tiny), to / "net.safetensors"), _edm2("net.safetensors"), "net.safetensors")
    training = {"epoch": 3, "state_dict": bare, "ema": dict(bare), "optimizer": {"state": {0: {"step": 1}}, "param_groups": [{"lr": 0.1}]}}
    add("training checkpoint", lambda to: torch.save(training, to / "net.ckpt"), loaded("net.ckpt", factory="own_networks:plain"), "net.ckpt")
    add(
        "legacy pt",
        lambda to: torch.save(bare, to / "net.pt", _use_new_zipfile_serialization=False),
        loaded("net.pt", factory="own_networks:plain"),
        "net.pt",
    )
    add("bare safetensors", lambda to: save_file(bare, to / "net.safetensors"), loaded("net.safetensors", factory="own_networks:plain"), "net.safetensors")
    network = TrigFlowPrecond(8, 3, 0, model_channels=8, channel_mult=[1], num_blocks=1, attn_resolutions=[], channels_per_head=8)
    add("edm2 pickle", lambda to: write_pickle(snapshot(network), to / "net.pkl"), _edm2("net.pkl"), "net.pkl")
    add("torch.export", _exported, loaded("net.pt2"), "net.pt2")
    add("TorchScript", _scripted, loaded("net.ts"), "net.ts")
    add("config toml", _configured, planned("net.pt", config="model.toml", factory="own_networks:own"), "model.toml")
    add("config json", _configured, planned("net.pt", config="model.json", factory="own_networks:own"), "model.json")
    _add_folders(add)
    _add_runtime(add)
    return targets


def _edm2(name: str) -> Callable[[Path], object]:
    return planned(name)


def _exported(folder: Path) -> None:
    batch = torch.export.Dim("batch", max=1024)
    program = torch.export.export(Plain().eval(), (torch.randn(2, *SHAPE), torch.rand(2)), dynamic_shapes=({0: batch}, {0: batch}))
    torch.export.save(program, folder / "net.pt2")


def _scripted(folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.trace(Plain().eval(), (torch.randn(2, *SHAPE), torch.rand(2))).save(folder / "net.ts")


def _configured(folder: Path) -> None:
    import tomllib

    torch.save(own().state_dict(), folder / "net.pt")
    (folder / "model.toml").write_text(CONFIG)
    (folder / "model.json").write_text(json.dumps(tomllib.loads(CONFIG)))


Add = Callable[..., None]


def _add_folders(add: Add) -> None:
    import diffusers

    small = {"sample_size": 8, "block_out_channels": (8,), "layers_per_block": 1, "attention_head_dim": 4, "norm_num_groups": 4}
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}

    def consistency(folder: Path) -> None:
        unet = diffusers.UNet2DModel(**small, **blocks, num_class_embeds=5)
        diffusers.ConsistencyModelPipeline(unet, diffusers.CMStochasticIterativeScheduler()).save_pretrained(folder / "cm")
        _shard(folder / "cm/unet")

    def latent_consistency(folder: Path) -> None:
        unet = diffusers.UNet2DConditionModel(**small, **blocks, mid_block_type=None, cross_attention_dim=8, time_cond_proj_dim=8)
        unet.save_pretrained(folder / "lcm/unet", safe_serialization=False)
        diffusers.LCMScheduler().save_pretrained(folder / "lcm/scheduler")
        index = {"_class_name": "LatentConsistencyModelPipeline", "unet": ["diffusers", "UNet2DConditionModel"], "scheduler": ["diffusers", "LCMScheduler"]}
        (folder / "lcm/model_index.json").write_text(json.dumps(index))

    def sana(folder: Path) -> None:
        heads = {"num_attention_heads": 2, "attention_head_dim": 4, "num_cross_attention_heads": 2, "cross_attention_head_dim": 4, "cross_attention_dim": 8}
        transformer = diffusers.SanaTransformer2DModel(
            in_channels=4, out_channels=4, num_layers=1, caption_channels=8, sample_size=4, guidance_embeds=True, qk_norm="rms_norm_across_heads", **heads
        )
        transformer.save_pretrained(folder / "sana/transformer")
        diffusers.SCMScheduler().save_pretrained(folder / "sana/scheduler")
        index = {
            "_class_name": "SanaSprintPipeline",
            "transformer": ["diffusers", "SanaTransformer2DModel"],
            "scheduler": ["diffusers", "SCMScheduler"],
        }
        (folder / "sana/model_index.json").write_text(json.dumps(index))

    shards = "cm/unet/diffusion_pytorch_model"
    described = ("model_index.json", "unet/config.json", "scheduler/scheduler_config.json")
    add(
        "consistency folder",
        consistency,
        planned("cm"),
        *(f"cm/{name}" for name in described),
        f"{shards}.safetensors.index.json",
        f"{shards}-1.safetensors",
    )
    add("latent consistency folder", latent_consistency, planned("lcm"), *(f"lcm/{name}" for name in described), "lcm/unet/diffusion_pytorch_model.bin")
    add("sana folder", sana, planned("sana"), "sana/model_index.json", "sana/transformer/config.json", "sana/scheduler/scheduler_config.json")


def _shard(folder: Path) -> None:
    """Distribute a model's tensors over two files with an index, as diffusers does with large ones."""
    from safetensors.torch import load_file

    whole = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(whole)
    names = list(tensors)
    parts = {f"{whole.stem}-{number}.safetensors": names[number::2] for number in (0, 1)}
    for part, held in parts.items():
        save_file({name: tensors[name] for name in held}, folder / part)
    weight_map = {name: part for part, held in parts.items() for name in held}
    (folder / f"{whole.name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    whole.unlink()


# ----------------------------------------------------------------------------
# Files that the runtime reads.


def _add_runtime(add: Add) -> None:
    def manifest(folder: Path) -> None:
        tables = make_tables(0.5, 1.56)
        raw = json.loads((EMBEDDED / "scm.json").read_bytes())
        raw["samplers"] = {name: sorted(table) for name, table in tables.items()}
        raw["files"] |= {name: {"size": 1, "sha256": "0" * 64} for name in ("combine.onnx", "samplers.json")}
        (folder / "scm.json").write_text(json.dumps(raw))
        (folder / "samplers.json").write_bytes(to_json(tables))

    def solver_tables(folder: Path) -> object:
        read = read_manifest(folder)
        return [SolverTables(folder, read).evaluations(name, None, None) for name in (None, *read.samplers)]

    def embeddings(folder: Path) -> None:
        embeds, mask = np.zeros((2, 3, 4), np.float32), np.ones((2, 3), np.int64)
        np.savez(folder / "prompt.npz", prompt_embeds=embeds, prompt_attention_mask=mask)
        np.save(folder / "prompt.npy", embeds)

    def result(folder: Path) -> None:
        facts = BundleFacts(name="digits", sha256="0" * 64, family="edm2", parameters=1)
        cells = (Cell(steps=1, batch_size=1, runs=3, median_ms=2.0), Cell(steps=2, batch_size=8))
        measured: dict[str, Any] = {
            "date": "2026-11-29",
            "bundle": facts,
            "device": "cpu",
            "hardware": "CPU",
            "provider": "CPUExecutionProvider",
            "dtype": "fp32",
        }
        measured |= {"native_ops": None, "cuda_graph": False, "threads": None, "cores": 2, "versions": {"numpy": "2"}, "sampler": None, "seconds": 1.0}
        measured |= {"open_ms": 1.0, "interrupted": False, "cells": cells, "memory": Memory(), "work": ModelCost(), "peak": MachinePeak()}
        (folder / "result.json").write_bytes(Result(**measured).to_json())

    def entry(folder: Path) -> None:
        for name in (GRAPHS, CHECKSUMS):
            (folder / "cache" / name).mkdir(parents=True)
        (folder / "cache" / GRAPHS / "key").mkdir()
        (folder / "cache" / GRAPHS / "key" / GRAPH).write_bytes(b"graph")
        graph = CachedFile(size=5, sha256=hashlib.sha256(b"graph").hexdigest())
        (folder / ENTRY_PATH).write_bytes(msgspec.json.encode(Entry(source="step.fp32.onnx", files={"graph.onnx": graph})))

    add("cache entry", entry, lambda folder: GraphCache(folder / "cache", 1 << 20).find("key"), ENTRY_PATH, writes=True)
    add("manifest", manifest, read_manifest, "scm.json")
    add("solver tables", manifest, solver_tables, "samplers.json")
    add("embeddings npz", embeddings, lambda folder: read_embeddings(folder / "prompt.npz"), "prompt.npz")
    add("embeddings npy", embeddings, lambda folder: read_embeddings(folder / "prompt.npy"), "prompt.npy")
    add("benchmark result", result, lambda folder: read_result(folder / "result.json"), "result.json")
