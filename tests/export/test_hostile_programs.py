"""A ``.pt2`` file is data: no name in it becomes code, no unsafe operator runs, and nothing runs before everything has been checked."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

from exported_programs import Raw, changed, node, nodes, rewritten, save_small
from own_networks import SHAPE
from scm_export import export
from scm_export.checkpoints import Program, load
from scm_export.checkpoints.operator_list import OPERATORS
from scm_export.errors import CheckpointError

# Each creates a folder if it can end a line, string or bracket in generated source, into which torch.fx writes names.
CODE = "getattr(__import__('os'), 'mkdir')('EXECUTED')"
NAMES = {
    "carriage return": f'w")\r{CODE}\rdef g(self):\r    x = ("w',
    "line feed": f'w")\n{CODE}\ndef g(self):\n    x = ("w',
    "form feed": f'w")\f{CODE}\f("w',
    "next line": f'w")\x85{CODE}\x85("w',
    "line separator": f'w")\u2028{CODE}\u2028("w',
    "paragraph separator": f'w")\u2029{CODE}\u2029("w',
    "quotes": f"w') or {CODE} or ('w",
    "double quotes": f'w") or {CODE} or ("w',
    "brackets": f"w[{CODE}]",
    "braces": "w{" + CODE + "}",
    "semicolon": f"w; {CODE}; w",
    "a dunder": "__class__",
    "a keyword": "lambda",
    "another script": "вес веса",
    "escape": "w\x1b[31m",
    "null": "w\0",
    "empty": "",
    "endless": "w" * 50_000,
}
SAFE = ("quotes", "double quotes", "brackets", "braces", "semicolon", "a dunder", "a keyword", "another script")
"""Of tensors: a name may hold any character that is printed."""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small(tmp_path_factory.mktemp("program"))


def replaced(raw: Any, old: str, new: str) -> Any:
    """Replace a text in JSON wherever it is a whole value or key."""
    if isinstance(raw, dict):
        return {replaced(key, old, new): replaced(value, old, new) for key, value in raw.items()}
    if isinstance(raw, list):
        return [replaced(value, old, new) for value in raw]
    return new if raw == old else raw


def replacing(old: str, new: str) -> Callable[[str, Any], Any]:
    return lambda _, raw: replaced(raw, old, new)


# What a name in the file is used for, and its value in the saved program.
PLACES = {
    "a parameter": "conv.weight",
    "a buffer": "shift",
    "a constant": "lifted_tensor_0",
    "the value of a parameter": "p_conv_weight",
    "an input": "x",
    "the other input": "level",
    "the value of an operator": "conv2d",
    "one of several values": "chunk",
    "an argument": "alpha",
    "an operator": "torch.ops.aten.conv2d.default",
    "a file of weights": "weight_0",
}


def load_and_trace(path: Path, folder: Path) -> Program | None:
    """Load a program and trace it, since tracing generates source code. Return None if the file is refused."""
    try:
        program = load(path, config=folder / "config.json")
    except CheckpointError as error:
        message = str(error)
    else:
        message = ""
    assert not message or message.isprintable(), "a message shows what a terminal would obey"
    assert len(message) < 2000
    if message:
        return None
    assert isinstance(program, Program)
    with torch.no_grad():
        traced = torch.export.export(program.network, (torch.randn(2, *SHAPE), torch.rand(2)))
        traced.module()(torch.randn(2, *SHAPE), torch.rand(2))
    return program


@pytest.mark.parametrize("place", PLACES)
def test_no_name_becomes_code(place: str, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    original = load_and_trace(saved, saved.parent)
    assert original is not None
    x, level = torch.randn(3, *SHAPE), torch.rand(3)
    for kind, name in NAMES.items():
        path = rewritten(saved, tmp_path / "hostile.pt2", replacing(PLACES[place], name), {PLACES[place]: name})
        program = load_and_trace(path, saved.parent)
        assert [entry.name for entry in tmp_path.iterdir()] == ["hostile.pt2"], f"{kind} was run"
        if place in ("a parameter", "a buffer"):
            assert (program is not None) == (kind in SAFE), kind
        if program is not None:
            torch.testing.assert_close(program.network(x, level), original.network(x, level), rtol=0, atol=0)


@pytest.mark.parametrize("name", [name for name in NAMES.values() if "\0" not in name and len(name) < 1000])
def test_no_name_of_an_entry_becomes_code(name: str, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for part in (saved.stem, "models", "model.json", "model_weights_config.json"):
        load_and_trace(rewritten(saved, tmp_path / "hostile.pt2", rename={part: name}), saved.parent)
    assert [entry.name for entry in tmp_path.iterdir()] == ["hostile.pt2"]


def test_a_name_that_ends_a_line_is_refused_by_the_exporter(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rewritten(saved, tmp_path / "hostile.pt2", lambda _, raw: replaced(raw, "conv.weight", NAMES["carriage return"]))
    with pytest.raises(CheckpointError, match=r"a name must be 1 to 512 printable characters, got .*\\r"):
        export(tmp_path / "hostile.pt2", tmp_path / "out.scm", config=saved.parent / "config.json", steps=(1,))
    assert [entry.name for entry in tmp_path.iterdir()] == ["hostile.pt2"]


def test_the_names_in_the_graphs_are_our_own(saved: Path, tmp_path: Path) -> None:
    def renamed(_: str, raw: Any) -> Any:
        for place, kind in (("a parameter", "another script"), ("a buffer", "brackets"), ("the value of an operator", "quotes")):
            raw = replaced(raw, PLACES[place], NAMES[kind])
        return raw

    export(rewritten(saved, tmp_path / "foreign.pt2", renamed), tmp_path / "out.scm", config=saved.parent / "config.json", steps=(1,), verify=False)
    names = set()
    for path in (tmp_path / "out.scm").rglob("*.onnx"):
        graph = onnx.load(path, load_external_data=False).graph
        names |= {value.name for value in (*graph.input, *graph.output, *graph.initializer, *graph.node)}
        names |= {name for node in graph.node for name in (*node.input, *node.output)}
    assert len(names) > 10
    assert [name for name in names if not re.fullmatch(r"[\w./:-]{0,200}", name, re.ASCII)] == []


def test_random_operators_and_operators_with_other_layouts_are_not_on_the_list() -> None:
    """Those on the list that can draw random numbers do so only with an argument that is refused."""
    layouts = re.compile(r"sparse|nested|csr|csc|bsr|mkldnn|quantize|_backward|segment_reduce|ctc|as_strided|storage|resize|file")
    random = set()
    for entry in OPERATORS:
        name, _, overload = entry.partition(".")
        assert not layouts.search(name), entry
        if torch.Tag.nondeterministic_seeded in getattr(getattr(torch.ops.aten, name), overload or "default").tags:
            random.add(entry)
    with_dropout = {"alpha_dropout", "dropout", "feature_alpha_dropout", "feature_dropout"}
    assert random <= with_dropout | {"scaled_dot_product_attention", "_scaled_dot_product_flash_attention_for_cpu"}


# ----------------------------------------------------------------------------
# Operators.


# Examples of operators that crash, have side effects, draw random numbers, or have no translation to ONNX.
FORBIDDEN = """
    max_pool2d_with_indices_backward adaptive_max_pool2d_backward max_unpool2d fractional_max_pool2d segment_reduce _segment_reduce_backward
    ctc_loss.IntList _sparse_csr_tensor_unsafe sparse_csr_tensor.crow_col_value_size _sparse_coo_tensor_unsafe to_sparse to_dense to_sparse_csr
    sparse_coo_tensor.indices _nested_tensor_from_mask _nested_view_from_buffer _nnpack_spatial_convolution mkldnn_convolution as_strided as_strided_
    set_.source_Storage resize_ _resize_output randn rand bernoulli normal_ multinomial randperm native_dropout rrelu uniform_ from_file save
    _embedding_bag _embedding_bag_dense_backward embedding_dense_backward _fft_c2c _weight_norm_interface _batch_norm_impl_index quantize_per_tensor
    linalg_svd linalg_inv_ex nonzero unique_dim _local_scalar_dense item grid_sampler_2d_backward histc bincount
