"""Checkpoints that would take minutes, gigabytes or the process: the command line refuses each with one message, and nothing runs or stays behind.

The first ones are copies of files that were found by attacking the exporter. All are read by one child process, with limits on its memory and time.
"""

from __future__ import annotations

import io
import json
import os
import struct
import warnings
import zipfile
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import save_file

from edm2_networks import TrigFlowPrecond
from edm2_pickles import Recorded, snapshot, write_pickle
from own_networks import SHAPE, Plain
from support import ROOT, run_python
from training_checkpoints import raw_pickle, text

Make = Callable[[Path], list[str]]
"""Writes files into a folder, and returns the arguments of ``scm-export`` that read them."""

MEMORY = 1 << 30  # bytes of resident memory, those of torch included
SECONDS = 60  # per file; a file that takes longer fails the test

CHILD = f"""
import contextlib, io, json, os, resource, signal, sys
from pathlib import Path

from fuzz.campaign import is_forbidden, shown
from scm_export.cli import main
import scm_export, diffusers, torch

torch.set_num_threads(1)
sys.dont_write_bytecode = True
forbidden, reading = [], [False]
sys.addaudithook(lambda event, given: forbidden.append(shown(event, given)) if reading[0] and is_forbidden(event, given) else None)


def peak():
    return int(next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")).split()[1]) * 1024


for name, folder, arguments in json.loads(Path(sys.argv[1]).read_text()):
    os.chdir(folder)
    with contextlib.suppress(OSError):  # where it is not writable, the peak is that of all files
        Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM to the present use
    signal.alarm({SECONDS})
    print(f"reading {{name}}", file=sys.stderr, flush=True)
    code, error = None, ""
    out = io.StringIO()
    forbidden.clear()
    reading[0] = True
    with contextlib.redirect_stderr(out), contextlib.redirect_stdout(out):
        try:
            main(arguments)
        except SystemExit as exit:
            code = exit.code
        except BaseException as failure:
            error = repr(failure)[:500]
    reading[0] = False
    print(json.dumps([name, code, error, out.getvalue(), peak(), forbidden]), flush=True)
"""


class Outcome(NamedTuple):
    """What the command line did with a file."""

    code: int | None
    exception: str
    output: str
    peak: int
    forbidden: list[str]


# ----------------------------------------------------------------------------
# Pickles of EDM2.


def edm2(**changes: Any) -> Make:
    """A snapshot of EDM2 with other contents. ``arguments`` are those of the network's constructor."""

    def make(folder: Path) -> list[str]:
        arguments = changes.pop("arguments", {})
        network: Any = TrigFlowPrecond(8, 3, 0, model_channels=8, channel_mult=[1], num_blocks=1, attn_resolutions=[], channels_per_head=8)
        network._init_kwargs.update(arguments)
        for name, value in arguments.items():
            setattr(network, name, value)
        write_pickle(snapshot(network, **changes), folder / "net.pkl")
        return ["net.pkl"]

    return make


def opcodes(*pieces: bytes) -> Make:
    def make(folder: Path) -> list[str]:
        (folder / "net.pkl").write_bytes(b"\x80\x04" + b"".join(pieces) + b".")
        return ["net.pkl"]

    return make


