"""The plain export, without ``scm`` operators, in other runtimes: ONNX Runtime, TensorRT through ONNX Runtime, OpenVINO."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from _peers.case import WITHOUT_DOUBLE, Case, Draw

Arrays = Mapping[str, NDArray[Any]]


def open_onnxruntime(case: Case, n: int, threads: int, device: str, *, spinning: bool = False, prefer_nhwc: bool = False, tensorrt: bool = False) -> Draw:
    """Open it in ONNX Runtime with all graph optimizations and a fixed batch size; on a GPU with exhaustive search for convolution algorithms."""
    ort: Any = import_module("onnxruntime")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.add_free_dimension_override_by_name("batch", n)
    if device == "cpu":
        options.intra_op_num_threads = threads
        options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spinning)))
        options.add_session_config_entry("session.force_spinning_stop", "1")  # spinning threads would slow down the next peer
        session = ort.InferenceSession(str(case.plain("fp32")), options, providers=["CPUExecutionProvider"])
        return _on_host(case, n, lambda inputs: session.run(None, inputs)[0])
    cuda = ("CUDAExecutionProvider", {"cudnn_conv_algo_search": "EXHAUSTIVE", "prefer_nhwc": str(int(prefer_nhwc))})
    trt = ("TensorrtExecutionProvider", {"trt_fp16_enable": "1", "trt_cuda_graph_enable": "1"})
    providers = [trt, cuda] if tensorrt else [cuda]
    session = ort.InferenceSession(str(case.plain("fp16")), options, providers=providers)
    if (opened := session.get_providers()[0]) != providers[0][0]:
        raise RuntimeError(f"ONNX Runtime opened the session on {opened}, not on {providers[0][0]}")
    return _on_gpu(case, n, ort, session)


def open_openvino(case: Case, n: int, threads: int, device: str, *, hint: str, precision: str) -> Draw:
    """Open it in OpenVINO with static shapes, as OpenVINO recommends."""
    openvino: Any = import_module("openvino")
    core = openvino.Core()
    model = core.read_model(str(case.plain("fp32")))
    inputs = _inputs(case, n)
    model.reshape({name: list(value.shape) for name, value in inputs(0).items()})
    settings = {"PERFORMANCE_HINT": hint, "INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads}
    request = core.compile_model(model, device.upper(), settings).create_infer_request()

    def run(given: Arrays) -> NDArray[np.float32]:
        found: NDArray[np.float32] = request.infer(dict(given), share_inputs=True)[0]
        return found

    return _on_host(case, n, run)


def open_openvino_provider(case: Case, n: int, threads: int, device: str, *, hint: str, precision: str) -> Draw:
    """Open it in ONNX Runtime with OpenVINO's execution provider and a fixed batch size."""
    ort: Any = import_module("onnxruntime")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_free_dimension_override_by_name("batch", n)
    settings = {"PERFORMANCE_HINT": hint, "INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads}
    provider = {"device_type": device.upper(), "load_config": json.dumps({device.upper(): settings})}
    session = ort.InferenceSession(str(case.plain(WITHOUT_DOUBLE)), options, providers=[("OpenVINOExecutionProvider", provider)])
    if (opened := session.get_providers()[0]) != "OpenVINOExecutionProvider":
        raise RuntimeError(f"ONNX Runtime opened the session on {opened}, not on OpenVINOExecutionProvider")
    return _on_host(case, n, lambda inputs: session.run(None, inputs)[0])


def _inputs(case: Case, n: int) -> Callable[[int], dict[str, NDArray[Any]]]:
    """Return a function that returns the inputs of the k-th step."""
    (first, *noises), conditioning = case.noises(n), case.conditioning(n)
    x = (first * case.facts.initial_scale).astype(np.float32)
    times = [[np.full(n, value, np.float32) for value in pair] for pair in case.pairs()]

    def inputs(k: int) -> dict[str, NDArray[Any]]:
        return {"x": x, "t": times[k][0], "t_next": times[k][1], "noise": noises[k], **conditioning}

    return inputs


def _on_host(case: Case, n: int, run: Callable[[Arrays], NDArray[np.float32]]) -> Draw:
    inputs = _inputs(case, n)
    given = [inputs(k) for k in range(len(case.facts.times) - 1)]

    def draw() -> NDArray[np.float32]:
        x = given[0]["x"]
        for step in given:
            x = run({**step, "x": x})
        return x

    return draw


def _on_gpu(case: Case, n: int, ort: Any, session: Any) -> Draw:
    """Run with the state on the device; only the final state is copied back."""
    inputs = _inputs(case, n)
    steps = [{name: ort.OrtValue.ortvalue_from_numpy(value, "cuda", 0) for name, value in inputs(k).items()} for k in range(len(case.facts.times) - 1)]
    states = [steps[0]["x"], *(ort.OrtValue.ortvalue_from_shape_and_type(list(inputs(0)["x"].shape), np.float32, "cuda", 0) for _ in steps)]
    output, bindings = session.get_outputs()[0].name, []
    for k, step in enumerate(steps):
        binding = session.io_binding()
        for name, value in {**step, "x": states[k]}.items():
            binding.bind_ortvalue_input(name, value)
        binding.bind_ortvalue_output(output, states[k + 1])
        bindings.append(binding)

    def draw() -> NDArray[np.float32]:
        for binding in bindings:
            session.run_with_iobinding(binding)
        found: NDArray[np.float32] = states[-1].numpy()
        return found

    return draw