"""


@pytest.mark.parametrize("name", str.split(FORBIDDEN))
def test_an_operator_that_is_not_on_the_list_is_refused_by_name(name: str, saved: Path, tmp_path: Path) -> None:
    target = f"torch.ops.aten.{name}" if "." in name else f"torch.ops.aten.{name}.default"
    path = changed(saved, tmp_path / "program.pt2", lambda raw: node(raw, "conv2d").update(target=target))
    with pytest.raises(CheckpointError, match=f"holds the operator 'torch.ops.aten.{name}.*--trust"):
        load(path, config=saved.parent / "config.json")


def argument(name: str, **value: object) -> Callable[[Raw], object]:
    """Replace an argument of the convolution."""

    def change(raw: Raw) -> None:
        given = node(raw, "conv2d")["inputs"]
        given[:] = [{**item, "kind": 2} for item in given if item["name"] != name] + ([{"name": name, "arg": value, "kind": 2}] if value else [])

    return change


ARGUMENTS: dict[str, tuple[Callable[[Raw], object], str]] = {
    "missing": (argument("weight"), "needs the argument weight"),
    "unknown": (argument("depth", as_int=3), "got 'depth' besides"),
    "a text for numbers": (argument("stride", as_string="same"), r"takes List\[int\] as stride, got 'same'"),
    "a size that crashes torch": (argument("stride", as_ints=[2**63 - 1, 1]), r"takes List\[int\] as stride, got \[9223372036854775807, 1\]"),
    "one size that crashes torch": (argument("stride", as_int=2**63 - 1), r"takes List\[int\] as stride, got 9223372036854775807"),
    "a number for numbers": (argument("groups", as_float=1.5), "takes int as groups, got 1.5"),
    "a tensor for a number": (argument("groups", as_tensor={"name": "x"}), "takes int as groups, got a tensor"),
    "a list for a tensor": (argument("weight", as_ints=[1, 2]), r"takes Tensor as weight, got \[1, 2\]"),
    "a text for a tensor": (argument("bias", as_string="none"), r"takes Optional\[Tensor\] as bias, got 'none'"),
    "what is not there yet": (argument("bias", as_tensor={"name": "mul"}), "KeyError: 'mul'"),
    "too many": (lambda raw: node(raw, "conv2d")["inputs"].extend([{"name": "groups", "arg": {"as_int": 1}, "kind": 1}] * 5), "takes 7 arguments, got"),
    "one result for two": (lambda raw: node(raw, "conv2d")["outputs"].append({"as_tensor": {"name": "second"}}), "does not hold what torch.export.save writes"),
    "two of a name": (lambda raw: node(raw, "conv2d").update(outputs=[{"as_tensor": {"name": "x"}}]), "two values are named 'x'"),
    "a list of results": (
        lambda raw: node(raw, "conv2d").update(outputs=[{"as_tensors": [{"name": "y"}]}]),
        "returns a list of tensors where it should return one",
    ),
    "weights changed in place": (lambda raw: nodes(raw).insert(0, in_place("p_conv_weight")), "would change self, an input or a weight"),
    "an input changed in place": (lambda raw: nodes(raw).insert(0, in_place("x")), "would change self, an input or a weight"),
    "arithmetic on a tensor": (
        lambda raw: nodes(raw).insert(
            0, {**in_place("x"), "target": "_operator.mul", "inputs": [{"name": "", "arg": {"as_tensor": {"name": "x"}}, "kind": 1}]}
        ),
        "mul takes numbers, got a tensor",
    ),
    "arithmetic on a text": (
        lambda raw: nodes(raw).insert(0, {**in_place("x"), "target": "_operator.mul", "inputs": [{"name": "", "arg": {"as_string": "x"}, "kind": 1}]}),
        "mul takes numbers, got 'x'",
    ),
}


def in_place(name: str) -> Raw:
    return {
        "target": "torch.ops.aten.relu_.default",
        "inputs": [{"name": "self", "arg": {"as_tensor": {"name": name}}, "kind": 1}],
        "outputs": [{"as_tensor": {"name": "new"}}],
    }


@pytest.mark.parametrize("case", ARGUMENTS)
def test_arguments_that_an_operator_does_not_take_are_refused(case: str, saved: Path, tmp_path: Path) -> None:
    change, message = ARGUMENTS[case]
    with pytest.raises(CheckpointError, match=message):
        load(changed(saved, tmp_path / "program.pt2", change), config=saved.parent / "config.json")


def test_weight_normalization_is_exact_and_refuses_what_crashes_torch(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the older of torch's two functions with this name, still used by checkpoints
        network = nn.Sequential(nn.utils.weight_norm(nn.Conv2d(3, 5, 3)), nn.utils.weight_norm(nn.Conv2d(5, 3, 3), dim=1)).eval()

    class Normalised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, x: Tensor, level: Tensor) -> Tensor:
            y: Tensor = self.network(x) * level.reshape(-1, 1, 1, 1)
            return y

    batch = torch.export.Dim("batch", max=1024)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch warns that the normalization reassigns the weight
        exported = torch.export.export(Normalised(), (torch.randn(2, *SHAPE), torch.rand(2)), dynamic_shapes=({0: batch}, {0: batch}))
    torch.export.save(exported, tmp_path / "net.pt2")
    (tmp_path / "config.json").write_text(json.dumps({"config": {"sample_shape": SHAPE}}))
    program = load(tmp_path / "net.pt2", config=tmp_path / "config.json")
    assert isinstance(program, Program)
    x, level = torch.randn(3, *SHAPE), torch.rand(3)
    torch.testing.assert_close(program.network(x, level), Normalised()(x, level))

    def short(name: str, raw: Raw) -> Raw:
        if name.endswith("weights_config.json"):
            raw["config"]["network.0.weight_g"]["tensor_meta"].update(sizes=[{"as_int": 2}], strides=[{"as_int": 1}])
        return raw

    path = rewritten(tmp_path / "net.pt2", tmp_path / "short.pt2", short)
    program = load(path, config=tmp_path / "config.json")
    assert isinstance(program, Program)
    with pytest.raises(RuntimeError, match="to broadcast"):
        program.network(x, level)


def test_every_operator_on_the_list_has_a_translation() -> None:
    """Directly, after decomposition, or because torch implements it in terms of other operators."""
    from torch.onnx._internal.exporter._decomp import create_onnx_friendly_decomposition_table, get_onnx_implemented_overloads
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    translated = set(get_onnx_implemented_overloads(ONNXRegistry.from_torchlib()))
    known = translated | set(create_onnx_friendly_decomposition_table(translated))
    composite = torch._C.DispatchKey.CompositeImplicitAutograd
    without = []
    for entry in OPERATORS:
        name, _, overload = entry.partition(".")
        if name.endswith("_") and not name.startswith("__"):
            continue  # torch.export emits the other overload
        operator = getattr(getattr(torch.ops.aten, name), overload or "default")
        if operator not in known and not operator.has_kernel_for_dispatch_key(composite):
            without.append(entry)
    assert not without
