"""Pickles that attack whoever opens them: each is refused, what it wanted is named, and nothing in it has run."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import struct
import tracemalloc
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from edm2_networks import TrigFlowPrecond
from edm2_pickles import EasyDict, Recorded, snapshot, write_pickle
from scm_export.checkpoints import inert_pickle, load
from scm_export.errors import CheckpointError

# ----------------------------------------------------------------------------
# Opcodes by hand, for what no pickler writes. Each piece leaves one object on the stack.


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def bytestring(data: bytes) -> bytes:
    return b"B" + struct.pack("<I", len(data)) + data


def named(module: str, name: str) -> bytes:
    return b"c" + module.encode() + b"\n" + name.encode() + b"\n"


def dotted(module: str, name: str) -> bytes:
    return text(module) + text(name) + b"\x93"


def tupled(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def call(function: bytes, *arguments: bytes) -> bytes:
    return function + tupled(*arguments) + b"R"


def pickled(*pieces: bytes, protocol: int = 4) -> bytes:
    return b"\x80" + bytes([protocol]) + b"".join(pieces) + b"."


def storage_blob(content: bytes, *, numel: int = 4, declared: int | None = None, described: bytes | None = None) -> bytes:
    """A storage as torch writes it, by hand."""
    key = tupled(text("storage"), named("torch", "FloatStorage"), text("0"), text("cpu"), b"J" + struct.pack("<i", numel), b"N")
    pickles = [
        pickle.dumps(0x1950A86A20F9469CFC6C, 2),
        pickle.dumps(1001, 2),
        pickle.dumps({"little_endian": True}, 2),
        pickled(described or key + b"Q", protocol=2),
        pickle.dumps(["0"], 2),
    ]
    return b"".join(pickles) + struct.pack("<q", numel if declared is None else declared) + content


Make = Callable[[Path], bytes]

LOAD = named("torch.storage", "_load_from_bytes")
MAGIC = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + pickle.dumps({}, 2)


def makes_a_folder(path: Path) -> bytes:
    return pickled(call(named("os", "mkdir"), text(str(path))))


def zip_archive(path: Path) -> bytes:
    """What torch.save writes today, of a compressed megabyte that unpacks to a gigabyte's beginning."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", makes_a_folder(path))
        archive.writestr("archive/data/0", bytes(1 << 24))
    return file.getvalue()


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


