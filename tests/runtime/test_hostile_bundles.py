"""Bundles from a stranger: each is refused with a typed error, soon and without much memory. None of them reads a file outside of its folder."""

from __future__ import annotations

import os
import resource
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper

import toy_bundle
from scm_runtime import GenerationTimeoutError, Generator, InferenceError, ScmError
from scm_runtime.bundle.manifest import WEIGHTS
from scm_runtime.cli.commands import main
from scm_runtime.ort.graph_check import check_graph

STEP = "step.fp32.onnx"
EMBEDS = np.ones((2, toy_bundle.WIDTH), np.float32)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return toy_bundle.write_text_bundle(tmp_path / "toy.scm")


def open_with_step(bundle: Path, step: bytes) -> None:
    Generator(toy_bundle.replace_file(bundle, STEP, step), cache_dir=False, native_ops=False).close()


def step_model(bundle: Path) -> onnx.ModelProto:
    return onnx.load(bundle / STEP, load_external_data=False)


def function(domain: str, name: str, operators: list[tuple[str, str]]) -> onnx.FunctionProto:
    """Return a function of one input, which applies operators (domain and name) one after the other."""
    values = ["a", *(f"v{i}" for i in range(1, len(operators))), "b"]
    nodes = [helper.make_node(operator, [values[i]], [values[i + 1]], domain=where) for i, (where, operator) in enumerate(operators)]
    return helper.make_function(domain, name, ["a"], ["b"], nodes, [helper.make_opsetid("", 20), helper.make_opsetid("d", 1)])


def add_functions(model: onnx.ModelProto, functions: list[onnx.FunctionProto]) -> onnx.ModelProto:
    """Add functions, and call the first of them at the end of the graph."""
    last = model.graph.node[-1]
    result, last.output[0] = last.output[0], "before"
    model.graph.node.append(helper.make_node(functions[0].name, ["before"], [result], domain=functions[0].domain))
    model.functions.extend(functions)
    model.opset_import.append(helper.make_opsetid("d", 1))
    return model


# ----------------------------------------------------------------------------
# Functions.


def doubling_functions(depth: int) -> list[onnx.FunctionProto]:
    """Functions that each call the next one twice: 2**depth operators."""
    return [function("d", f"f{i}", [("d", f"f{i + 1}")] * 2 if i + 1 < depth else [("", "Neg")] * 2) for i in range(depth)]


@pytest.mark.parametrize("depth", [20, 400])
def test_functions_that_expand_to_too_many_operators(bundle: Path, depth: int) -> None:
    model = add_functions(step_model(bundle), doubling_functions(depth))
    with pytest.raises(InferenceError, match=r"step\.fp32\.onnx': a graph must have at most 200,000 operators with its functions inlined, got"):
        open_with_step(bundle, model.SerializeToString())


