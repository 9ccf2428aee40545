"""The noise and decode graphs on ONNX Runtime and on the ONNX reference evaluator, compared with known values and PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator
from onnxscript import ir

from scm_export import ops
from scm_export.graphs.build import build_decode, build_noise
from scm_export.model import ImageDecoder
from scm_runtime.common.load_onnxruntime import load_onnxruntime

onnxruntime = load_onnxruntime()

Run = Callable[..., NDArray[Any]]

# Seed 0, draw 0: the values of torch.randn on CUDA for a freshly seeded generator, as documented in rng_philox.py of AUTOMATIC1111.
KNOWN_NOISE = [-0.92466259, -0.42534415, -2.64384570, 0.14518388, -0.12086647, -0.57972564]


def with_onnxruntime(model: ir.Model) -> Run:
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    return lambda **inputs: np.asarray(session.run(None, inputs)[0])


def with_reference(model: ir.Model) -> Run:
    evaluator = ReferenceEvaluator(ir.to_proto(model))
    return lambda **inputs: np.asarray(next(iter(evaluator.run(None, inputs))))


@pytest.fixture(params=[with_onnxruntime, with_reference], ids=["onnxruntime", "reference"])
def load(request: pytest.FixtureRequest) -> Callable[[ir.Model], Run]:
    return request.param  # type: ignore[no-any-return]  # one of the two above


def noise(run: Run, seeds: list[int], draw: int = 0, scale: float = 1.0) -> NDArray[np.float32]:
    return run(seeds=np.array(seeds, np.int64), draw=np.array(draw, np.int64), scale=np.array(scale, np.float32))


def test_seed_0_gives_the_known_noise(load: Callable[[ir.Model], Run]) -> None:
    values = noise(load(build_noise((1, 2, 3), 20)), [0])
    assert values.shape == (1, 1, 2, 3)
    assert values.dtype == np.float32
    np.testing.assert_allclose(values.ravel(), KNOWN_NOISE, atol=1e-6, rtol=0)


def test_the_embedded_bundle_gives_the_known_noise() -> None:
    path = Path(__file__).parents[2] / "scm_runtime" / "bundles" / "digits.scm" / "noise.onnx"
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    values = noise(lambda **inputs: session.run(None, inputs)[0], [0])
    np.testing.assert_allclose(values.ravel()[:6], KNOWN_NOISE, atol=1e-6, rtol=0)


@pytest.mark.parametrize("draw", [0, 1, 7, 2**32 - 1])
def test_noise_is_pytorchs_for_all_seeds_and_draws(load: Callable[[ir.Model], Run], draw: int) -> None:
    seeds = [0, 7, -1, 2**32, -(2**63), 2**63 - 1]
    expected = ops.philox_normal(torch.tensor(seeds), draw, (3, 8, 8)).numpy()
    np.testing.assert_allclose(noise(load(build_noise((3, 8, 8), 20)), seeds, draw), expected, atol=1e-5, rtol=1e-5)


def test_noise_of_a_seed_does_not_depend_on_the_batch_and_scales(load: Callable[[ir.Model], Run]) -> None:
    run = load(build_noise((1, 4, 4), 20))
    together = noise(run, [5, 6, 7])
    np.testing.assert_array_equal(noise(run, [7, 5]), together[[2, 0]])
    np.testing.assert_allclose(noise(run, [5], scale=0.5), together[:1] * 0.5, rtol=1e-6)
    assert noise(run, []).shape == (0, 1, 4, 4)


@pytest.mark.parametrize("opset", [18, 20, 23])
def test_graphs_have_the_requested_opset(opset: int) -> None:
    model = build_noise((1, 2, 3), opset)
    assert ir.to_proto(model).opset_import[0].version == opset
    np.testing.assert_allclose(noise(with_onnxruntime(model), [0]).ravel(), KNOWN_NOISE, atol=1e-6, rtol=0)


def test_decode_is_to_image(load: Callable[[ir.Model], Run]) -> None:
    run = load(build_decode((3, 4, 5), ImageDecoder(scale=100.0, offset=127.5), 20))
    x = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    x[0, 0, 0, :3] = torch.tensor([0.01, -0.01, 9.0])
    image = run(x=x.numpy())
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(image, ops.to_image(x, 100.0, 127.5).numpy())
