"""A single wrong byte is detected by its entry's checksum, in every kind of archive that torch writes. Undetected, it would change the network."""

from __future__ import annotations

import json
import logging
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from own_networks import SHAPE, Plain
from scm_export.checkpoints import DiffusersFolder, load, load_checkpoint, save_checkpoint
from scm_export.errors import CheckpointError

HEADER = {"config": {"sample_shape": SHAPE}}
FACTORY = "own_networks:plain"


def damaged(path: Path, entry: zipfile.ZipInfo, offset: int = 0) -> Path:
    """Copy an archive and change one byte of an entry."""
    data = bytearray(path.read_bytes())
    name, extra = struct.unpack_from("<HH", data, entry.header_offset + 26)
    data[entry.header_offset + 30 + name + extra + offset] ^= 0x10
    copy = path.with_name(f"damaged{path.suffix}")
    copy.write_bytes(data)
    return copy


def state_dict(folder: Path) -> Path:
    torch.save(Plain().state_dict(), folder / "weights.pt")
    return folder / "weights.pt"


def exported(folder: Path) -> Path:
    batch = torch.export.Dim("batch", max=1024)
    program = torch.export.export(Plain().eval(), (torch.randn(2, *SHAPE), torch.rand(2)), dynamic_shapes=({0: batch}, {0: batch}))
    torch.export.save(program, folder / "net.pt2")
    return folder / "net.pt2"


def scripted(folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.trace(Plain().eval(), (torch.randn(2, *SHAPE), torch.rand(2))).save(folder / "net.ts")
    return folder / "net.ts"


Opened = Callable[[Path], object]


def opened(**options: Any) -> Opened:
    def open_it(path: Path) -> object:
        (path.parent / "config.json").write_text(json.dumps(HEADER))
        return load(path, config=path.parent / "config.json", **options)

    return open_it


FORMATS: dict[str, tuple[Callable[[Path], Path], Opened]] = {
    "state dict": (state_dict, opened(factory=FACTORY)),
    "torch.export": (exported, opened()),
    "torch.export, trusted": (exported, opened(trust=True)),
    "TorchScript, trusted": (scripted, opened(trust=True)),
}


@pytest.mark.parametrize("kind", FORMATS)
def test_damage_to_any_entry_is_found_and_named(kind: str, tmp_path: Path) -> None:
    write, open_it = FORMATS[kind]
    path = write(tmp_path)
    open_it(path)
    with zipfile.ZipFile(path) as archive:
        entries = [entry for entry in archive.infolist() if entry.file_size]
    assert len(entries) >= 4
    for entry in entries:
        with pytest.raises(CheckpointError) as caught:
            open_it(damaged(path, entry, entry.compress_size // 2))
        assert f"'{entry.filename}' cannot be read" in str(caught.value)
        assert "Copy or save it again" in str(caught.value)


def test_a_damaged_scm_checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> None:
    save_checkpoint(load_checkpoint(tiny_checkpoint), tmp_path / "own.pt")
    with zipfile.ZipFile(tmp_path / "own.pt") as archive:
        entry = max(archive.infolist(), key=lambda entry: entry.file_size)
    with pytest.raises(CheckpointError, match=f"the entry '{entry.filename}' cannot be read"):
        load_checkpoint(damaged(tmp_path / "own.pt", entry))


def test_a_damaged_bin_of_a_diffusers_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    weights = tmp_path / "diffusion_pytorch_model.bin"
    torch.save(Plain().state_dict(), weights)
    assert DiffusersFolder(tmp_path).weights("").keys() == Plain().state_dict().keys()
    with zipfile.ZipFile(weights) as archive:
        entry = archive.getinfo("diffusion_pytorch_model/data/0")
    damaged(weights, entry).rename(weights)
    with pytest.raises(CheckpointError, match=r"model\.bin' is damaged: the entry 'diffusion_pytorch_model/data/0' cannot be read"):
        DiffusersFolder(tmp_path).weights("")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.zeros(3)], "must hold a dict of tensors by name, got a list"),
        ({"conv.weight": "none"}, "got a str for 'conv.weight'"),
        ({3: torch.zeros(3)}, "got a Tensor for '3'"),
        (nn.Conv2d(1, 1, 1), "wants to run code"),
    ],
)
def test_a_bin_of_a_diffusers_folder_that_holds_something_else(content: object, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    torch.save(content, tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(CheckpointError, match=message):
        DiffusersFolder(tmp_path).weights("")


def test_a_file_that_was_saved_without_checksums_is_read_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        path = state_dict(tmp_path)
    finally:
        torch.serialization.set_crc32_options(True)
    FORMATS["state dict"][1](path)
    assert "weights.pt' was saved without checksums" in caplog.text


def flagged_as_encrypted(path: Path) -> None:
    data = bytearray(path.read_bytes())
    for signature, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        start = 0
        while (start := data.find(signature, start)) >= 0:
            data[start + flags] |= 1
            start += 4
    path.write_bytes(data)


def of_an_unknown_method(path: Path) -> None:
    data = bytearray(path.read_bytes())
    start = data.rindex(b"PK\x01\x02")
    struct.pack_into("<H", data, start + 10, 99)
    path.write_bytes(data)


def torn_deflate(path: Path) -> None:
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("weights/notes", b"text " * 100)
        entry = archive.getinfo("weights/notes")
    damaged(path, entry, 1).rename(path)


@pytest.mark.parametrize("break_it", [flagged_as_encrypted, of_an_unknown_method, torn_deflate])
def test_other_damage_of_a_zip_archive(break_it: Callable[[Path], None], tmp_path: Path) -> None:
    path = state_dict(tmp_path)
    break_it(path)
    with pytest.raises(CheckpointError, match=r"weights\.pt' (is damaged: the entry '.*' cannot be read|is not a readable \.pt file)"):
        FORMATS["state dict"][1](path)


# ----------------------------------------------------------------------------
# Files that would take minutes or gigabytes, and sizes that no network has.


def test_a_pickle_of_hundreds_of_millions_of_opcodes(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "flood.pt", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        with archive.open("flood/data.pkl", "w") as entry:
            entry.write(b"\x80\x02")
            for _ in range(200):
                entry.write(b"]" * (1 << 20))
            entry.write(b".")
        archive.writestr("flood/version", b"3\n")
    with pytest.raises(CheckpointError, match=r"data.pkl of 2\d{8} bytes, more than"):
        load(tmp_path / "flood.pt")


def test_an_archive_of_too_many_entries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scm_export.checkpoints.archive.MAX_ENTRIES", 3)
    with pytest.raises(CheckpointError, match=r"has \d+ entries, at most 3 are allowed"):
        FORMATS["state dict"][1](state_dict(tmp_path))


def test_a_pickle_of_too_many_opcodes(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "flood.pt", "w") as archive:
        archive.writestr("flood/data.pkl", b"\x80\x02" + b"]" * 3_000_000 + b".")
        archive.writestr("flood/version", b"3\n")
    with pytest.raises(CheckpointError, match="more than 2000000 opcodes"):
        load(tmp_path / "flood.pt")


def test_metadata_of_safetensors_that_is_nested_without_end(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(1)}, tmp_path / "deep.safetensors", {"scm": "[" * 100_000 + "]" * 100_000})
    with pytest.raises(CheckpointError, match=r"is not a readable \.safetensors file"):
        load(tmp_path / "deep.safetensors")


@pytest.fixture(autouse=True)
def _log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "scm_export")