def test_long_chains_of_functions_are_counted_in_little_time(tmp_path: Path) -> None:
    """Quadratic time would be minutes; the numbers of operators would have 6 000 digits."""
    model = helper.make_model(helper.make_graph([helper.make_node("f0", ["x"], ["y"], domain="d")], "graph", [], []), functions=doubling_functions(20_000))
    (tmp_path / "chain.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ValueError, match=r"must have at most [0-9,]+ operators with its functions inlined"):
        check_graph(tmp_path / "chain.onnx")


def test_functions_in_a_subgraph_are_counted(bundle: Path) -> None:
    result = helper.make_tensor_value_info("inner", TensorProto.FLOAT, None)
    branch = helper.make_graph([helper.make_node("f0", ["before"], ["inner"], domain="d")], "branch", [], [result])
    model = add_functions(step_model(bundle), doubling_functions(20))
    call = model.graph.node[-1]
    call.CopyFrom(helper.make_node("If", ["true"], list(call.output), then_branch=branch, else_branch=branch))
    model.graph.node.append(helper.make_node("Constant", [], ["true"], value=helper.make_tensor("true", TensorProto.BOOL, [], [True])))
    with pytest.raises(InferenceError, match="must have at most 200,000 operators"):
        open_with_step(bundle, model.SerializeToString())


def test_functions_that_call_each_other_in_a_circle(bundle: Path) -> None:
    model = add_functions(step_model(bundle), [function("d", "f", [("d", "g")]), function("d", "g", [("d", "f")])])
    with pytest.raises(InferenceError, match=r"step\.fp32\.onnx': its functions call each other in a circle"):
        open_with_step(bundle, model.SerializeToString())


@pytest.mark.parametrize("domain", ["", "ai.onnx", "ai.onnx.ml", "com.microsoft"])
def test_functions_in_place_of_standard_operators(bundle: Path, domain: str) -> None:
    model = step_model(bundle)
    model.functions.append(function(domain, "Relu", [("", "Neg")]))
    with pytest.raises(InferenceError, match=rf"functions must not replace standard operators, got {domain or 'ai.onnx'}::Relu"):
        open_with_step(bundle, model.SerializeToString())


def test_functions_of_other_domains_are_accepted(bundle: Path) -> None:
    model = add_functions(step_model(bundle), doubling_functions(3))
    open_with_step(bundle, model.SerializeToString())


# ----------------------------------------------------------------------------
# Files that are no graphs.


@pytest.mark.parametrize(
    "contents",
    [b"", b"no graph", b"\x00" * 64, b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", b"\x3a\x7f\x00", b"\xff" * 32, b"\x0b\x0c", b"PK\x03\x04" + bytes(64)],
    ids=repr,
)
def test_files_that_are_no_graphs(bundle: Path, contents: bytes) -> None:
    with pytest.raises(ScmError, match=r"step\.fp32\.onnx'"):
        open_with_step(bundle, contents)


def test_a_file_larger_than_a_protobuf_message(bundle: Path) -> None:
    toy_bundle.replace_file(bundle, STEP, b"")
    os.truncate(bundle / STEP, 1 << 31)  # a sparse file
    manifest = (bundle / "scm.json").read_text()
    (bundle / "scm.json").write_text(manifest.replace('"size": 0', f'"size": {1 << 31}'))
    with pytest.raises(InferenceError, match=r"a graph must have .* bytes, got 2,147,483,648"):
        Generator(bundle, verify_integrity=False)


# ----------------------------------------------------------------------------
# External data.


def with_weights(**changed: str) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        model.graph.initializer[0].CopyFrom(toy_bundle.external_tensor("weights", [toy_bundle.WIDTH, 2], **changed))

    return change


def with_large_weights(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].CopyFrom(toy_bundle.external_tensor("weights", [1 << 40, 2]))


@pytest.mark.parametrize(
    "change",
    [
        with_weights(location="/etc/hostname"),
        with_weights(location="../secret"),
        with_weights(location="link"),
        with_weights(location="pipe"),
        with_weights(location="."),
        with_weights(location="*/_ORT_MEM_ADDR_/*", offset="4096"),
        with_weights(offset=str(1 << 62)),
        with_weights(offset="-8"),
        with_weights(offset="9" * 30),
        with_weights(offset="1000000"),
        with_weights(length=str(1 << 62)),
        with_large_weights,
    ],
)
@pytest.mark.parametrize("cached", [True, False], ids=["cache", "no cache"])
def test_external_data_outside_of_the_folder_or_the_file(bundle: Path, tmp_path: Path, change: Callable[[onnx.ModelProto], None], cached: bool) -> None:
    (tmp_path / "secret").write_bytes(bytes(64))
    (bundle / "link").symlink_to(tmp_path / "secret")
    os.mkfifo(bundle / "pipe")
    model = step_model(bundle)
    change(model)
    toy_bundle.replace_file(bundle, STEP, model.SerializeToString())
    with pytest.raises(InferenceError, match=r"cannot open '.*step\.fp32\.onnx'"):
        Generator(bundle, cache_dir=tmp_path / "cache" if cached else False)
    assert not cached or len(list((tmp_path / "cache" / "graphs").iterdir())) == 1  # of the noise graph
    assert (bundle / WEIGHTS).is_file()


# ----------------------------------------------------------------------------
# Memory and time.


@pytest.mark.parametrize("size", [1 << 40, 1 << 62])
def test_a_giant_constant(bundle: Path, size: int) -> None:
    """The address space is limited as a host would do it: ``ulimit -v``."""
    text = toy_bundle.STEP.replace(
        "    x_next = Add(abcd, gt4)\n",
        f"    size = Constant<value_ints=[{size}]>()\n    giant = ConstantOfShape(size)\n    length = Size(giant)\n    number = Cast<to=1>(length)\n"
        "    y = Add(abcd, gt4)\n    x_next = Add(y, number)\n",
    )
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    slow = toy_bundle.write_text_bundle(bundle.with_name("giant.scm"), graphs={"step": text})
    resource.setrlimit(resource.RLIMIT_AS, (64 << 30, hard))
    try:
        with pytest.raises(InferenceError, match=r"step\.fp32\.onnx"), Generator(slow, cache_dir=False) as generator:
            generator(prompt_embeds=EMBEDS, seed=1)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def test_an_endless_loop_is_ended_by_a_timeout_and_by_close(bundle: Path) -> None:
    """The loop has no trip count, and its condition stays true."""
    text = toy_bundle.STEP.replace(
        "    x_next = Add(abcd, gt4)\n",
        """
    one_int = Constant<value_int=1>()
    going = Cast<to=9>(one_int)
    none = Constant<value_float=0.0>()
    spun = Loop(, going, none) <body = spin (int64 lap, bool on, float value) => (bool still, float next) {
        still = Identity(on)
        next = Identity(value)
    }>
    y = Add(abcd, gt4)
    x_next = Add(y, spun)
""",
    )
    endless = toy_bundle.write_text_bundle(bundle.with_name("endless.scm"), graphs={"step": text})
    generator = Generator(endless, cache_dir=False)
    with pytest.raises(GenerationTimeoutError):
        generator(prompt_embeds=EMBEDS, seed=1, timeout=0.5)
    timer = threading.Timer(0.5, generator.close)
    timer.start()
    with pytest.raises(ScmError, match="closed while this call ran"):
        generator(prompt_embeds=EMBEDS, seed=1)


# ----------------------------------------------------------------------------
# Operators.


@pytest.mark.parametrize(
    "node",
    [
        helper.make_node("Unknown", ["before"], ["after"], domain="stranger"),
        helper.make_node("EPContext", ["before"], ["after"], domain="com.microsoft", embed_mode=0, ep_cache_context="/etc/hostname"),
        helper.make_node("Neg", ["nowhere"], ["after"]),
        helper.make_node("Constant", [], ["after"], value=toy_bundle.external_tensor("after", [4], location="/etc/hostname")),
    ],
    ids=["unknown domain", "compiled for a provider", "undefined input", "constant in another file"],
)
def test_operators_that_cannot_run(bundle: Path, node: onnx.NodeProto) -> None:
    model = step_model(bundle)
    result, model.graph.node[-1].output[0] = model.graph.node[-1].output[0], "before"
    model.graph.node.extend([node, helper.make_node("Add", ["before", "after"], [result])])
    model.opset_import.extend([helper.make_opsetid("stranger", 1), helper.make_opsetid("com.microsoft", 1)])
    with pytest.raises(InferenceError, match=r"cannot open '.*step\.fp32\.onnx'"):
        open_with_step(bundle, model.SerializeToString())


@pytest.mark.parametrize("step", [b"\x0b", b""], ids=["no graph", "empty"])
def test_the_command_line_reports_a_hostile_bundle_in_one_message(bundle: Path, tmp_path: Path, step: bytes) -> None:
    toy_bundle.replace_file(bundle, STEP, step)
    np.save(tmp_path / "prompt.npy", EMBEDS)
    result = CliRunner().invoke(main, ["generate", str(bundle), "-o", str(tmp_path / "out.png"), "--prompt-embeds", str(tmp_path / "prompt.npy")])
    assert result.exit_code in (1, 2)
    assert "step.fp32.onnx" in result.output.replace("\n", "")
    assert "Traceback" not in result.output
    assert not (tmp_path / "out.png").exists()


@pytest.mark.parametrize("when", ["opened", "run"])
def test_control_characters_of_a_graph_are_escaped_in_errors_and_logs(bundle: Path, tmp_path: Path, when: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "scm_runtime")
    model = step_model(bundle)
    result, model.graph.node[-1].output[0] = model.graph.node[-1].output[0], "before"
    name = "\x1b[31mred\x07"
    if when == "opened":
        model.graph.node.append(helper.make_node(name, ["before"], [result]))
    else:
        model.graph.node.append(helper.make_node("MatMul", ["before", "before"], [result], name=name))
    with pytest.raises(InferenceError, match=r"\\x1b\[31mred\\x07") as caught:
        open_and_call(toy_bundle.replace_file(bundle, STEP, model.SerializeToString()), tmp_path / "cache")
    for text in (str(caught.value), caplog.text):
        assert text.replace("\n", "").isprintable()


def open_and_call(bundle: Path, cache: Path) -> None:
    with Generator(bundle, device="cpu", cache_dir=cache) as generator:
        generator(prompt_embeds=EMBEDS, seed=1)
