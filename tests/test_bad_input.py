"""User errors: each raises a typed error with the value and the remedy, prints no traceback on the command line, and leaves no partial files."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import msgspec
import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from scm_export import cli as export_cli
from scm_export import export
from scm_export.errors import CheckpointError, CheckpointNotFoundError
from scm_export.writer import new_bundle
from scm_runtime import (
    BundleIntegrityError,
    BundleNotFoundError,
    BundleSchemaError,
    Generator,
    InferenceError,
    InvalidArgumentError,
    OutputError,
    ScmError,
)
from scm_runtime import cli as runtime_cli
from scm_runtime.bundle.checksums import sha256
from scm_runtime.bundle.manifest import MANIFEST
from scm_runtime.cli.embeddings import read_embeddings
from scm_runtime.cli.flag_names import with_flag_names
from support import full_disk, tree


@dataclass(frozen=True)
class World:
    """The files that every case starts from."""

    here: Path  #         an empty folder, which must be unchanged after the attempt
    checkpoint: Path  #   valid; must not be modified
    bundle: Path  #       valid; must not be modified
    generator: Generator


@dataclass(frozen=True)
class Attempt:
    """The same mistake through the Python API and, if possible, through a command line."""

    api: Callable[[], object]
    command: click.Command | None = None
    arguments: Sequence[str | Path] = ()
    room: int | None = None  #  maximum file size in bytes, to simulate a full disk


Prepare = Callable[[World], Attempt]


# ----------------------------------------------------------------------------
# Builders of attempts.


def exporting(
    make: Callable[[World], Path],
    out: str = "out.scm",
    force: bool = False,
    steps: Sequence[int] = (1, 2),
    room: int | None = None,
    command: bool = True,
    lora: Sequence[str] = (),
) -> Prepare:
    """Export what ``make`` returns, without verification: these mistakes must be found before it."""

    def prepare(world: World) -> Attempt:
        checkpoint, target = make(world), world.here / out
        options = ["--no-verify", "--steps", ",".join(map(str, steps)), *(["--force"] if force else []), *(f"--lora={one}" for one in lora)]
        return Attempt(
            lambda: export(checkpoint, target, steps=steps, force=force, lora=lora, verify=False),
            export_cli.main if command else None,
            [checkpoint, "-o", target, *options],
            room,
        )

    return prepare


def file(name: str, data: bytes) -> Callable[[World], Path]:
    def make(world: World) -> Path:
        path = world.here / name
        path.write_bytes(data)
        return path

    return make


def part(share: float) -> Callable[[World], Path]:
    """Write the first bytes of the checkpoint."""
    return lambda world: file("part.pt", (data := world.checkpoint.read_bytes())[: int(share * len(data))])(world)


def torch_file(content: object) -> Callable[[World], Path]:
    def make(world: World) -> Path:
        path = world.here / "other.pt"
        torch.save(content, path)
        return path

    return make


def edited(change: Callable[[dict[str, Any]], object]) -> Callable[[World], Path]:
    """Write the checkpoint with modified contents."""

    def make(world: World) -> Path:
        raw = torch.load(world.checkpoint, weights_only=True)
        change(raw)
        return torch_file(raw)(world)

    return make


def configured(**config: object) -> Callable[[World], Path]:
    return edited(lambda raw: raw["config"].update(config))


def sampled(**sampler: object) -> Callable[[World], Path]:
    return edited(lambda raw: raw["sampler"].update(sampler))


class Code:
    """Creates a folder when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (str(self.target),)


def code_in_a_torch_file(world: World) -> Path:
    return edited(lambda raw: raw.update(licence=Code(world.here / "code-has-run")))(world)


def code_in_a_bare_pickle(world: World) -> Path:
    return file("bare.pt", pickle.dumps(Code(world.here / "code-has-run")))(world)


def a_module(world: World) -> Path:
    return torch_file(torch.nn.Linear(2, 2))(world)


def text_encoder_alone(world: World) -> Path:
    save_file({"cond_stage_model.transformer.weight": torch.zeros(2)}, world.here / "clip.safetensors")
    return world.here / "clip.safetensors"