class Made:
    """Unpickles as a call of one of torch's functions, with any arguments."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, self.arguments


def stored(numel: int) -> Made:
    """A storage of float32 zeros."""
    return Made(torch.storage._load_from_bytes, storage_blob(bytes(4 * numel), numel=numel))


def tiny() -> TrigFlowPrecond:
    return TrigFlowPrecond(8, 3, 0, model_channels=16, channel_mult=[1], num_blocks=1, attn_resolutions=[], channels_per_head=16)


def hidden(place: Callable[[Evil], dict[str, object]]) -> Make:
    """A good snapshot with an attack inside."""

    def make(path: Path) -> bytes:
        file = path.with_suffix(".made")
        data = write_pickle(snapshot(tiny(), **place(Evil(path))), file).read_bytes()
        file.unlink()
        return data

    return make


# ----------------------------------------------------------------------------
# The attacks: how the file is made, given a folder for it to make, and what the message must name.

# These do make the folder where pickle.load opens them, as a test below shows.
RUNNING: dict[str, tuple[Make, str]] = {
    "a function": (makes_a_folder, "os.mkdir"),
    "a shell": (lambda path: pickled(call(named("os", "system"), text(f"mkdir '{path}'"))), "os.system"),
    "by the name of its platform": (lambda path: pickle.dumps(Evil(path)), "posix.mkdir"),
    "text": (lambda path: f"cos\nmkdir\n(V{path}\ntR.".encode(), "os.mkdir"),
    "evaluated": (lambda path: pickled(call(named("builtins", "eval"), text(f"__import__('os').mkdir({str(path)!r})"))), "builtins.eval"),
    "executed": (lambda path: pickled(call(named("builtins", "exec"), text(f"import os; os.mkdir({str(path)!r})"))), "builtins.exec"),
    "an older name of the same": (
        lambda path: pickled(call(named("__builtin__", "eval"), text(f"__import__('os').mkdir({str(path)!r})")), protocol=2),
        "__builtin__.eval",
    ),
    "a chain of getattr": (
        lambda path: pickled(call(call(named("builtins", "getattr"), call(named("builtins", "__import__"), text("os")), text("mkdir")), text(str(path)))),
        "builtins.getattr",
    ),
    "a dotted name": (lambda path: pickled(call(dotted("pathlib", "os.mkdir"), text(str(path)))), "pathlib.os.mkdir"),
    "from the memo": (lambda path: pickled(text("mkdir"), b"\x940", text("os"), b"h\x00\x93", tupled(text(str(path))), b"R"), "os.mkdir"),
    "INST": (lambda path: pickled(b"(", text(str(path)), b"ios\nmkdir\n"), "os.mkdir"),
    "OBJ": (lambda path: pickled(b"(", named("os", "mkdir"), text(str(path)), b"o"), "os.mkdir"),
    "NEWOBJ": (
        lambda path: pickled(named("subprocess", "Popen"), tupled(), b"\x81}", text("args"), b"Nsb", call(named("os", "mkdir"), text(str(path)))),
        "subprocess.Popen",
    ),
    "a partial": (lambda path: pickled(call(call(named("functools", "partial"), named("os", "mkdir"), text(str(path))))), "functools.partial"),
    "a method": (lambda path: pickled(call(named("pathlib", "Path.mkdir"), call(named("pathlib", "PosixPath"), text(str(path))))), "pathlib.Path.mkdir"),
    "another loader": (lambda path: pickled(call(named("pickle", "loads"), bytestring(makes_a_folder(path)))), "pickle.loads"),
    "a storage that is a pickle": (lambda path: pickled(call(LOAD, bytestring(makes_a_folder(path)))), "os.mkdir"),
    "a long storage that is a pickle": (lambda path: pickled(call(LOAD, bytestring(makes_a_folder(path) + bytes(8192)))), "os.mkdir"),
    "a storage with a pickle behind torch's": (lambda path: pickled(call(LOAD, bytestring(MAGIC + makes_a_folder(path)))), "os.mkdir"),
    "a storage whose key is a call": (
        lambda path: pickled(call(LOAD, bytestring(storage_blob(b"", described=call(named("os", "mkdir"), text(str(path))) + b"Q")))),
        "os.mkdir",
    ),
}

OTHER: dict[str, tuple[Make, str]] = {
    "NEWOBJ_EX": (lambda _: pickled(named("subprocess", "Popen"), b")", b"}", b"\x92"), "subprocess.Popen"),
    "a lambda": (lambda _: pickled(call(named("__main__", "<lambda>"))), "__main__.<lambda>"),
    "in a snapshot": (hidden(lambda evil: {"dataset_kwargs": EasyDict(path=[{"deep": (evil,)}])}), "posix.mkdir"),
    "in an object's record": (hidden(lambda evil: {"loss_fn": Recorded("EDM2Loss", P_mean=evil)}), "posix.mkdir"),
    "in place of a tensor": (hidden(lambda evil: {"encoder": Recorded("Encoder", _parameters={"weight": evil})}), "posix.mkdir"),
    "in place of a tensor's size": (
        hidden(lambda evil: {"encoder": Made(torch._utils._rebuild_tensor_v2, stored(4), 0, evil, (1,), False, OrderedDict())}),
        "posix.mkdir",
    ),
    "in place of the source": (hidden(lambda evil: {"encoder": Made(torch._utils._rebuild_parameter, evil, False, OrderedDict())}), "posix.mkdir"),
    "torch's loader": (lambda path: pickled(call(named("torch", "load"), text(str(path)))), "torch.load"),
    "through an allowed module": (lambda _: pickled(call(dotted("collections", "_sys.modules.get"), text("os"))), "collections._sys.modules.get"),
    "a method of an allowed class": (lambda _: pickled(call(dotted("collections", "OrderedDict.fromkeys"), b"]")), "collections.OrderedDict.fromkeys"),
    "the source's executor": (
        lambda _: pickled(call(named("torch_utils.persistence", "_src_to_module"), text("x = 1"))),
        "torch_utils.persistence._src_to_module",
    ),
    "a caller by name": (lambda _: pickled(call(named("dnnlib.util", "call_func_by_name"), text("os.getcwd"))), "dnnlib.util.call_func_by_name"),
    "an extension": (lambda _: pickled(b"\x82\xf0"), "the extension 240"),
    "a long extension": (lambda _: pickled(b"\x84\xf0\xff\xff\x0f"), "the extension 268435440"),
    "a persistent id": (lambda _: pickled(text("x"), b"Q"), "a persistent id"),
    "a textual persistent id": (lambda _: pickled(b"Px\n"), "a persistent id"),
    "a buffer from outside": (lambda _: pickled(b"\x97", protocol=5), "the opcode NEXT_BUFFER"),
    "a call of text": (lambda _: pickled(call(text("os.mkdir"))), "a call of a str"),
    "a call of a class": (lambda _: pickled(call(named("dnnlib.util", "EasyDict"))), "a call of dnnlib.util.EasyDict"),
    "an object of a function": (lambda _: pickled(named("torch._utils", "_rebuild_parameter"), b")\x81"), "an object of torch._utils._rebuild_parameter"),
    "attributes of a class": (lambda _: pickled(named("collections", "OrderedDict"), b"}", text("get"), b"Nsb"), "the state of collections.OrderedDict"),
    "attributes of a list": (lambda _: pickled(b"]}b"), "the state of a list"),
    "a name with a terminal's codes": (lambda _: pickled(dotted("os", "\x1b[2Jmkdir")), r"os.\x1b[2Jmkdir"),
}


@pytest.mark.parametrize("name", RUNNING)
def test_the_attacks_are_real(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "code-has-run"
    with contextlib.suppress(Exception):  # the code has run by then
        pickle.loads(RUNNING[name][0](folder))
    assert folder.is_dir()


@pytest.mark.parametrize("name", [*RUNNING, *OTHER])
def test_an_attack_is_refused_by_name_and_nothing_runs(name: str, tmp_path: Path) -> None:
    make, wanted = {**RUNNING, **OTHER}[name]
    file = tmp_path / "hostile.pkl"
    file.write_bytes(make(tmp_path / "code-has-run"))
    with pytest.raises(CheckpointError) as refused:
        load(file)
    assert f"hostile.pkl' is a pickle that wants to run code ({wanted})" in str(refused.value)
    assert "was not loaded: it must hold tensors and plain values only" in str(refused.value)
    assert [path.name for path in tmp_path.iterdir()] == ["hostile.pkl"]


# ----------------------------------------------------------------------------
# Files that are damaged, or that ask for more memory than they are large.


def tensor(*arguments: object) -> Make:
    """A snapshot with a tensor made of these arguments in its network's place."""
    return hidden(lambda _: {"ema": Recorded("Precond", _parameters={"weight": Made(torch._utils._rebuild_tensor_v2, *arguments, False, OrderedDict())})})


