"""Objects beside the tensors in a file, and attributes set on them, are neither run nor kept."""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import threading
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from scm_export.checkpoints import load
from scm_export.errors import CheckpointError
from support import tree
from training_checkpoints import AVERAGE, HEADER, RAW, raw_pickle, rezip, same, save, taken, text, weights


@pytest.mark.parametrize(
    "beside",
    [
        pytest.param(argparse.Namespace(lr=0.1, inner=argparse.Namespace(data=[Path("a"), None])), id="Namespace"),
        *(pytest.param(scalar(3), id=scalar.__name__) for scalar in (np.float64, np.float32, np.float16, np.int64, np.int32, np.uint8, np.bool_, np.str_)),
        *(pytest.param(np.ones(n, kind), id=f"array {kind} {n}") for n in (0, 3) for kind in ("float64", "float32", "int64", "uint32", "bool", "complex64")),
        pytest.param(np.ones((2, 3), order="F"), id="array in Fortran's order"),
        pytest.param(np.random.RandomState(0).get_state(), id="random state"),
        *(pytest.param(kind("a/b"), id=kind.__name__) for kind in (pathlib.Path, pathlib.PurePosixPath, pathlib.PureWindowsPath)),
        pytest.param(OrderedDict(a=1), id="OrderedDict"),
        pytest.param(defaultdict(list, a=[1]), id="defaultdict"),
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_what_a_training_run_saves_beside_the_weights_is_passed_over(beside: object, zipped: bool, tmp_path: Path) -> None:
    torch.save({"ema": weights(AVERAGE), "beside": beside}, tmp_path / "run.pt", _use_new_zipfile_serialization=zipped)
    (tmp_path / "config.json").write_text(json.dumps(HEADER))
    assert same(taken(tmp_path / "run.pt")[0], AVERAGE)


def test_a_set_of_weights_may_be_a_defaultdict(tmp_path: Path) -> None:
    assert same(taken(save(tmp_path, {"ema": defaultdict(None, weights(AVERAGE)), "model": weights(RAW)}))[0], AVERAGE)


class Named(argparse.Namespace):
    """A user-defined class."""


class Attack:
    """An object that is pickled as a call."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


@pytest.mark.parametrize(
    ("beside", "named"),
    [
        (lambda folder: Attack(os.mkdir, str(folder / "ran")), "posix.mkdir"),
        (lambda folder: argparse.Namespace(lr=Attack(os.mkdir, str(folder / "ran"))), "posix.mkdir"),
        (lambda folder: Attack(Path.mkdir, folder / "ran"), "getattr"),
        (lambda folder: np.array([Attack(os.mkdir, str(folder / "ran"))], dtype=object), "posix.mkdir"),
        (lambda folder: defaultdict(os.getcwd), "posix.getcwd"),
        (lambda folder: Named(lr=0.1), r"\S*test_ignored_objects\.Named"),
    ],
)
def test_code_beside_the_weights_is_still_refused_by_name(beside: Callable[[Path], object], named: str, tmp_path: Path) -> None:
    path = save(tmp_path, {"ema": weights(AVERAGE), "beside": beside(tmp_path)})
    before = tree(tmp_path)
    with pytest.raises(CheckpointError, match=rf"wants to run code \({named}\)"):
        taken(path)
    assert tree(tmp_path) == before


NAMESPACE, ORDERED = b"cargparse\nNamespace\n", b"ccollections\nOrderedDict\n"

HOSTILE: dict[str, tuple[tuple[bytes, ...], str | None]] = {
    # The opcodes, and the name in the message; None if the file is read without an error.
    "a shell under pathlib": ((b"cpathlib\nos.system\n", text("mkdir ran"), b"\x85R"), "pathlib.os.system"),
    "a method of a path": ((b"cpathlib\nPath.mkdir\n", text("ran"), b"\x85R"), "pathlib.Path.mkdir"),
    "a shell under argparse": ((b"cargparse\n_os.system\n", text("mkdir ran"), b"\x85R"), "argparse._os.system"),
    "a reader of files under NumPy": ((b"cnumpy\nfromfile\n", text("run.pt"), b"\x85R"), "numpy.fromfile"),
    "a path that is called": ((b"cpathlib\nPosixPath\n", text("ran"), b"\x85R)R"), ""),
    "the method of a namespace": ((NAMESPACE, b")\x81}", text("__class__"), b"cos\nsystem\nsb"), "os.system"),
    "a namespace's attributes": ((NAMESPACE, b")\x81}(", *(text(n) + ORDERED for n in ("__setstate__", "__class__", "items", "__dict__")), b"ub"), None),
    "a namespace's slots": ((NAMESPACE, b")\x81}}", text("__class__"), ORDERED, b"s\x86b"), None),
    "a class with attributes": ((NAMESPACE, b"}", text("__new__"), ORDERED, b"sb"), ""),
    "arguments of any kind": ((NAMESPACE, b"((lNI1\nt\x81"), ""),
    "arguments that it never takes": ((NAMESPACE, b"(", text("a"), b"N}t\x81"), None),
    "a state that is a number": ((NAMESPACE, b")\x81K\x01b"), None),
    "a dtype that is none": ((b"cnumpy\ndtype\n", text("no dtype"), b"N\x86R"), None),
    "an array of a terabyte": ((b"cnumpy._core.multiarray\n_reconstruct\ncnumpy\nndarray\n", b"\x8a\x06\0\0\0\0\0\x01\x85", text("b"), b"\x87R"), None),
    "an ordered dict whose methods are replaced": ((ORDERED, b")R}(", *(text(n) + NAMESPACE for n in ("items", "keys", "get", "values")), b"ub"), None),
    "namespaces in namespaces": ((*(1000 * (NAMESPACE + b")\x81}" + text("a"),)), b"N", *(1000 * (b"sb",))), None),
    "dicts in dicts": ((*(1000 * (b"}" + text("a"),)), b"N", *(1000 * (b"s",))), None),
    "tuples in tuples": ((b")", 100_000 * b"\x85"), None),
    "a dict in itself": ((b"}r\xff\0\0\0(", *(text(f"k{n}") + b"j\xff\0\0\0" for n in range(300)), b"u"), None),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_stands_beside_the_weights_is_inert(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opcodes, named = HOSTILE[name]
    monkeypatch.chdir(tmp_path)
    raw_pickle(tmp_path / "run.pt", weights(AVERAGE), *opcodes)
    (tmp_path / "config.json").write_text(json.dumps(HEADER))
    before = tree(tmp_path)
    if named is None:
        assert same(taken(tmp_path / "run.pt")[0], AVERAGE)
    else:
        with pytest.raises(CheckpointError, match=rf"wants to run code \({named}\)" if named else "is not a readable .pt file"):
            taken(tmp_path / "run.pt")
    assert tree(tmp_path) == before


@pytest.mark.parametrize("method", ["items", "keys", "values", "get", "__getitem__", "_metadata"])
def test_a_file_cannot_replace_the_methods_of_the_weights(method: str, tmp_path: Path) -> None:
    """The state of an OrderedDict in a pickle becomes its attributes, which hide its methods."""
    state: Any = OrderedDict(weights(AVERAGE))
    outer: Any = OrderedDict(ema=state)
    for changed in (state, outer):
        setattr(changed, method.upper(), argparse.Namespace)  # calling it gives an object of another type than the method's result
    path = save(tmp_path, outer)
    rezip(path, lambda data: data.replace(text(method.upper()), text(method)))
    assert same(taken(path)[0], AVERAGE)
    with pytest.raises(CheckpointError, match="not how it is sampled"):
        load(path)


def test_attributes_that_a_file_gives_its_tensors_are_dropped(tmp_path: Path) -> None:
    state = weights(AVERAGE)
    for name, tensor in state.items():
        state[name] = nn.Parameter(tensor)
        for method in ("to", "detach", "is_contiguous", "numel"):
            setattr(state[name], method, argparse.Namespace)
    found, _ = taken(save(tmp_path, {"ema": state}))
    assert same(found, AVERAGE)
    assert all(type(tensor) is Tensor and not vars(tensor) for tensor in found.values())


def test_torchs_own_list_of_safe_globals_is_left_as_it_was(tmp_path: Path) -> None:
    before = set(torch.serialization.get_safe_globals())  # torch lists a set, in any order
    path = save(tmp_path, {"ema": weights(AVERAGE), "args": argparse.Namespace(lr=0.1)})
    assert same(taken(path)[0], AVERAGE)
    assert set(torch.serialization.get_safe_globals()) == before
    with pytest.raises(Exception, match=r"argparse\.Namespace was not an allowed global"):
        torch.load(path, weights_only=True)


def test_threads_read_at_once(tmp_path: Path) -> None:
    """torch's list of safe globals is shared by the process: a thread that restores it must not affect another thread."""
    expected = weights(AVERAGE)  # not in the threads: it seeds torch's global random generator
    path = save(tmp_path, {"ema": expected, "args": [argparse.Namespace(lr=np.float64(n)) for n in range(200)]})
    read: list[bool] = []

    def read_five_times() -> None:
        for _ in range(5):
            found, _said = taken(path)
            read.append(all(torch.equal(found[name], tensor) for name, tensor in expected.items()))

    threads = [threading.Thread(target=read_five_times) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert read == [True] * 30


@pytest.mark.parametrize(
    ("tensor", "kind"),
    [
        (torch.eye(3).to_sparse(), "sparse"),
        (torch.zeros(3, 2, device="meta"), "without data"),
    ],
)
def test_a_tensor_that_is_not_plain_is_refused_by_name(tensor: Tensor, kind: str, tmp_path: Path) -> None:
    save(tmp_path, {"model": {**weights(RAW), "odd\x1b": tensor}})
    with pytest.raises(CheckpointError, match=rf"the tensor odd\\x1b must be dense, and is {kind}"):
        taken(tmp_path / "run.pt")


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_a_nested_tensor_is_refused(tmp_path: Path) -> None:
    save(tmp_path, {"w": torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])})
    with pytest.raises(CheckpointError, match="the tensor w must be dense, and is nested"):
        taken(tmp_path / "run.pt")


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.parametrize("per_channel", [False, True])
def test_a_quantized_tensor_is_refused_by_name(per_channel: bool, tmp_path: Path) -> None:
    values = torch.ones(3, 2)
    channels = torch.quantize_per_channel(values, torch.ones(2), torch.zeros(2), 1, torch.quint8)
    save(tmp_path, {"w": channels if per_channel else torch.quantize_per_tensor(values, 0.1, 0, torch.qint8)})
    with pytest.raises(CheckpointError, match="the tensor w must be dense, and is quantized"):
        taken(tmp_path / "run.pt")


def test_a_large_expanded_tensor_is_refused_with_the_limit_and_a_remedy(tmp_path: Path) -> None:
    save(tmp_path, {"w": torch.zeros(1).expand(1 << 13, 1 << 12)})
    with pytest.raises(CheckpointError, match=r"must have at most 16777216 elements, got shape \[8192, 4096\] in a storage of 1; call \.contiguous\(\)"):
        taken(tmp_path / "run.pt")


def test_a_tensor_of_too_many_dimensions_is_refused(tmp_path: Path) -> None:
    """The product of a million sizes of 62 bits takes hours."""
    save(tmp_path, {"w": torch.zeros(1).reshape([1] * 65)})
    with pytest.raises(CheckpointError, match="a tensor must have at most 64 dimensions, got 65"):
        taken(tmp_path / "run.pt")