def foreign_safetensors(world: World) -> Path:
    save_file({"weight": torch.zeros(2)}, world.here / "other.safetensors")
    return world.here / "other.safetensors"


def good(world: World) -> Path:
    return world.checkpoint


def beside(name: str, content: str | None) -> Callable[[World], Path]:
    """Return the valid checkpoint, with something in the way of the output: a file, or a folder that contains a file."""

    def make(world: World) -> Path:
        path = world.here / name
        if content is None:
            path.mkdir()
            path /= "thesis.tex"
        path.write_text(content or "years of work")
        return world.checkpoint

    return make


def beside_a_bundle(world: World) -> Path:
    shutil.copytree(world.bundle, world.here / "out.scm")
    return world.checkpoint


def opening(spoil: Callable[[Path], Path | None]) -> Prepare:
    """Open a copy of the bundle after ``spoil``, which may return another path to open."""

    def prepare(world: World) -> Attempt:
        copy = Path(shutil.copytree(world.bundle, world.here / "copy.scm"))
        path = spoil(copy) or copy
        return Attempt(lambda: Generator(path), runtime_cli.main, ["generate", path, "-o", world.here / "out.png"])

    return prepare


def replaced(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """Modify a file without updating the manifest."""

    def spoil(bundle: Path) -> None:
        (bundle / name).write_bytes(change((bundle / name).read_bytes()))

    return spoil


def manifest(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def spoil(bundle: Path) -> None:
        raw = msgspec.json.decode((bundle / MANIFEST).read_bytes())
        change(raw)
        (bundle / MANIFEST).write_bytes(msgspec.json.encode(raw))

    return spoil


def forged(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """Modify a file and update the manifest."""

    def spoil(bundle: Path) -> None:
        replaced(name, change)(bundle)
        entry = {"size": (bundle / name).stat().st_size, "sha256": sha256(bundle / name)}
        manifest(lambda raw: raw["files"].update({name: entry}))(bundle)

    return spoil


def weights_elsewhere(data: bytes) -> bytes:
    """Let a graph refer to weights outside of the bundle's folder."""
    model = onnx.ModelProto.FromString(data)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../weights.onnx.data"
    return bytes(model.SerializeToString())


def weights_beside(bundle: Path) -> None:
    shutil.copy(bundle / "weights.onnx.data", bundle.parent)
    forged("step.fp32.onnx", weights_elsewhere)(bundle)


def without(name: str) -> Callable[[Path], None]:
    return lambda bundle: (bundle / name).unlink()


def calling(*arguments: str, **keywords: Any) -> Prepare:
    """Call the Generator; with ``arguments``, run ``scm-runtime generate`` with them too."""

    def prepare(world: World) -> Attempt:
        command = runtime_cli.main if arguments else None
        return Attempt(lambda: world.generator(**keywords), command, ["generate", world.bundle, "-o", world.here / "out.png", *arguments])

    return prepare


def saving(name: str, room: int | None = None, prepare_folder: Callable[[Path], object] = lambda folder: None) -> Prepare:
    def prepare(world: World) -> Attempt:
        prepare_folder(world.here)
        out = world.here / name
        arguments: list[str | Path] = ["generate", world.bundle, "-o", out, "--seed", "0", "--batch-size", "8"]
        return Attempt(lambda: world.generator(seed=0, batch_size=8).save(out), runtime_cli.main, arguments, room)

    return prepare


def threads(count: Any) -> Prepare:
    def prepare(world: World) -> Attempt:
        arguments: list[str | Path] = ["generate", world.bundle, "-o", world.here / "out.png", "--threads", str(count)]
        return Attempt(lambda: Generator(world.bundle, threads=count), runtime_cli.main if isinstance(count, int) else None, arguments)

    return prepare


def embedding_file(data: bytes | None) -> Prepare:
    def prepare(world: World) -> Attempt:
        path = world.here / "prompt.npz"
        if data is not None:
            path.write_bytes(data)
        return Attempt(lambda: read_embeddings(path), runtime_cli.main, ["generate", world.bundle, "-o", world.here / "out.png", "--prompt-embeds", path])

    return prepare


def revision(name: str) -> Prepare:
    def prepare(world: World) -> Attempt:
        return Attempt(lambda: Generator(world.bundle, revision=name), runtime_cli.main, ["inspect", world.bundle, "--revision", name])

    return prepare


def dtype(name: Any) -> Prepare:
    return lambda world: Attempt(lambda: Generator(world.bundle, dtype=name))


# ----------------------------------------------------------------------------
# The expected errors: the type, words that name the actual value, words that state the expectation or the remedy.

NAN = float("nan")
LATENTS = np.zeros((1, 3, 8, 8), np.float32)
PIXELS = np.zeros((1, 8, 8, 3), np.uint8)
ANOTHER = "Choose another path with -o"
AGAIN = "Copy or save it again"
DOCUMENT = "docs/checkpoint-format.md"
A_CHECKPOINT = "Expected a checkpoint's file, a diffusers folder, or a repository"
NOT_LOADED = "is a pickle that wants to run code"
TENSORS_ONLY = "must hold tensors and plain values only"
MISMATCH = "the weights do not match the config"
A_PLACE = "Choose a folder that you may write to"
A_FOLDER = "Expected a folder written by scm-export"
COPY = "Copy the whole folder or export again"
PLAIN_NAMES = "files must have plain names inside the bundle's folder"
ONE_SIZE = "all arguments must be for one batch size"
RANGE = "seed must lie in [-2^63, 2^63)"

EXIT_CODES: dict[type[ScmError], int] = {InvalidArgumentError: 2, BundleNotFoundError: 2, CheckpointNotFoundError: 2}  # usage; all others: 1, failure

Row = tuple[str, Prepare, type[ScmError], str, str]

CHECKPOINTS: list[Row] = [
    ("missing", exporting(lambda w: w.here / "none.pt"), CheckpointNotFoundError, "none.pt': the file does not exist", A_CHECKPOINT),
    ("folder", exporting(lambda w: w.here), CheckpointNotFoundError, "it is a folder", A_CHECKPOINT),
    ("name too long", exporting(lambda w: w.here / f"{'x' * 300}.pt"), CheckpointError, "File name too long", A_CHECKPOINT),
    ("empty", exporting(file("empty.pt", b"")), CheckpointError, "empty.pt' is empty", "Copy or save the checkpoint again"),
    ("nearly whole", exporting(part(0.99)), CheckpointError, "part.pt' is not a readable .pt file: truncated", AGAIN),
    ("half", exporting(part(0.5)), CheckpointError, "part.pt' is not a readable .pt file: truncated", AGAIN),
    ("few bytes", exporting(part(0.0002)), CheckpointError, "part.pt' is not a readable .pt file", AGAIN),
    ("text", exporting(file("notes.pt", b"epoch 3: loss 0.1\n" * 9)), CheckpointError, "notes.pt' is not a readable .pt file", AGAIN),
    ("truncated pickle", exporting(file("bare.pt", b"\x80\x02X\x01")), CheckpointError, "bare.pt' is not a readable .pt file", AGAIN),
    ("a picture", exporting(file("digits.png", b"\x89PNG\r\n\x1a\n" + bytes(64))), CheckpointError, "digits.png' is not a readable .pt file", AGAIN),
    ("zeros", exporting(file("zeros.pt", bytes(4096))), CheckpointError, "zeros.pt' is not a readable .pt file", AGAIN),
    (
        "code in a torch file",
        exporting(code_in_a_torch_file),
        CheckpointError,
        NOT_LOADED,
        TENSORS_ONLY,
    ),
    (
        "code in a bare pickle",
        exporting(code_in_a_bare_pickle),
        CheckpointError,
        NOT_LOADED,
        TENSORS_ONLY,
    ),
    (
        "a whole module",
        exporting(a_module),
        CheckpointError,
        NOT_LOADED,
        TENSORS_ONLY,
    ),
    ("a state dict", exporting(torch_file({"weight": torch.zeros(2)})), CheckpointError, "other.pt' holds weights, but not how it is", "--config FILE.toml"),
    ("a tensor", exporting(torch_file(torch.zeros(2))), CheckpointError, "must hold a dict of tensors by name", "got a Tensor"),
    (
        "truncated safetensors",
        exporting(file("a.safetensors", b"\xff\0\0\0\0\0\0\0{")),
        CheckpointError,
        "a.safetensors' is not a readable .safetensors file",
        AGAIN,
    ),
    ("no U-Net", exporting(text_encoder_alone), CheckpointError, "clip.safetensors' has no U-Net", "only a text encoder. Export the file of the whole model"),
    ("other safetensors", exporting(foreign_safetensors), CheckpointError, "other.safetensors' holds weights, but not how it", "--factory"),
    (
        "newer version",
        exporting(edited(lambda raw: raw.update(version=2))),
        CheckpointError,
        "checkpoint version 2",
        "reads version 1. Upgrade: pip install -U",
    ),
    ("no config", exporting(edited(lambda raw: raw.pop("config"))), CheckpointError, "missing required field `config`", DOCUMENT),
    ("unknown key", exporting(edited(lambda raw: raw.update(optimiser=1))), CheckpointError, "unknown field `optimiser`", DOCUMENT),
    (
        "weights are numbers",
        exporting(edited(lambda raw: raw["weights"].update(out_gain=1.0))),
        CheckpointError,
        "got float for 'out_gain'",
        "weights must be tensors",
    ),
    ("unknown family", exporting(edited(lambda raw: raw.update(family="gan"))), CheckpointError, "family 'gan' belongs to no known", "--family chooses one"),
    ("unknown config field", exporting(configured(widht=3)), CheckpointError, "unknown fields widht", "known are img_resolution, img_channels"),
    ("config of another type", exporting(configured(num_blocks="many")), CheckpointError, "num_blocks", "Expected `int`"),
    ("config out of range", exporting(configured(img_resolution=9)), CheckpointError, "got 9", "img_resolution must be a multiple of 2"),
    (
        "wider",
        exporting(configured(model_channels=32)),
        CheckpointError,
        "emb_noise.weight must have [64, 32], got [32, 16]",
        MISMATCH,
    ),
    (
        "deeper",
        exporting(configured(num_blocks=2)),
        CheckpointError,
        "missing: enc.8x8_block1.conv_res0.weight, enc.8x8_block1.emb_linear.weight, enc.8x8_block1.conv_res1.weight and",
        MISMATCH,
    ),
    ("no classes", exporting(configured(label_dim=0)), CheckpointError, "not in the network: emb_label.weight", MISMATCH),
    (
        "NaN in the weights",
        exporting(edited(lambda raw: raw["weights"]["out_conv.weight"].fill_(NAN))),
        CheckpointError,
        "got NaN or infinity in: out_conv.weight",
        "weights must be finite",
    ),
    (
        "infinity in the weights",
        exporting(edited(lambda raw: raw["weights"].update(out_gain=torch.tensor(np.inf)))),
        CheckpointError,
        "got NaN or infinity in: out_gain",
        "weights must be finite",
    ),
    (
        "label names",
        exporting(edited(lambda raw: raw.update(label_names=("ant", "bee")))),
        CheckpointError,
        "got 2",
        "label_names must have one name a class, 4",
    ),
    ("sigma_data", exporting(sampled(sigma_data=0.0)), CheckpointError, "sigma_data", "Expected `float` > 0"),
    ("initial_scale", exporting(sampled(initial_scale=np.inf)), CheckpointError, "got inf", "sampler.initial_scale must be finite"),
    ("pixel_scale", exporting(sampled(pixel_scale=0.0)), CheckpointError, "got 0", "sampler.pixel_scale must be finite and not 0"),
    ("count of times", exporting(sampled(times={"two": (1.0, 0.5, 0.0)})), CheckpointError, "got 'two' with 3", "one time more than steps"),
    ("too few times", exporting(sampled(times={"2": (1.0, 0.0)})), CheckpointError, "got '2' with 2", "one time more than steps"),
    ("rising times", exporting(sampled(times={"2": (1.0, 1.5, 0.0)})), CheckpointError, "got [1.0, 1.5, 0.0] for 2 steps", "must be TrigFlow's, decreasing"),
    ("no times", exporting(sampled(times={})), CheckpointError, "got none", "leave it out"),
    ("steps without times", exporting(good, steps=(1, 3)), InvalidArgumentError, "got [3]", "steps must be among [1, 2]"),
    ("scale of a LoRA", exporting(good, lora=["a.safetensors:much"]), InvalidArgumentError, "got 'a.safetensors:much'", "FILE or FILE:SCALE"),
    ("a family without LoRA", exporting(good, lora=["a.safetensors"]), InvalidArgumentError, "the family edm2 takes none", "Leave it out"),
]

OUTPUTS: list[Row] = [
    ("below a file", exporting(beside("out", "mine"), out="out/a/b.scm"), OutputError, "that is a file, not a folder", ANOTHER),
    ("name too long", exporting(good, out=f"{'x' * 300}.scm"), OutputError, "File name too long", ANOTHER),
    ("existing bundle", exporting(beside_a_bundle), OutputError, "out.scm' exists", "replace it with --force"),
    ("existing file", exporting(beside("out.scm", "mine")), OutputError, "exists and is no bundle", ANOTHER),
    ("existing file, force", exporting(beside("out.scm", "mine"), force=True), OutputError, "exists and is no bundle", ANOTHER),
    ("existing folder, force", exporting(beside("out.scm", None), force=True), OutputError, "exists and is no bundle", ANOTHER),
    ("disk full, first graph", exporting(good, room=4_000), OutputError, "cannot write the bundle", "Free some space"),
    ("disk full, weights", exporting(beside_a_bundle, force=True, room=30_000, command=False), OutputError, "cannot write the bundle", "Free some space"),
    (
        "picture: below a file",
        saving("out/a.png", None, lambda folder: (folder / "out").touch()),
        OutputError,
        "a.png': ",
        A_PLACE,
    ),
    ("picture: unknown ending", saving("out.xyz"), InvalidArgumentError, "unknown picture format '.xyz'", "Use an ending such as .png"),
    ("picture: name too long", saving(f"{'x' * 300}.png"), OutputError, "File name too long", A_PLACE),
    ("picture: disk full", saving("out.bmp", 100), OutputError, "out.bmp': File too large", "on a disk with room"),
    (
        "picture: disk full, earlier one",
        saving("out.png", 100, lambda folder: (folder / "out.png").touch()),
        OutputError,
        "out.png': File too large",
        "on a disk with room",
    ),
]

BUNDLES: list[Row] = [
    ("missing", opening(lambda b: b.with_name("none.scm")), BundleNotFoundError, "none.scm': it does not exist", A_FOLDER),
    ("a file", opening(lambda b: b / "noise.onnx"), BundleNotFoundError, "noise.onnx': it is a file", A_FOLDER),
    (
        "folder without a manifest",
        opening(without(MANIFEST)),
        BundleNotFoundError,
        "copy.scm': it has no scm.json",
        A_FOLDER,
    ),
    ("name too long", opening(lambda b: b / ("x" * 300)), BundleNotFoundError, "File name too long", A_FOLDER),
    ("a revision of a folder", revision("main"), InvalidArgumentError, "revision 'main' is for a repository of the hub", "Leave the revision out"),
    ("no graph", opening(without("step.fp32.onnx")), BundleIntegrityError, "lacks the file step.fp32.onnx", COPY),
    ("no weights", opening(without("weights.onnx.data")), BundleIntegrityError, "lacks the file weights.onnx.data", COPY),
    (
        "wrong hash",
        opening(replaced("weights.onnx.data", lambda data: data[:-1] + bytes([data[-1] ^ 1]))),
        BundleIntegrityError,
        "weights.onnx.data' must have SHA-256",
        "copy or export it again",
    ),
    (
        "truncated",
        opening(replaced("step.fp32.onnx", lambda data: data[:-9])),
        BundleIntegrityError,
        "step.fp32.onnx' must have",
        "Copy the whole folder again",
    ),
    (
        "newer schema",
        opening(manifest(lambda raw: raw.update(schema_version=2))),
        BundleSchemaError,
        "schema version 2",
        "Upgrade it: pip install -U . in an updated clone",
    ),
    ("no JSON", opening(replaced(MANIFEST, lambda data: data[:-9])), BundleSchemaError, "scm.json' is not a valid manifest", "Export the checkpoint again"),
    (
        "a key is missing",
        opening(manifest(lambda raw: raw.pop("times"))),
        BundleSchemaError,
        "missing required field `times`",
        "Export the checkpoint again",
    ),
    (
        "absolute path",
        opening(manifest(lambda raw: raw["files"].update({"/etc/passwd": {"size": 1, "sha256": "0" * 64}}))),
        BundleSchemaError,
        "got '/etc/passwd'",
        PLAIN_NAMES,
    ),
    (
        "path upwards",
        opening(manifest(lambda raw: raw["files"].update({"../x.onnx": {"size": 1, "sha256": "0" * 64}}))),
        BundleSchemaError,
        "got '../x.onnx'",
        PLAIN_NAMES,
    ),
    ("no ONNX", opening(forged("step.fp32.onnx", lambda data: b"no graph")), InferenceError, "step.fp32.onnx': ", "Upgrade it, or export the checkpoint again"),
    ("weights outside", opening(weights_beside), InferenceError, "weights.onnx.data", "Upgrade it, or export the checkpoint again"),
]

CALLS: list[Row] = [
    ("label too large", calling("--labels", "4", class_labels=4), InvalidArgumentError, "got 4", "class_labels must be from 0 to 3"),
    ("label below 0", calling("--labels", "1,-1", class_labels=[1, -1]), InvalidArgumentError, "got -1", "class_labels must be from 0 to 3"),
    (
        "unknown label name",
        calling("--labels", "cow", class_labels="cow"),
        InvalidArgumentError,
        "got 'cow'",
        "one of its 4 label names (ant, bee, cat, dog)",
    ),
    ("label is no number", calling("--labels", "--5", class_labels="--5"), InvalidArgumentError, "got '--5'", "class_labels must be one of its"),
    ("label is a fraction", calling(class_labels=1.5), InvalidArgumentError, "got 1.5", "class_labels must be class indices or label names"),
    ("label is a truth value", calling(class_labels=[True]), InvalidArgumentError, "got True", "class_labels must be from 0 to 3"),
    ("nested labels", calling(class_labels=[[0, 1]]), InvalidArgumentError, "got [0, 1]", "class_labels must be from 0 to 3"),
    ("no labels", calling(class_labels=[]), InvalidArgumentError, "got none", "class_labels must hold at least one value"),
    ("guidance", calling("--guidance-scale", "2", guidance_scale=2.0), InvalidArgumentError, "guidance_scale was given", "takes class_labels"),
    ("latents of another shape", calling(latents=LATENTS[..., :7]), InvalidArgumentError, "got [1, 3, 8, 7]", "latents must have shape [N, 3, 8, 8]"),
    ("latents without a batch", calling(latents=LATENTS[0]), InvalidArgumentError, "got [3, 8, 8]", "latents must have shape [N, 3, 8, 8]"),
    ("no latents", calling(latents=LATENTS[:0]), InvalidArgumentError, "got none", "latents must hold at least one value"),
    ("NaN in latents", calling(latents=LATENTS + NAN), InvalidArgumentError, "got NaN or infinity", "latents must be finite"),
    ("latents are text", calling(latents="noise"), InvalidArgumentError, "got str", "latents must be an array of numbers"),
    ("0 steps", calling("--steps", "0", num_inference_steps=0), InvalidArgumentError, "got 0", "num_inference_steps must be an integer of at least 1"),
    ("-1 steps", calling("--steps", "-1", num_inference_steps=-1), InvalidArgumentError, "got -1", "num_inference_steps must be an integer of at least 1"),
    ("steps without times", calling("--steps", "3", num_inference_steps=3), InvalidArgumentError, "got 3", "num_inference_steps must be one of [1, 2]"),
    ("half a step", calling(num_inference_steps=0.5), InvalidArgumentError, "got 0.5", "num_inference_steps must be an integer of at least 1"),
    ("rising times", calling(timesteps=[1.0, 1.5]), InvalidArgumentError, "got [1.0, 1.5]", "timesteps must be decreasing, above 0 and at most 1.56"),
    ("equal times", calling(timesteps=[1.0, 1.0]), InvalidArgumentError, "got [1.0, 1.0]", "timesteps must be decreasing"),
    ("NaN in times", calling(timesteps=[1.5, NAN]), InvalidArgumentError, "got [1.5, nan]", "timesteps must be decreasing, above 0 and at most 1.56"),
    ("time too late", calling(timesteps=[80.0]), InvalidArgumentError, "got [80.0]", "timesteps must be decreasing, above 0 and at most 1.56"),
    ("end time given", calling(timesteps=[1.5, 0.0]), InvalidArgumentError, "got [1.5, 0.0]", "timesteps must be decreasing, above 0"),
    ("no times", calling(timesteps=[]), InvalidArgumentError, "got []", "timesteps must be decreasing"),
    ("one time", calling(timesteps=1.5), InvalidArgumentError, "got 1.5", "timesteps must be a list of numbers"),
    ("times and steps", calling(timesteps=[1.5], num_inference_steps=1), InvalidArgumentError, "num_inference_steps or timesteps", "not both"),
    ("batch 0", calling("--batch-size", "0", batch_size=0), InvalidArgumentError, "got 0", "batch_size must be an integer of at least 1"),
    ("batch below 0", calling("--batch-size", "-2", batch_size=-2), InvalidArgumentError, "got -2", "batch_size must be an integer of at least 1"),
    (
        "lengths",
        calling("--labels", "0,1,2", "--seed", "1,2", class_labels=[0, 1, 2], seed=[1, 2]),
        InvalidArgumentError,
        "got class_labels: 3, seed: 2",
        ONE_SIZE,
    ),
    (
        "lengths and batch",
        calling("--labels", "0,1", "--batch-size", "3", class_labels=[0, 1], batch_size=3),
        InvalidArgumentError,
        "got class_labels: 2, batch_size: 3",
        ONE_SIZE,
    ),
    (
        "lengths and latents",
        calling(latents=LATENTS, seed=[1, 2]),
        InvalidArgumentError,
        "got seed: 2, latents: 1",
        ONE_SIZE,
    ),
    ("seed too large", calling("--seed", str(2**63), seed=2**63), InvalidArgumentError, f"got {2**63}", RANGE),
    (
        "seed too small",
        calling("--seed", str(-(2**63) - 1), seed=-(2**63) - 1),
        InvalidArgumentError,
        f"got {-(2**63) - 1}",
        RANGE,
    ),
    (
        "seed runs over",
        calling("--seed", str(2**63 - 1), "--batch-size", "2", seed=2**63 - 1, batch_size=2),
        InvalidArgumentError,
        f"got {2**63}",
        RANGE,
    ),
    ("seed is a fraction", calling(seed=1.5), InvalidArgumentError, "got 1.5", "seed must be an integer or a list of integers"),
    ("seed is text", calling(seed="7"), InvalidArgumentError, "got '7'", "seed must be an integer or a list of integers"),
    ("no seeds", calling(seed=[]), InvalidArgumentError, "got none", "seed must hold at least one value"),
    ("output_type", calling(output_type="jpeg"), InvalidArgumentError, "got 'jpeg'", "output_type must be 'pil', 'np', 'latent' or 'dlpack'"),
    ("0 threads", threads(0), InvalidArgumentError, "got 0", "threads must be an integer from 1 to 1024"),
    ("half a thread", threads(0.5), InvalidArgumentError, "got 0.5", "threads must be an integer from 1 to 1024"),
    ("dtype", dtype("fp16"), InvalidArgumentError, "got 'fp16'", "dtype must be 'auto' or one of this bundle's, fp32"),
    ("embeddings", calling(prompt_embeds=np.zeros((7, 5))), InvalidArgumentError, "prompt_embeds was given", "takes class_labels"),
    ("prompt without a text encoder", calling("--prompt", "a cat", prompt="a cat"), InvalidArgumentError, "prompt was given", "takes class_labels"),
    (
        "negative prompt without a text encoder",
        calling("--negative-prompt", "a cat", negative_prompt="a cat"),
        InvalidArgumentError,
        "negative_prompt was given",
        "takes class_labels",
    ),
    (
        "no file of embeddings",
        embedding_file(None),
        InvalidArgumentError,
        "prompt.npz': No such file or directory",
        "Expected a .npz with the array prompt_embeds",
    ),
    ("a file of embeddings that is text", embedding_file(b"a cat"), InvalidArgumentError, "prompt.npz': ", "Expected a .npz with the array prompt_embeds"),
    ("conditioning of no name", calling(conditioning={"text": 1}), InvalidArgumentError, "text was given", "takes class_labels"),
    ("conditioning is a list", calling(conditioning=[1]), InvalidArgumentError, "got list", "conditioning must be a dict"),
    ("no encoder", lambda w: Attempt(lambda: w.generator.encode(PIXELS)), InvalidArgumentError, "'tiny' has no encoder", "--with-encoder"),
    ("no previews", lambda w: Attempt(lambda: w.generator.decode(LATENTS, preview=True)), InvalidArgumentError, "no preview decoder", "--preview-decoder"),
    (
        "decode something else",
        lambda w: Attempt(lambda: w.generator.decode(LATENTS[0])),
        InvalidArgumentError,
        "got [3, 8, 8]",
        "latents must have shape [N, 3, 8, 8]",
    ),
]

CASES = {"checkpoint": CHECKPOINTS, "output": OUTPUTS, "bundle": BUNDLES, "call": CALLS}


@pytest.mark.parametrize(
    ("prepare", "error", "got", "cure"), [pytest.param(*row[1:], id=f"{group}: {row[0]}") for group, rows in CASES.items() for row in rows]
)
def test_bad_input(
    prepare: Prepare, error: type[ScmError], got: str, cure: str, tiny: Generator, tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    attempt = prepare(World(tmp_path, tiny_checkpoint, tiny_bundle, tiny))
    before = tree(tmp_path)

    with full_disk(attempt.room) if attempt.room else nullcontext(), pytest.raises(ScmError) as caught:
        attempt.api()
    assert type(caught.value) is error
    assert got in str(caught.value)
    assert cure in str(caught.value)
    assert tree(tmp_path) == before, "the attempt must leave everything as it was"

    if attempt.command is not None:
        with full_disk(attempt.room) if attempt.room else nullcontext():
            result = CliRunner(catch_exceptions=False).invoke(attempt.command, [str(argument) for argument in attempt.arguments])
        assert result.exit_code == EXIT_CODES.get(error, 1)
        command = attempt.command.commands[str(attempt.arguments[0])] if isinstance(attempt.command, click.Group) else attempt.command
        assert "Error: " in result.stderr
        assert got in result.stderr or with_flag_names(got, command) in result.stderr
        assert cure in result.stderr or with_flag_names(cure, command) in result.stderr
        assert "Traceback" not in result.output
        assert tree(tmp_path) == before, "the command must leave everything as it was"


@pytest.mark.parametrize("when", ["while writing", "while flushing", "before the old one is moved", "between the two renames"])
@pytest.mark.parametrize("mishap", [KeyboardInterrupt, OSError(28, "No space left on device")], ids=["interrupt", "full disk"])
def test_a_stopped_export_leaves_the_earlier_bundle(when: str, mishap: type[BaseException] | OSError, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "out.scm"
    target.mkdir()
    (target / MANIFEST).write_text("{}")
    before = tree(tmp_path)
    rename = Path.rename

    def fail(*_: object) -> None:
        raise mishap

    def fail_once(path: Path, to: Path) -> Path:
        if (path == target) == (when == "before the old one is moved"):
            monkeypatch.undo()
            raise mishap
        return rename(path, to)

    def write() -> None:
        with new_bundle(target, force=True) as writer:
            (writer.folder / MANIFEST).write_text("{ half")
            if when == "while writing":
                fail()

    if when == "while flushing":
        monkeypatch.setattr(os, "fsync", fail)
    elif when != "while writing":
        monkeypatch.setattr("scm_export.writer.exchange", lambda *_: False)
        monkeypatch.setattr(Path, "rename", fail_once)
    with pytest.raises(OutputError if isinstance(mishap, OSError) else KeyboardInterrupt):
        write()
    assert tree(tmp_path) == before