def long_integer(digits: int) -> bytes:
    number: int = 10**digits
    data = number.to_bytes(number.bit_length() // 8 + 1, "little")
    return b"\x8b" + struct.pack("<i", len(data)) + data


RECORD = b"ctorch_utils.persistence\n_reconstruct_persistent_obj\n"
ITEMS = b"".join(b"J" + struct.pack("<i", number) + b"N" for number in range(100_000))

# Each call copies the container that the memo holds at 0, or encodes the text there.
COPIES = {
    "a set of names": (b"(" + text("a") * 100_000 + b"l\x940", b"cbuiltins\nset\nh\x00\x85R0"),
    "a record's attributes": (
        b"}(" + text("type") + text("class") + text("class_name") + text("x") + text("state") + b"}(" + ITEMS + b"uu\x940",
        RECORD + b"h\x00\x85R0",
    ),
    "encoded text": (text("é" * 4000) + b"\x940", b"c_codecs\nencode\nh\x00" + text("latin1") + b"\x86R"),
}


# ----------------------------------------------------------------------------
# Files of torch.save.


def torch_file(*pieces: bytes, wanted: Mapping[str, Any] | None = None) -> Make:
    """A state_dict with an object beside it that these opcodes make."""

    def make(folder: Path) -> list[str]:
        raw_pickle(folder / "net.pt", wanted or Plain().state_dict(), *pieces)
        return ["net.pt"]

    return make


def flood(folder: Path) -> list[str]:
    with zipfile.ZipFile(folder / "net.pt", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        with archive.open("net/data.pkl", "w") as entry:
            entry.write(b"\x80\x02")
            for _ in range(240):
                entry.write(b"]" * (1 << 20))
            entry.write(b".")
        archive.writestr("net/version", b"3\n")
    return ["net.pt"]


def nested(folder: Path) -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's nested tensors are a prototype
        torch.save({"c.weight": torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])}, folder / "net.pt")
    return ["net.pt"]


def legacy(change: Callable[[bytes], bytes]) -> Make:
    def make(folder: Path) -> list[str]:
        torch.save({"w": torch.zeros(1234)}, folder / "net.pt", _use_new_zipfile_serialization=False)
        (folder / "net.pt").write_bytes(change((folder / "net.pt").read_bytes()))
        return ["net.pt"]

    return make


def byte_order(folder: Path) -> list[str]:
    torch.save(Plain().state_dict(), folder / "net.pt")
    with zipfile.ZipFile(folder / "net.pt") as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(folder / "net.pt", "w") as archive:
        for name, data in entries.items():
            large = name.endswith("byteorder")
            archive.writestr(name, data * 16_000_000 if large else data, zipfile.ZIP_DEFLATED if large else zipfile.ZIP_STORED)
    return ["net.pt"]


def shared_lists(folder: Path) -> list[str]:
    """A thousand lists of a thousand lists of a thousand lists, which are all the same ones: a search of every path takes days."""
    value: object = ["x"] * 1000
    for _ in range(3):
        value = [value] * 1000
    torch.save({"ema": value, "model": Plain().state_dict()}, folder / "net.pt")
    return ["net.pt"]


# ----------------------------------------------------------------------------
# Programs.


@cache
def exported() -> dict[str, bytes]:
    """Entries of the file of an exported program."""
    batch, file = torch.export.Dim("batch", max=1024), io.BytesIO()
    saved = torch.export.export(Plain().eval(), (torch.randn(2, *SHAPE), torch.rand(2)), dynamic_shapes=({0: batch}, {0: batch}))
    torch.export.save(saved, file)
    with zipfile.ZipFile(file) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def program(change: Callable[[dict[str, Any]], object]) -> Make:
    """An exported program whose JSON files are changed."""

    def make(folder: Path) -> list[str]:
        with zipfile.ZipFile(folder / "net.pt2", "w") as archive:
            for name, data in exported().items():
                if name.endswith(".json"):
                    raw = json.loads(data)
                    change(raw)
                    data = json.dumps(raw).encode()
                archive.writestr(name, data)
        return ["net.pt2", *configured(folder)]

    return make


def operator(name: str) -> Make:
    def change(raw: dict[str, Any]) -> None:
        for node in raw.get("graph_module", {}).get("graph", {}).get("nodes", ())[:1]:
            node["target"] = f"torch.ops.aten.{name}.default"

    return program(change)


def renamed(raw: dict[str, Any]) -> None:
    """Rename a parameter to text that ends the line in the source that torch generates."""
    name = 'w")\rgetattr(__import__("os"), "mkdir")("EXECUTED")\rdef g(self):\r    x = ("w'
    for spec in raw.get("graph_module", {}).get("signature", {}).get("input_specs", ()):
        if "parameter" in spec:
            spec["parameter"]["parameter_name"] = name
    if config := raw.get("config"):
        config[name] = config.pop(next(iter(config)))


# ----------------------------------------------------------------------------
# safetensors, configs, and folders.


