"""A ``.pt2`` program that would compute for hours or fill the memory is refused before it runs; the error names the operator."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from exported_programs import Raw, call, changed, nodes, rewritten, save_small
from own_networks import SHAPE
from scm_export.checkpoints import load, program_cost
from scm_export.errors import CheckpointError
from scm_export.families import build_model
from scm_export.model import Model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small(tmp_path_factory.mktemp("program"))


def built(path: Path, saved: Path) -> Model:
    return build_model(load(path, config=saved.parent / "config.json"))


def prepending(*calls: Raw) -> Callable[[Raw], None]:
    return lambda raw: nodes(raw).__setitem__(slice(0, 0), calls)


def several(node: Raw, *outputs: str) -> Raw:
    """A node whose result is a list."""
    return {**node, "outputs": [{"as_tensors": [{"name": name} for name in outputs]}]}


ONE = call("full.default", "one", [1], 1.0)


def large(*shape: int) -> list[Raw]:
    """A tensor with a large shape, and the memory of a single number."""
    return [ONE, call("expand.default", "large", "one", list(shape))]


def square(size: int) -> Raw:
    return call("full.default", "square", [size, size], 1.0)


COSTS: dict[str, tuple[list[Raw], str]] = {
    # Arithmetic.
    "hours of matrix products": ([square(8192), *(call("matmul.default", f"y{i}", "square", "square") for i in range(5000))], "aten.matmul.default"),
    "one matrix product": ([*large(30_000, 30_000), call("mm.default", "y", "large", "large")], "aten.mm.default"),
    "integers": ([call("full.default", "a", [6000, 6000], 1), call("mm.default", "y", "a", "a")], "aten.mm.default"),
    "convolution": (
        [
            call("full.default", "a", [1, 64, 512, 512], 1.0),
            call("full.default", "w", [64, 64, 255, 255], 1.0),
            call("conv2d.default", "y", "a", "w", None, [1, 1], [127, 127]),
        ],
        "aten.conv2d.default",
    ),
    "attention": ([call("full.default", "a", [1, 1, 500_000, 64], 1.0), call("scaled_dot_product_attention.default", "y", "a", "a", "a")], "aten.scaled_dot"),
    "distances": ([call("full.default", "a", [8000, 8000], 1.0), call("cdist.default", "y", "a", "a", 1.0)], "aten.cdist.default"),
    "pooling with a large window": (
        [call("full.default", "a", [1, 1, 4000, 4000], 1.0), call("max_pool2d.default", "y", "a", [2001, 2001], [1, 1], [1000, 1000])],
        "aten.max_pool2d.default",
    ),
    "sum of a large view": ([*large(2**31, 2**20), call("sum.default", "y", "large")], "aten.sum.default"),
    "cumulative sum of many": ([*large(2**31, 2**10), call("cumsum.default", "y", "large", 1)], "aten.cumsum.default"),
    # Memory.
    "arange": ([call("arange.default", "y", 2**31)], "aten.arange.default"),
    "linspace": ([call("linspace.default", "y", 0.0, 1.0, 2**40)], "aten.linspace.default"),
    "zeros": ([call("zeros.default", "y", [2**31, 2**20])], "aten.zeros.default"),
    "identity matrix": ([call("eye.m", "y", 2**31, 2**25)], "aten.eye.m"),
    "repeat": ([call("repeat.default", "y", "x", [2**24, 1, 1, 1])], "aten.repeat.default"),
    "contiguous copy of a view": ([*large(2**31, 2**10), call("clone.default", "y", "large", memory_format=None)], "aten.clone.default"),
    "padding": ([call("constant_pad_nd.default", "y", "x", [2**20] * 4)], "aten.constant_pad_nd.default"),
    "interpolation": ([call("upsample_nearest2d.vec", "y", "x", [100_000, 100_000], None)], "aten.upsample_nearest2d.vec"),
    "padding of a convolution": ([call("conv2d.default", "y", "x", "p_conv_weight", None, [1, 1], [50_000, 50_000])], "aten.conv2d.default"),
    "outer product": ([call("arange.default", "a", 10**6), call("outer.default", "y", "a", "a")], "aten.outer.default"),
    "many tensors that are all needed": (
        [*(call("full.default", f"y{i}", [2**26], 1.0) for i in range(100)), call("cat.default", "y", [f"y{i}" for i in range(100)])],
        "aten.full.default",
    ),
    "one-hot": ([call("arange.default", "a", 10**6), call("one_hot.default", "y", "a", 10**6)], "aten.one_hot.default"),
    # Results.
    "pieces": ([*large(2**31), several(call("unbind.int", "y", "large"), "y")], "aten.unbind.int"),
    "pieces of one": ([*large(2**31), several(call("split.Tensor", "y", "large", 1), "y")], "aten.split.Tensor"),
    "chunks": ([*large(2**31), several(call("chunk.default", "y", "large", 2**31), "y")], "aten.chunk.default"),
    "sections": ([*large(2**31), several(call("tensor_split.sections", "y", "large", 2**31), "y")], "at most 4096"),
    "selection by a condition": ([call("gt.Scalar", "a", "x", 0), call("index.Tensor", "y", "x", ["a"])], "aten.index.Tensor has a result whose size depends"),
    "one-hot of unknown length": ([call("arange.default", "a", 3), call("one_hot.default", "y", "a")], "aten.one_hot.default has a result whose size depends"),
    # Randomness and changes.
    "dropout": ([call("dropout.default", "y", "x", 0.5, True)], "aten.dropout.default draws random numbers"),
    "dropout in attention": (
        [call("full.default", "a", [1, 1, 4, 4], 1.0), call("scaled_dot_product_attention.default", "y", "a", "a", "a", None, 0.5)],
        "aten.scaled_dot_product_attention.default draws random numbers",
    ),
    "an input changed through a view": ([call("detach.default", "a", "x"), call("relu_.default", "y", "a")], "aten.relu_.default would change an input"),
    "a weight changed through a view": (
        [call("view.default", "a", "p_conv_bias", [3, 1]), call("add_.Tensor", "y", "a", "a")],
        "aten.add_.Tensor would change an input or a weight",
    ),
}


@pytest.mark.parametrize("case", COSTS)
def test_what_would_take_hours_or_terabytes_is_refused_by_the_name_of_the_operator(case: str, saved: Path, tmp_path: Path) -> None:
    calls, message = COSTS[case]
    path = changed(saved, tmp_path / "program.pt2", prepending(*calls))
    with pytest.raises(CheckpointError) as caught:
        built(path, saved)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_values_are_released_after_their_last_use(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred tensors of 256 KiB after one another take the memory of two."""
    monkeypatch.setattr(program_cost, "BYTES_PER_SAMPLE", 1 << 20)
    calls = [call("full.default", "y0", [2**16], 1.0), *(call("neg.default", f"y{i}", f"y{i - 1}") for i in range(1, 100))]
    built(changed(saved, tmp_path / "program.pt2", prepending(*calls)), saved)


