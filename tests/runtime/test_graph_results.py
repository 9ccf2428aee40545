"""The results of a bundle's graphs are checked: a graph that returns another shape or dtype than the manifest declares is reported by name."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import toy_bundle
from scm_runtime import BundleError, Generator

EMBEDS = np.ones((2, toy_bundle.WIDTH), np.float32)
LATENTS = np.zeros((2, *toy_bundle.SAMPLE_SHAPE), np.float32)
IMAGES = np.zeros((2, *toy_bundle.IMAGE_SHAPE), np.uint8)

# Text, last statement and result of each graph.
GRAPHS = {
    "noise": (toy_bundle.NOISE, "noise = Mul(z, scale)", "float[batch,2,4,6] noise"),
    "step": (toy_bundle.STEP, "x_next = Add(abcd, gt4)", "float[batch,2,4,6] x_next"),
    "decode": (toy_bundle.DECODE, "image = Reshape(tiled, full)", "uint8[batch,8,12,3] image"),
    "encode": (toy_bundle.ENCODE, "x = Transpose<perm=[0, 3, 1, 2]>(kept)", "float[batch,2,4,6] x"),
    "preview": (toy_bundle.PREVIEW, "image = Identity(small)", "uint8[batch,4,6,3] image"),
}
EXPECTED = {
    "noise": "float32 [2, 2, 4, 6]",
    "step": "float32 [2, 2, 4, 6]",
    "decode": "uint8 [2, 8, 12, 3]",
    "encode": "float32 [2, 2, 4, 6]",
    "preview": "uint8 [2, *, *, 3]",
}
CALLS: dict[str, Callable[[Generator], object]] = {
    "noise": lambda generator: generator(prompt_embeds=EMBEDS, seed=[1, 2]),
    "step": lambda generator: generator(prompt_embeds=EMBEDS, seed=[1, 2]),
    "decode": lambda generator: generator.decode(LATENTS),
    "encode": lambda generator: generator.encode(IMAGES),
    "preview": lambda generator: generator.decode(LATENTS, preview=True),
}

# Statements that make another result of the right one, its type (T stands for the right element type), and the message's words for a batch of two.
Change = tuple[str, str, str]
FIRST = "row = Constant<value_ints=[0]>()"
SHAPES: dict[str, Change] = {
    "rank 0": ("flat = Cast<to=1>(right)\n    sum = ReduceSum<keepdims=0>(flat)\n    wrong = CastLike(sum, right)", "T", "[]"),
    "no rows": (f"{FIRST}\n    wrong = Slice(right, row, row)", "T[rows,a,b,c]", "[0, "),
    "one row for a batch": (f"{FIRST}\n    wrong = Gather<axis=0>(right, row)", "T[rows,a,b,c]", "[1, "),
    "a row too many": (f"{FIRST}\n    more = Gather<axis=0>(right, row)\n    wrong = Concat<axis=0>(right, more)", "T[rows,a,b,c]", "[3, "),
    "other sizes": ("wrong = Concat<axis=3>(right, right)", "T[rows,a,b,c]", "[2, "),
    "flattened": ("wrong = Flatten<axis=1>(right)", "T[rows,a]", "[2, "),
}
DTYPES: dict[str, Change] = {
    "int64": ("wrong = Cast<to=7>(right)", "int64[rows,a,b,c]", "tensor(int64)"),
    "float64": ("wrong = Cast<to=11>(right)", "double[rows,a,b,c]", "tensor(double)"),
    "string": ("wrong = Cast<to=8>(right)", "string[rows,a,b,c]", "tensor(string)"),
    "sequence": ("wrong = SequenceConstruct(right)", "seq(T[rows,a,b,c])", "seq(tensor("),
}


def write_bundle(folder: Path, graph: str, statements: str, result_type: str) -> Path:
    """Write a bundle with a graph that returns ``wrong`` instead of ``right``."""
    text, last, result = GRAPHS[graph]
    assert last in text
    assert f"({result})" in text
    changed = text.replace(last, f"right = {last.partition(' = ')[2]}\n    {statements}")
    changed = changed.replace(f"({result})", f"({result_type.replace('T', result.split('[')[0])} wrong)")
    return toy_bundle.write_text_bundle(folder / "odd.scm", graphs={graph: changed})


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("change", SHAPES.values(), ids=SHAPES)
def test_a_result_of_another_shape(graph: str, change: Change, tmp_path: Path) -> None:
    statements, result_type, shape = change
    bundle = write_bundle(tmp_path, graph, statements, result_type)
    message = rf"'{graph}\S*\.onnx' must return {re.escape(EXPECTED[graph])}, got \w+ {re.escape(shape)}"
    with Generator(bundle, device="cpu") as generator, pytest.raises(BundleError, match=message):
        CALLS[graph](generator)


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("change", DTYPES.values(), ids=DTYPES)
def test_a_result_of_another_dtype(graph: str, change: Change, tmp_path: Path) -> None:
    """It is found when the graph is opened: the optional graphs on their first use, the others with the bundle."""
    statements, result_type, dtype = change
    bundle = write_bundle(tmp_path, graph, statements, result_type)
    expected = "tensor(uint8)" if EXPECTED[graph].startswith("uint8") else "tensor(float)"
    with pytest.raises(BundleError, match=rf"'.*{graph}\S*\.onnx' must return {re.escape(expected)}, got {re.escape(dtype)}"):
        open_and_call(bundle, CALLS[graph])


def open_and_call(bundle: Path, call: Callable[[Generator], object]) -> None:
    with Generator(bundle, device="cpu") as generator:
        call(generator)


def test_one_row_for_a_batch_is_found_in_a_later_call_too(tmp_path: Path) -> None:
    """For one sample the result is right."""
    statements, result_type, _ = SHAPES["one row for a batch"]
    bundle = write_bundle(tmp_path, "step", statements, result_type)
    with Generator(bundle, device="cpu") as generator:
        assert len(generator(prompt_embeds=EMBEDS, seed=1)) == 1
        with pytest.raises(BundleError, match="must return"):
            generator(prompt_embeds=EMBEDS, seed=[1, 2])


def test_a_submitted_request_gets_the_error(tmp_path: Path) -> None:
    statements, result_type, _ = SHAPES["rank 0"]
    bundle = write_bundle(tmp_path, "step", statements, result_type)
    with Generator(bundle, device="cpu") as generator:
        error: Any = generator.submit(prompt_embeds=EMBEDS, seed=1).exception(timeout=60)
    assert isinstance(error, BundleError)