def array(*state: bytes, dtype: str = "f4") -> Make:
    """A NumPy array in the given state."""
    kind = call(named("numpy", "dtype"), text(dtype), b"\x89", b"\x88")
    empty = call(named("numpy._core.multiarray", "_reconstruct"), named("numpy", "ndarray"), tupled(b"K\x00"), bytestring(b"b"))
    return lambda _: pickled(empty, tupled(b"K\x01", state[0], kind, *state[1:]), b"b")


def storage(*arguments: Any, **keywords: Any) -> Make:
    return lambda _: pickled(call(LOAD, bytestring(storage_blob(*arguments, **keywords))))


def cut(share: float) -> Make:
    def make(path: Path) -> bytes:
        data = hidden(lambda _: {})(path)
        return data[: int(share * len(data))]

    return make


def module_in_itself(_: Path) -> bytes:
    """A ModuleDict that holds itself."""
    module = named("torch.nn.modules.container", "ModuleDict") + b")\x81\x94"
    network = b"}" + text("_modules") + b"}" + text("enc") + module + b"}" + text("_modules") + b"}" + text("a") + b"h\x00ssb" + b"ss"
    meta = b"}" + text("type") + text("class") + b"s" + text("class_name") + text("Precond") + b"s" + text("state") + network + b"s"
    return pickled(b"}", text("ema"), call(named("torch_utils.persistence", "_reconstruct_persistent_obj"), meta), b"s")


def same_storage_often(path: Path) -> bytes:
    """Tensors that are each as large as the file's storage, which is there once."""
    shared = stored(1 << 12)
    tensors = {f"w{i}": Made(torch._utils._rebuild_tensor_v2, shared, 0, (1 << 12,), (1,), False, OrderedDict()) for i in range(50)}
    network = Recorded("Precond", img_resolution=8, img_channels=3, label_dim=0, _modules={"unet": Recorded("UNet", _parameters=tensors)})
    return hidden(lambda _: {"ema": network})(path)


FOUR = stored(4)