def test_the_number_of_operators_is_limited(saved: Path, tmp_path: Path) -> None:
    path = changed(saved, tmp_path / "program.pt2", prepending(*(call("neg.default", f"y{i}", "x") for i in range(20_000))))
    with pytest.raises(CheckpointError, match=r"has 200\d\d operators, at most 16000 are allowed"):
        load(path, config=saved.parent / "config.json")


def test_the_number_of_values_is_limited(saved: Path, tmp_path: Path) -> None:
    many = [several(call("unbind.int", "y", "x"), *(f"y{i}_{j}" for j in range(20_000))) for i in range(6)]
    with pytest.raises(CheckpointError, match=r"has more than 100000 values"):
        load(changed(saved, tmp_path / "program.pt2", prepending(*many)), config=saved.parent / "config.json")


def test_a_large_description_is_refused(saved: Path, tmp_path: Path) -> None:
    path = changed(saved, tmp_path / "program.pt2", lambda raw: raw.update(comment=" " * (65 << 20)))
    with pytest.raises(CheckpointError, match=r"models/model\.json has \d+ bytes, at most \d+ are allowed"):
        load(path, config=saved.parent / "config.json")


def test_a_deep_argument_is_refused(saved: Path, tmp_path: Path) -> None:
    deep: Any = []
    for _ in range(900):
        deep = [deep]
    node = call("neg.default", "y", "x")
    node["inputs"][0]["arg"] = {"as_nested_tensors": deep}
    with pytest.raises(CheckpointError, match="nested more than 64 levels deep"):
        load(changed(saved, tmp_path / "program.pt2", prepending(node)), config=saved.parent / "config.json")


