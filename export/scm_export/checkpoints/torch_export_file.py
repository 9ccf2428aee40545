"""Reads the entries of a ``.pt2`` file: the program as JSON, and tensors from their bytes. Nothing is run."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from scm_export.checkpoints.operator_graph import checked_name
from scm_export.checkpoints.stored_tensors import MAX_DIMENSIONS
from scm_export.checkpoints.torch_file import TRUST_HINT
from scm_export.errors import CheckpointError
from scm_runtime.common.documents import decode_json
from scm_runtime.common.message_text import printable

SCHEMA_MAJOR = 8  # of torch 2.9 to 2.13

MAX_NODES = 16_000  # operators; FLUX has 6 149, the U-Net of SDXL 3 774
MAX_DESCRIPTION = 64 << 20  # bytes of JSON; most of it are stack traces, up to 4 KiB an operator
MAX_ARGUMENT = 1 << 20  # bytes of JSON

DTYPES = {
    1: torch.uint8,
    2: torch.int8,
    3: torch.int16,
    4: torch.int32,
    5: torch.int64,
    6: torch.float16,
    7: torch.float32,
    8: torch.float64,
    12: torch.bool,
    13: torch.bfloat16,
}


class _Version(msgspec.Struct):
    major: int


class _Versioned(msgspec.Struct):
    schema_version: _Version


class Input(msgspec.Struct):
    """An argument of an operator."""

    name: str
    arg: msgspec.Raw
    kind: int = 1


class Node(msgspec.Struct):
    """A call of an operator."""

    target: str
    inputs: list[Input]
    outputs: list[msgspec.Raw]


class Graph(msgspec.Struct):
    """The calls, and the shapes of the values."""

    nodes: list[Node]
    tensor_values: dict[str, msgspec.Raw]


class Signature(msgspec.Struct):
    """The inputs and outputs of the program."""

    input_specs: list[msgspec.Raw]
    output_specs: list[msgspec.Raw]


class GraphModule(msgspec.Struct):
    """A program."""

    graph: Graph
    signature: Signature


class _Model(msgspec.Struct):
    """The parts of a program's JSON that are read. The others, such as stack traces, take no memory."""

    graph_module: GraphModule


def read_model(source: Path, archive: zipfile.ZipFile) -> tuple[GraphModule, dict[str, Tensor]]:
    """Read the program, and the tensors by name.

    Raises:
        CheckpointError: the file has another version, is too large, or holds pickled objects or inconsistent tensors.
        ValueError: the file is not what torch.export.save writes; likewise LookupError and other exceptions.
    """
    names = {name.partition("/")[2]: name for name in archive.namelist()}
    models = [name for name in names if name.startswith("models/") and name.endswith(".json")]
    if len(models) != 1:
        held = "code compiled by AOTInductor alone" if any(name.startswith("data/aotinductor/") for name in names) else f"{len(models)} programs"
        raise CheckpointError(f"'{source}' must hold one exported program, as torch 2.9 and newer save it, got {held}. Use torch.export.save.")
    if "byteorder" in names and _entry(archive, names["byteorder"]) != b"little":
        raise CheckpointError(f"'{source}' was saved on a big-endian machine. Save it again on another.")
    data = _entry(archive, names[models[0]])
    if (version := msgspec.json.decode(data, type=_Versioned).schema_version.major) != SCHEMA_MAJOR:
        raise CheckpointError(f"'{source}' has version {version!r} of the format of torch.export, this scm-export reads version {SCHEMA_MAJOR}. {TRUST_HINT}")
    model = msgspec.json.decode(data, type=_Model).graph_module
    if (count := len(model.graph.nodes)) > MAX_NODES:
        raise CheckpointError(f"'{source}' has {count} operators, at most {MAX_NODES} are allowed. {TRUST_HINT}")
    stem = models[0].removeprefix("models/").removesuffix(".json")
    tensors: dict[str, Tensor] = {}
    for kind in ("constants", "weights"):
        config = decode_json(_entry(archive, names[f"data/{kind}/{stem}_{kind}_config.json"]))["config"]
        tensors |= _tensors(source, archive, config, f"{names[models[0]].partition('/')[0]}/data/{kind}/")
    return model, tensors


def _entry(archive: zipfile.ZipFile, name: str) -> bytes:
    """Read an entry that describes the program or its tensors."""
    if (size := archive.getinfo(name).file_size) > MAX_DESCRIPTION:
        raise ValueError(f"{printable(name)} has {size} bytes, at most {MAX_DESCRIPTION} are allowed")
    return archive.read(name)


def decode_part(raw: msgspec.Raw) -> dict[str, Any]:
    """Decode a part of the program. Raises ValueError if it is too large or nested too deep."""
    if (size := memoryview(raw).nbytes) > MAX_ARGUMENT:
        raise ValueError(f"an argument has {size} bytes, at most {MAX_ARGUMENT} are allowed")
    decoded: dict[str, Any] = decode_json(bytes(raw))
    return decoded


def _tensors(source: Path, archive: zipfile.ZipFile, config: Mapping[str, Any], folder: str) -> dict[str, Tensor]:
    storages: dict[str, bytearray] = {}  # tied weights share a storage
    views: dict[tuple[Any, ...], int] = {}  # bytes of each distinct tensor
    found = {}
    for name, payload in config.items():
        checked_name(name)
        if payload["use_pickle"]:
            raise refused(source, f"the pickled object {name!r}")
        meta, path = payload["tensor_meta"], payload["path_name"]
        shape, stride = (tuple(int(size["as_int"]) for size in meta[key]) for key in ("sizes", "strides"))
        if max(len(shape), len(stride)) > MAX_DIMENSIONS:
            raise CheckpointError(f"'{source}': {name} must have at most {MAX_DIMENSIONS} dimensions, got {len(shape)}. Export it again.")
        offset, dtype = int(meta["storage_offset"]["as_int"]), DTYPES[meta["dtype"]]
        if path not in storages:
            storages[path] = bytearray(archive.read(folder + path))
        held = len(storages[path]) // dtype.itemsize
        last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
        count: int = math.prod(shape)
        if min((offset, *shape, *stride)) < 0 or (count and last >= held) or count > max(held, 1):
            raise CheckpointError(
                f"'{source}': shape and storage of {name} disagree: shape {list(shape)!s:.200}, strides {list(stride)!s:.200}, {held} elements stored"
            )
        flat = torch.frombuffer(storages[path], dtype=dtype, count=held) if held else torch.empty(0, dtype=dtype)
        found[name] = flat.as_strided(shape, stride, offset)
        views[path, dtype, shape, stride, offset] = count * dtype.itemsize
    stored = sum(map(len, storages.values()))
    if (total := sum(views.values())) > 2 * stored:
        raise CheckpointError(f"'{source}': its weights overlap: {total} bytes in {stored} bytes of storage. Call .contiguous() on them and export it again.")
    return found


def refused(source: Path, what: str, why: str = "which could run code") -> CheckpointError:
    """Error about something in an untrusted file."""
    return CheckpointError(f"'{source}' holds {what}, {why}, and was not loaded. {TRUST_HINT}")