DAMAGED: dict[str, tuple[Make, str]] = {
    **{f"cut to {share:.0%}": (cut(share), "") for share in (0.001, 0.1, 0.5, 0.9, 0.9999)},
    "bytes of a terabyte": (lambda _: pickled(b"\x8e", struct.pack("<Q", 1 << 40)), "expected 1099511627776 bytes"),
    "a name of a terabyte": (lambda _: pickled(b"\x8d", struct.pack("<Q", 1 << 40)), "expected 1099511627776 bytes"),
    "an integer of a gigabyte": (lambda _: pickled(b"\x8b", struct.pack("<i", 1 << 30)), "not enough data"),
    "a million-digit number": (lambda _: pickled(b"I" + b"9" * 60_000 + b"\n"), "Exceeds the limit"),
    "nothing in its memo": (lambda _: pickled(b"h\x07"), "7"),
    "an empty stack": (lambda _: b"\x80\x04.", "pop from empty list"),
    "a tuple as a key": (lambda _: pickled(b"}", b")" + b"\x85" * 20_000, b"Ns"), "a key must be text or a number, got tuple"),
    "an unhashable member": (lambda _: pickled(b"\x8f(]\x90"), "a key must be text or a number, got list"),
    "half an item": (lambda _: pickled(b"}(", text("a"), b"u"), "zip()"),
    "a module in itself": (module_in_itself, "occurs twice"),
    "a shape beyond its storage": (tensor(FOUR, 0, (5,), (1,)), "shape and storage disagree: shape [5], strides [1] from element 0 on, in a storage of 4"),
    "an offset beyond its storage": (tensor(FOUR, 3, (2,), (1,)), "shape and storage disagree: shape [2], strides [1] from element 3 on"),
    "strides beyond its storage": (tensor(FOUR, 0, (2, 2), (4, 1)), "shape and storage disagree: shape [2, 2], strides [4, 1]"),
    "a negative stride": (tensor(FOUR, 3, (4,), (-1,)), "integers of at least 0 as sizes and strides"),
    "a negative size": (tensor(FOUR, 0, (-1,), (1,)), "integers of at least 0 as sizes and strides"),
    "a terabyte of one element": (tensor(FOUR, 0, (1 << 40,), (0,)), "shape and storage disagree: shape [1099511627776], strides [0]"),
    "a size that is text": (tensor(FOUR, 0, ("4",), (1,)), "integers of at least 0 as sizes and strides"),
    "sizes without strides": (tensor(FOUR, 0, (2, 2), (1,)), "one stride per dimension"),
    "a tensor of nothing": (tensor(None, 0, (2, 2), (2, 1)), "a tensor must be made of a storage"),
    "the same storage again and again": (same_storage_often, "its tensors overlap in their storages"),
    "a storage of a terabyte": (storage(bytes(16), numel=1 << 28, declared=1 << 40), "declares 268435456 elements"),
    "a storage larger than its bytes": (storage(bytes(16), numel=5), "a storage declares 5 elements, 20 bytes, and has 16"),
    "a storage of two sizes": (storage(bytes(16), declared=5), "a storage declares 4 elements"),
    "a storage of another type": (storage(bytes(16), described=tupled(text("module"), text("x")) + b"Q"), "must be described by its type"),
    "a storage that is a zip archive": (lambda path: pickled(call(LOAD, bytestring(zip_archive(path)))), "got a zip archive"),
    "a storage of numbers": (lambda _: pickled(call(LOAD, b"K\x07")), "a storage must be made of bytes, got int"),
    "an array of objects": (array(tupled(b"K\x01"), b"\x89", b"]", dtype="O8"), "must be of one of f2, f4"),
    "an array of a list a billion times": (array(tupled(b"J\x00\xca\x9a\x3b", b"]Na"), b"\x89", bytestring(b"")), "integers of at least 0"),
    "an array larger than its bytes": (array(tupled(b"K\x05"), b"\x89", bytestring(bytes(16))), "shape and storage disagree"),
    "bytes in another encoding": (lambda _: pickled(call(named("_codecs", "encode"), text("eJw="), text("zip"))), "latin1"),
    "a record of another type": (
        lambda _: pickled(call(named("torch_utils.persistence", "_reconstruct_persistent_obj"), b"}")),
        "a persistent object must be recorded as a dict",
    ),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_refused_before_it_takes_memory(name: str, tmp_path: Path) -> None:
    make, said = DAMAGED[name]
    file = tmp_path / "damaged.pkl"
    file.write_bytes(make(tmp_path / "code-has-run"))
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError) as refused:
            load(file)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert "damaged.pkl' is not a readable .pkl file: " in str(refused.value)
    assert said in str(refused.value)
    assert "Copy or save it again" in str(refused.value)
    assert peak < 4e6 + 40 * file.stat().st_size
    assert [path.name for path in tmp_path.iterdir()] == ["damaged.pkl"]


def test_a_file_of_nothing_but_opcodes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inert_pickle, "MAX_OPCODES", 1000)
    file = tmp_path / "lists.pkl"
    file.write_bytes(pickled(b"]" * 1001))
    with pytest.raises(CheckpointError, match=r"lists.pkl' is not a readable .pkl file: it has more than 1000 opcodes"):
        load(file)


def test_a_high_place_in_the_memo_takes_no_memory(tmp_path: Path) -> None:
    """For which pickle.load takes 4 GB, from nine bytes."""
    file = tmp_path / "memo.pkl"
    file.write_bytes(pickled(b"Nr\xff\xff\xff\x0f", protocol=2))
    tracemalloc.start()
    with pytest.raises(CheckpointError, match="holds no network"):
        load(file)
    assert tracemalloc.get_traced_memory()[1] < 4e6
    tracemalloc.stop()