def test_weights_that_share_their_bytes_do_not_multiply(saved: Path, tmp_path: Path) -> None:
    """A thousand views of one storage would take the memory of a thousand once they are cast."""

    def change(name: str, raw: Any) -> Any:
        if name.endswith("weights_config.json"):
            config = raw["config"]
            first = config["conv.weight"]
            for i in range(1000):
                meta = {**first["tensor_meta"], "sizes": [{"as_int": 81 - i % 50}], "strides": [{"as_int": 1}]}
                config[f"w{i}"] = {**first, "tensor_meta": meta}
        return raw

    with pytest.raises(CheckpointError, match="weights overlap"):
        load(rewritten(saved, tmp_path / "program.pt2", change), config=saved.parent / "config.json")


def test_nested_arithmetic_on_sizes_is_limited(saved: Path, tmp_path: Path) -> None:
    """Tracing would not end: torch expands polynomials of sizes."""

    def size(target: str, output: str, *inputs: str | int) -> Raw:
        given = [{"as_sym_int": {"as_name": value} if isinstance(value, str) else {"as_int": value}} for value in inputs]
        return {"target": target, "inputs": [{"name": "", "arg": arg} for arg in given], "outputs": [{"as_sym_int": {"as_name": output}}]}

    calls = [{**call("sym_size.int", "n0", "x", 0), "outputs": [{"as_sym_int": {"as_name": "n0"}}]}]
    for i in range(40):
        calls += [size("_operator.mul", f"a{i}", f"n{i}", f"n{i}"), size("_operator.add", f"b{i}", f"a{i}", i), size("_operator.mod", f"n{i + 1}", f"b{i}", 7)]
    with pytest.raises(CheckpointError, match="nests more than 12 products and remainders of sizes"):
        load(changed(saved, tmp_path / "program.pt2", prepending(*calls)), config=saved.parent / "config.json")


class Einsum(nn.Module):
    """Attention as EDM2 writes it."""

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        q = x.flatten(2)
        weights = torch.einsum("ncq,nck->nqk", q, q).softmax(2)
        y: Tensor = torch.einsum("nqk,nck->ncq", weights, q).reshape(x.shape) * level[:, None, None, None]
        return y


def test_a_program_with_einsum_needs_no_trust(saved: Path, tmp_path: Path) -> None:
    batch = torch.export.Dim("batch", max=1024)
    exported = torch.export.export(Einsum(), (torch.randn(2, *SHAPE), torch.rand(2)), dynamic_shapes=({0: batch}, {0: batch}))
    torch.export.save(exported, tmp_path / "einsum.pt2")
    program: Any = load(tmp_path / "einsum.pt2", config=saved.parent / "config.json")
    x, level = torch.randn(3, *SHAPE), torch.rand(3)
    torch.testing.assert_close(program.network(x, level), Einsum()(x, level))


def test_a_swapped_file_is_not_mixed_with_the_checked_one(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes that are loaded are the bytes that were checked, even if another file takes their place in between."""
    path = changed(saved, tmp_path / "program.pt2", lambda raw: None)
    expected = load(path, config=saved.parent / "config.json").network.state_dict()  # type: ignore[union-attr]  # it is a program
    other = rewritten(saved, tmp_path / "other.pt2", lambda _, raw: {**raw, "config": {}} if "config" in raw else raw)
    original = zipfile.ZipFile.open

    def swap(self: zipfile.ZipFile, *args: Any, **kwargs: Any) -> Any:
        if other.exists():
            other.replace(path)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(zipfile.ZipFile, "open", swap)
    found = load(path, config=saved.parent / "config.json").network.state_dict()  # type: ignore[union-attr]  # it is a program
    assert found.keys() == expected.keys()
