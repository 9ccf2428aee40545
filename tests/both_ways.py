"""Checks that bundles run outside scm-runtime: in plain ONNX Runtime, and in ONNX Runtime with the native kernel library registered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from scm_export.example_inputs import example_conditioning
from scm_export.verification.tolerances import PIXEL_ATOL, sample_atol
from scm_runtime import Generator
from scm_runtime.bundle.manifest import Manifest, read_manifest
from scm_runtime.common.load_onnxruntime import load_onnxruntime
from scm_runtime.ort.options import MATMUL_PRECISION
from support import native_library, run_python

GENERATOR_ARGUMENTS = ("class_labels", "guidance_scale", "prompt_embeds", "prompt_attention_mask")  # named arguments of Generator.__call__
SEEDS = [3, 4]

# Program of a host that has plain ONNX Runtime at its default log level. Arguments: the graphs to open.
OPEN_GRAPHS = """
import sys
from scm_runtime.common.load_onnxruntime import load_onnxruntime
for path in sys.argv[1:]:
    load_onnxruntime().InferenceSession(path, providers=["CPUExecutionProvider"])
"""


def sessions(graph: Path) -> dict[str, Any]:
    """Open a graph in each way that a host can open it on the CPU. Returns the sessions by the name of the way."""
    ort = load_onnxruntime()

    def opened(*, library: bool, precision: str | None = None) -> Any:
        options = ort.SessionOptions()
        options.log_severity_level = 4
        if precision is not None:  # also registers the dense operators, if the processor supports them
            options.add_session_config_entry(MATMUL_PRECISION, precision)
        if library:
            options.register_custom_ops_library(str(native_library()))
        return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])

    return {"bare": opened(library=False), "library": opened(library=True), "medium": opened(library=True, precision="medium")}


def check_both_ways(bundle: Path) -> None:
    """Assert that every graph opens in each way, and that the composed sampler graphs return the same samples as Generator.

    bfloat16 graphs are skipped: ONNX Runtime has no CPU kernels for them.
    """
    manifest = read_manifest(bundle)
    check_no_unused_initializers(bundle)
    graphs = {path.name: sessions(path) for path in sorted(bundle.glob("*.onnx")) if ".bf16." not in path.name}
    conditioning = {item.name: example_conditioning(item, len(SEEDS)).numpy() for item in manifest.conditioning}
    composed = [(dtype, count) for dtype in manifest.dtypes if dtype != "bf16" for count in manifest.composed_steps]
    assert composed
    for dtype, count in composed:
        expected = _generate(bundle, dtype, count, conditioning)
        for way in ("bare", "library"):
            (found,) = graphs[f"sample-{count}.{dtype}.onnx"][way].run(None, {"seeds": np.array(SEEDS), **conditioning})
            np.testing.assert_allclose(found.astype(float), expected.astype(float), rtol=0, atol=_atol(manifest, dtype, expected), err_msg=f"{dtype}, {way}")


def check_no_unused_initializers(bundle: Path) -> None:
    """Assert that the nodes of every graph read all its initializers, and that ONNX Runtime logs no warning about a graph that it opens."""
    paths = sorted(bundle.glob("*.onnx"))
    unused = {path.name: names for path in paths if (names := unused_initializers(onnx.load(path, load_external_data=False).graph))}
    assert not unused
    log = run_python(OPEN_GRAPHS, *(path for path in paths if ".bf16." not in path.name)).stderr
    assert "[W:onnxruntime:, graph.cc" not in log, log


def unused_initializers(graph: onnx.GraphProto) -> set[str]:
    """Return the names of a graph's initializers that no node and no output reads, nodes of subgraphs included."""
    return {tensor.name for tensor in graph.initializer} - _names_read(graph)


def _names_read(graph: onnx.GraphProto) -> set[str]:
    names = {value.name for value in graph.output}
    for node in graph.node:
        names.update(node.input)
        for attribute in node.attribute:
            for subgraph in (attribute.g, *attribute.graphs):  # g is an empty graph if the attribute has another type
                names |= _names_read(subgraph)
    return names


def _generate(bundle: Path, dtype: Any, count: int, conditioning: dict[str, NDArray[Any]]) -> NDArray[Any]:
    arguments: dict[str, Any] = {name: value for name, value in conditioning.items() if name in GENERATOR_ARGUMENTS}
    others = {name: value for name, value in conditioning.items() if name not in GENERATOR_ARGUMENTS}
    with Generator(bundle, dtype=dtype, device="cpu", native_ops=False) as generate:
        return np.asarray(generate(**arguments, conditioning=others, seed=SEEDS, num_inference_steps=count, output_type="np").array)


def _atol(manifest: Manifest, dtype: str, expected: NDArray[Any]) -> float:
    if expected.dtype == np.uint8:
        return PIXEL_ATOL[dtype, manifest.weights_dtype]
    return sample_atol(dtype, manifest.weights_dtype, max(manifest.sigma_data, float(expected.std())))