def configured(folder: Path, header: object = None) -> list[str]:
    (folder / "config.json").write_text(json.dumps(header or {"config": {"sample_shape": SHAPE}}))
    return ["--config", "config.json"]


def safetensors(metadata: str) -> Make:
    def make(folder: Path) -> list[str]:
        save_file({"w": torch.zeros(1)}, folder / "net.safetensors", {"scm": metadata})
        return ["net.safetensors"]

    return make


def large_header(folder: Path) -> list[str]:
    size = 99 << 20
    with (folder / "net.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", size) + b'{"__metadata__":{"a":"')
        file.seek(8 + size - 3)
        file.write(b'"}}')
    return ["net.safetensors"]


def config(text: str | bytes, ending: str = "toml") -> Make:
    def make(folder: Path) -> list[str]:
        torch.save(Plain().state_dict(), folder / "net.pt")
        (folder / f"model.{ending}").write_bytes(text.encode() if isinstance(text, str) else text)
        return ["net.pt", "--config", f"model.{ending}", "--factory", "own_networks:plain"]

    return make


def diffusers_folder(change: Callable[[Path], object] = lambda folder: None, **unet: object) -> Make:
    """The folder of a consistency model with another configuration, and without weights."""

    def make(folder: Path) -> list[str]:
        described = {
            "model_index": {"_class_name": "ConsistencyModelPipeline", "unet": ["diffusers", "UNet2DModel"]},
            "unet/config": {"_class_name": "UNet2DModel", "sample_size": 8, "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]}
            | {"block_out_channels": [32], "layers_per_block": 1, **unet},
        }
        (folder / "model/unet").mkdir(parents=True)
        for name, content in described.items():
            (folder / f"model/{name}.json").write_text(json.dumps(content))
        change(folder / "model")
        return ["model"]

    return make


def linked(name: str, target: str) -> Callable[[Path], None]:
    def link(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return link


def pipe(name: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return make


def pipe_as_config(folder: Path) -> list[str]:
    os.mkfifo(folder / "config.json")
    torch.save(Plain().state_dict(), folder / "net.pt")
    return ["net.pt", "--config", "config.json", "--factory", "own_networks:plain"]


def pipe_as_checkpoint(folder: Path) -> list[str]:
    os.mkfifo(folder / "net.pt")
    return ["net.pt"]


def index(weight_map: object) -> Callable[[Path], object]:
    return lambda folder: (folder / "unet/diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


CASES: dict[str, tuple[Make, str]] = {
    # Found by attacking the exporter.
    "a scale of 400 digits": (edm2(encoder=Recorded("StabilityVAEEncoder", scale=[10**400] * 4, bias=[0.0] * 4)), "at most 128 bits"),
    "a compressed pickle of 240 MiB": (flood, "more than 67108864"),
    "a key of 5 000 digits": (opcodes(b"}", long_integer(5000), b"Ns"), "at most 128 bits"),
    "a label_dim of 2**62": (edm2(arguments={"label_dim": 2**62}), "label_dim must be 0 or from 2 to 1000000"),
    "a tiny rho": (edm2(loss_fn=Recorded("EDMConsistencyDistillLoss", rho=1e-300, S=8)), "rho must be a number from 0.1 to 100"),
    "a name that is code": (program(renamed), "a name must be"),
    "a nested tensor": (nested, "must be dense, and is nested"),
    "the gradient of an adaptive pooling": (operator("adaptive_max_pool2d_backward"), "which is not one of those that are run without trust"),
    "an unchecked sparse tensor": (operator("_sparse_csr_tensor_unsafe"), "which is not one of those that are run without trust"),
    "the gradient of a pooling": (operator("max_pool2d_with_indices_backward"), "which is not one of those that are run without trust"),
    "deep metadata": (safetensors("[" * 100_000 + "]" * 100_000), "nested more than"),
    # Pickles.
    **{f"copies of {name}": (opcodes(made, copy * 100_000), "its calls copy more than") for name, (made, copy) in COPIES.items()},
    "a sigma_data of 5 000 digits": (edm2(arguments={"sigma_data": 10**5000}), "at most 128 bits"),
    "a sigma_data of 1e300": (edm2(arguments={"sigma_data": 1e300}), "sigma_data must be"),
    "a sigma_max of 300 digits": (edm2(loss_fn=Recorded("EDM2Loss", sigma_max=10**300)), "at most 128 bits"),
    "a long class name": (edm2(encoder=Recorded("E" * 1_000_000)), "must be recorded as a dict"),
    # torch.save.
    "a bytearray of two gigabytes": (torch_file(b"cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R"), "a bytearray of a given size"),
    "a bytearray of text": (torch_file(b"cbuiltins\nbytearray\n" + text("é" * 60_000) + text("punycode") + b"\x86R"), "a given size or encoding"),
    "punycode": (torch_file(b"c_codecs\nencode\n" + text("é" * 60_000) + text("punycode") + b"\x86R"), "other than latin1"),
    "a tensor of ten gigabytes": (torch_file(b"ctorch\nFloatTensor\nJ\xff\xff\xff\x7f\x85R"), "it calls torch.FloatTensor"),
    "a storage of ten gigabytes": (torch_file(b"ctorch.storage\nUntypedStorage\nJ\xff\xff\xff\x7f\x85R"), "it calls torch.storage.UntypedStorage"),
    "a bomb behind a key of another kind": (torch_file(b"})Ns0cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R"), "a bytearray of a given size"),
    "a bomb behind a text of Python 2": (torch_file(b"U\x01a0cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R"), "a bytearray of a given size"),
    "a bomb within a rebuilt tensor": (
        torch_file(b"ctorch._tensor\n_rebuild_from_type_v2\n(cbuiltins\nbytearray\nctorch\nTensor\nJ\xff\xff\xff\x7f\x85NtR"),
        "a bytearray of a given size",
    ),
    "a deep tuple as a key": (torch_file(b"})", b"\x85" * 300_000, b"Ns"), "nested more than 64"),
    "a deep tuple in a set": (torch_file(b"cbuiltins\nset\n])", b"\x85" * 300_000, b"a\x85R"), "nested more than 64"),
    "a deep tuple in a state": (torch_file(b"ccollections\nOrderedDict\n)R](()", b"\x85" * 300_000, b"Nteb"), "nested more than 64"),
    "the state of a tensor": (torch_file(b"ctorch._utils\n_rebuild_parameter\n", b"N\x89}\x87R", b"(NK\x00))tb"), "the state of a tensor"),
    "an entry of 100 MB": (byte_order, "must have at most 1048576 bytes"),
    "a legacy bomb": (legacy(lambda data: b"\x80\x02cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R."), "wants to run code (builtins.bytearray)"),
    "a legacy storage larger than the file": (legacy(lambda data: data.replace(b"M\xd2\x04", b"J\0\0\0\x70")), "shape and storage of a tensor disagree"),
    "lists without end": (shared_lists, "holds weights, but not how it is sampled"),
    # safetensors.
    "a header of 99 MiB": (large_header, "its header must have at most"),
    "metadata that is a list": (safetensors("[]"), "must be a JSON object"),
    "metadata with a huge number": (safetensors('{"format": "scm-checkpoint", "version": 1' + "0" * 400 + "}"), "at most 64 bits"),
    "metadata with a terminal's codes": (
        safetensors('{"format": "scm-checkpoint", "version": 1, "family": "edm2", "config": {}, "sampler": {"\\u001b[31m": 1}}'),
        r"\x1b[31m",
    ),
    # Configs.
    "a pipe as the config": (pipe_as_config, "must be a regular file"),
    "a pipe as the checkpoint": (pipe_as_checkpoint, "must be a regular file"),
    "a config of 60 MB": (config(b"a = 1\n" * 10_000_000), "it has more than 1048576 bytes"),
    "a config of 60 MB in JSON": (config(b" " * 60_000_000 + b"{}", "json"), "it has more than 1048576 bytes"),
    "a deep config": (config('{"config":' + "[" * 100_000, "json"), "nested more than"),
    "a number of 5 000 digits": (config(f"[config]\nsample_shape = [{'9' * 5000}]\n"), "is not valid TOML"),
    "a number of 400 digits": (config(f"[sampler]\nsigma_data = {'9' * 400}\n"), "at most 64 bits"),
    "a key with a terminal's codes": (config('"\\u001b[31m" = 1\n'), r"\x1b[31m"),
    "a family with a terminal's codes": (config('family = "\\u001b[31m"\n'), r"\x1b[31m"),
    "a sigma_data of 1e300 in a config": (config("[sampler]\nsigma_data = 1e300\n"), "sigma_data must be a number from 1e-06 to 1e+06"),
    "a label with a terminal's codes": (config('label_names = ["\\u001b[31m", "b"]\n'), r"\x1b[31m"),
    "3 000 steps": (config(f"[sampler]\ntimes = {{ 3000 = {[1.5 - step / 2000 for step in range(3001)]} }}\n"), "step counts from 1 to 1000"),
    "a state of a terabyte": (config("[config]\nsample_shape = [3, 1000000, 1000000]\n"), "sample_shape"),
    "a state of too many axes": (config(f"[config]\nsample_shape = [{', '.join(['1'] * 100_000)}]\n"), "sample_shape"),
    # Folders.
    "a config.json that never ends": (diffusers_folder(linked("unet/config.json", "/dev/zero")), "must be a regular file"),
    "a pipe as the index": (diffusers_folder(pipe("model_index.json")), "no checkpoint at 'model'"),
    "a pipe as a config": (diffusers_folder(pipe("unet/config.json")), "must be a regular file"),
    "ten million layers": (diffusers_folder(layers_per_block=10_000_000), "layers_per_block must be at most 1000000"),
    "a million layers": (diffusers_folder(layers_per_block=1_000_000), "more than 10000 modules"),
    "text for a number": (diffusers_folder(sample_size="8"), "sample_size of the U-Net must be"),
    "a size of a million": (diffusers_folder(sample_size=1_000_000), "sample_size of the U-Net must be"),
    "numbers for names": (diffusers_folder(down_block_types=[1, 2, 3]), "cannot create a UNet2DModel"),
    "an index without a map": (diffusers_folder(index(None)), "must have a weight_map"),
    "an index of numbers": (diffusers_folder(index({"w": 3})), "must name files beside it"),
    "an index of lists": (diffusers_folder(index({"w": ["a"]})), "must name files beside it"),
    "an index of other folders": (diffusers_folder(index({"w": "../../secret.bin"})), "must name files beside it"),
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, tuple[Outcome, bool]]:
    """Outcome of each case, and whether its folder is as it was before."""
    work = tmp_path_factory.mktemp("hostile")
    jobs, before = [], {}
    for number, (name, (make, _)) in enumerate(CASES.items()):
        folder = work / str(number)
        folder.mkdir()
        jobs.append((name, str(folder), [*make(folder), "-o", "out.scm", "--latents"]))
        before[name] = _contents(folder)
    (work / "jobs.json").write_text(json.dumps(jobs))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), str(ROOT / "export"), str(ROOT)]), "OMP_NUM_THREADS": "1"}
    done = run_python(CHILD, work / "jobs.json", check=False, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    read = {name: Outcome(*rest) for name, *rest in map(json.loads, done.stdout.splitlines())}
    return {name: (read[name], _contents(Path(folder)) == before[name]) for name, folder, _ in jobs}


def _contents(folder: Path) -> list[tuple[str, int]]:
    return sorted((str(path.relative_to(folder)), path.lstat().st_size) for path in folder.rglob("*"))


@pytest.mark.parametrize("name", CASES)
def test_a_hostile_checkpoint_is_refused_and_nothing_runs(name: str, outcomes: Mapping[str, tuple[Outcome, bool]]) -> None:
    outcome, unchanged = outcomes[name]
    assert not outcome.exception, outcome.output
    assert outcome.code in (1, 2)
    assert CASES[name][1] in outcome.output
    assert len(outcome.output) < 5000
    assert outcome.output.replace("\n", "").isprintable()
    assert not outcome.forbidden
    assert unchanged
    assert outcome.peak < MEMORY
