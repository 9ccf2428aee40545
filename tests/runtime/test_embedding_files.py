"""Files of embeddings from a stranger: each is refused with a typed error, soon and without much memory. No code from them is run."""

from __future__ import annotations

import io
import os
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest

from scm_runtime import InvalidArgumentError
from scm_runtime.cli.embeddings import MAX_UNPACKED_BYTES, read_embeddings

EMBEDS = np.arange(30, dtype=np.float32).reshape(6, 5)


def npy(shape: str, dtype: str = "<f4", data: bytes = b"", version: bytes = b"\x01\x00") -> bytes:
    """Contents of a .npy with any header."""
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}}}".encode()
    length = struct.pack("<H" if version == b"\x01\x00" else "<I", len(header))
    return b"\x93NUMPY" + version + length + header + data


def npz(**members: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in members.items():
            archive.writestr(f"{name}.npy", data)
    return file.getvalue()


def refuse(path: Path) -> str:
    with pytest.raises(InvalidArgumentError, match="prompt") as caught:
        read_embeddings(path)
    assert len(str(caught.value)) < 600
    return str(caught.value)


@pytest.mark.parametrize("name", ["prompt.npy", "prompt.npz"])
def test_a_pipe(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    assert "must be a regular file" in refuse(tmp_path / name)


def test_a_link_to_a_device(tmp_path: Path) -> None:
    (tmp_path / "prompt.npy").symlink_to("/dev/zero")
    assert "must be a regular file" in refuse(tmp_path / "prompt.npy")


BAD_ARRAYS = {
    "more values than the file has": npy("(1099511627776, 5)", data=bytes(20)),
    "a product that overflows": npy("(4294967296, 4294967296, 16)", data=bytes(20)),
    "negative sizes": npy("(-4, -5)", data=bytes(80)),
    "values without a size": npy("(1152921504606846976,)", dtype="|V0"),
    "empty strings": npy("(1152921504606846976,)", dtype="|S0"),
    "strings": npy("(2,)", dtype="<U2", data=bytes(16)),
    "objects": npy("(1,)", dtype="|O", data=b"cos\nsystem\n(S'true'\ntR."),
    "complex numbers": npy("(1, 5)", dtype="<c8", data=bytes(40)),
    "many dimensions": npy("(" + "1," * 200 + ")", data=bytes(4)),
    "a size of 4000 digits": npy("(1" + "0" * 4000 + ",)", data=bytes(4)),
    "a deep header": npy("(" * 5000 + ")" * 5000),
    "an unknown version": npy("(1,)", data=bytes(4), version=b"\x09\x00"),
    "a header of 4 GB": b"\x93NUMPY\x02\x00" + b"\xff\xff\xff\xff" + bytes(100),
    "no data": npy("(6, 5)"),
}


@pytest.mark.parametrize("data", BAD_ARRAYS.values(), ids=BAD_ARRAYS)
def test_bad_arrays(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "prompt.npy").write_bytes(data)
    refuse(tmp_path / "prompt.npy")
    (tmp_path / "prompt.npz").write_bytes(npz(prompt_embeds=data))
    refuse(tmp_path / "prompt.npz")


def test_a_giant_file(tmp_path: Path) -> None:
    (tmp_path / "prompt.npy").write_bytes(npy(f"({MAX_UNPACKED_BYTES},)"))
    os.truncate(tmp_path / "prompt.npy", 5 * MAX_UNPACKED_BYTES)  # a sparse file
    assert "it has 5,368,709,120 bytes, more than 1,073,741,824" in refuse(tmp_path / "prompt.npy")


def test_a_member_twice(tmp_path: Path) -> None:
    data = io.BytesIO()
    np.save(data, EMBEDS)
    with zipfile.ZipFile(tmp_path / "prompt.npz", "w") as archive:
        archive.writestr("prompt_embeds.npy", data.getvalue())
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("prompt_embeds.npy", data.getvalue())
    assert "it holds prompt_embeds, prompt_embeds" in refuse(tmp_path / "prompt.npz")


def test_names_are_escaped(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "prompt.npz", "w") as archive:
        archive.writestr("\x1b[31mred.npy", b"")
    assert "\\x1b[31mred" in refuse(tmp_path / "prompt.npz")


@pytest.mark.parametrize("array", [EMBEDS, EMBEDS.astype(np.float16), np.asfortranarray(EMBEDS), EMBEDS.astype(np.int64), EMBEDS.astype(">f8")])
def test_arrays_of_every_real_dtype_and_order(tmp_path: Path, array: np.ndarray) -> None:
    np.save(tmp_path / "one.npy", array)
    np.savez(tmp_path / "one.npz", prompt_embeds=array)
    np.savez_compressed(tmp_path / "packed.npz", prompt_embeds=array, prompt_attention_mask=np.ones(6, bool))
    for name in ("one.npy", "one.npz", "packed.npz"):
        np.testing.assert_array_equal(read_embeddings(tmp_path / name)["prompt_embeds"], array)
    assert read_embeddings(tmp_path / "packed.npz")["prompt_attention_mask"].all()
