"""Verification: which cases are compared, that damaged bundles fail, and that emulated bfloat16 equals torch's bfloat16."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from torch import Tensor, nn

from both_ways import check_both_ways
from scm_export.errors import ExportError, VerificationError
from scm_export.exporter import export_model
from scm_export.graphs.trace import trace_map
from scm_export.model import ImageNetwork, Model, Reference
from scm_export.options import Options
from scm_export.parametrisation import sample
from scm_export.precision import Precision
from scm_export.verification import bf16_emulation, compare, references, verify
from scm_export.verification.references import References, compute_references
from scm_export.verification.tolerances import passes
from scm_export.verification.verify import verify_bundle
from scm_export.writer import BundleWriter
from scm_runtime.bundle.manifest import WEIGHTS, Manifest, Source, VerifiedCase
from scm_runtime.common.load_onnxruntime import load_onnxruntime
from scm_runtime.engines.engine import Trajectory
from scm_runtime.engines.host import HostEngine
from scm_runtime.ort.open_session import open_session
from scm_runtime.ort.options import SessionSettings
from scm_runtime.ort.session import Session
from support import native_library
from text_model import STATE, text_model

onnxruntime = load_onnxruntime()

SOURCE = Source(file="none", sha256="0" * 64)


def quiet(_stage: str) -> None:
    pass


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    """Bundle of the text model, exported without verification."""
    done = export_model(text_model(), tmp_path_factory.mktemp("text") / "text.scm", SOURCE, Options(steps=(2,), verify=False))
    return done.path, done.manifest


@pytest.fixture(scope="module")
def expected() -> References:
    return compute_references(text_model(), quiet)


def test_all_graphs_are_compared_in_every_batch_guidance_and_text_length(bundle: tuple[Path, Manifest], expected: References) -> None:
    result = verify_bundle(*bundle, expected, None, quiet)
    result.require_passed()
    assert {(case.graph, case.batch_size, case.steps, case.guidance_scale, case.sizes.get("tokens")) for case in result.cases} == {
        *(("step", n, steps, guidance, tokens) for n in (1, 3) for steps in (1, 2) for guidance, tokens in ((4.5, 7), (6.75, 300))),
        *(("sample-2", n, 2, guidance, tokens) for n in (1, 3) for guidance, tokens in ((4.5, 7), (6.75, 300))),
        *(("step", n, 0, 4.5, 7) for n in (3, 6)),  # single steps, and again in a larger batch than the network was called with
        *((graph, n, 0, None, None) for graph in ("decode", "preview", "encode") for n in (1, 3)),
    }
    single = next(case for case in result.cases if case.times)
    assert len(set(single.times)) == 3
    assert all(0 < t < 1.57 for t in single.times)
    assert all(case.max_abs < 1e-4 for case in result.cases if case.graph in ("step", "encode"))
    assert all(case.mean_abs is not None and case.mean_abs <= case.max_abs for case in result.cases)
    assert not [path for path in bundle[0].iterdir() if path.name not in {*bundle[1].files, "scm.json"}]


def test_every_graph_opens_with_and_without_the_native_library(bundle: tuple[Path, Manifest]) -> None:
    check_both_ways(bundle[0])


def flip(path: Path) -> None:
    """Damage a graph so that its output is mirrored."""
    model = onnx.load(path, load_external_data=False)
    name = model.graph.output[0].name
    for node in model.graph.node:
        node.output[:] = [f"{name}/unflipped" if output == name else output for output in node.output]
    values = {"starts": -1, "ends": -(2**31), "axes": -1 if "encode" in path.name else 2, "steps": -1}
    model.graph.initializer.extend(numpy_helper.from_array(np.array([value]), f"flip/{key}") for key, value in values.items())
    model.graph.node.append(helper.make_node("Slice", [f"{name}/unflipped", *(f"flip/{key}" for key in values)], [name]))
    path.write_bytes(model.SerializeToString())


@pytest.mark.parametrize("graph", ["noise", "step", "sample-2", "decode", "preview", "encode"])
def test_a_damaged_graph_fails_only_in_its_own_cases(graph: str, bundle: tuple[Path, Manifest], expected: References, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(bundle[0], tmp_path / "damaged.scm"))
    flip(damaged / ("noise.onnx" if graph == "noise" else f"{graph}.fp32.onnx"))
    result = verify_bundle(damaged, bundle[1], expected, None, quiet)
    failed = [case for case in result.cases if not passes(case)]
    assert {case.graph for case in failed} == {"step" if graph == "noise" else graph}
    if graph in ("step", "noise"):
        sampling = {(case.batch_size, case.steps, case.guidance_scale) for case in failed if case.steps}
        assert sampling == {(n, steps, guidance) for n in (1, 3) for steps in (1, 2) for guidance in (4.5, 6.75)}
        assert any(case.times for case in failed) == (graph == "step")
    with pytest.raises(VerificationError, match="over tolerance") as caught:
        result.require_passed()
    assert caught.value.report is not None
    assert len(caught.value.report.cases) == len(result.cases)


def change_attribute_for_kernels(path: Path, attribute: str, value: float | None) -> None:
    """Damage a graph for the kernels only: set an attribute of its nodes to another value, or remove it, and keep the old value in the function bodies."""
    model = onnx.load(path, load_external_data=False)
    (old,) = {item.f for node in model.graph.node for item in node.attribute if item.name == attribute}
    for function in model.functions:
        for node in function.node:
            for item in node.attribute:
                if item.ref_attr_name == attribute:
                    item.CopyFrom(helper.make_attribute(item.name, old))
        kept = [name for name in function.attribute if name != attribute or value is not None]
        function.attribute[:] = kept
    for node in model.graph.node:
        others = [item for item in node.attribute if item.name != attribute]
        changed = [helper.make_attribute(attribute, value) for item in node.attribute if item.name == attribute and value is not None]
        del node.attribute[:]
        node.attribute.extend([*others, *changed])
    path.write_bytes(model.SerializeToString())


@pytest.mark.parametrize("graph", ["step", "sample-2"])
@pytest.mark.parametrize(("value", "says"), [(0.9, "over tolerance; the worst is {graph}"), (None, "does not run: .*{graph}.*sigma_data")])
def test_a_graph_that_is_wrong_only_with_the_native_library_fails(
    graph: str, value: float | None, says: str, bundle: tuple[Path, Manifest], expected: References, tmp_path: Path
) -> None:
    native_library()
    damaged = Path(shutil.copytree(bundle[0], tmp_path / "damaged.scm"))
    change_attribute_for_kernels(damaged / f"{graph}.fp32.onnx", "sigma_data", value)
    result = verify_bundle(damaged, bundle[1], expected, None, quiet)
    assert all(passes(case) for case in result.cases)
    with pytest.raises(VerificationError, match=f"(?s)with the native library registered, .*{says.format(graph=graph)}.*--no-custom-ops") as caught:
        result.require_passed()
    assert caught.value.report is not None
    # A bundle whose manifest lists no operators is compared without the library, since no host would register it.
    plain = msgspec.structs.replace(bundle[1], ops={})
    verify_bundle(damaged, plain, expected, None, quiet).require_passed()


def test_every_graph_of_a_large_network_is_opened_with_the_native_library(
    bundle: tuple[Path, Manifest], expected: References, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    native_library()
    opened: list[tuple[str, bool]] = []

    def noted(path: Path, settings: SessionSettings | None = None) -> Session:
        opened.append((path.name, settings is not None and settings.library is not None))
        return open_session(path, settings)

    monkeypatch.setattr(compare, "open_session", noted)
    monkeypatch.setattr(compare, "LARGE_NETWORK", 0)
    monkeypatch.setattr(verify, "LARGE_NETWORK", 0)
    verify_bundle(*bundle, expected, None, quiet).require_passed()
    for library in (False, True):
        assert {name for name, with_library in opened if with_library == library} == {path.name for path in bundle[0].glob("*.onnx")}


def test_samples_come_from_the_loop_of_the_runtime(bundle: tuple[Path, Manifest], expected: References, monkeypatch: pytest.MonkeyPatch) -> None:
    start = HostEngine.start

    def start_elsewhere(engine: HostEngine, trajectory: Trajectory) -> None:
        start(engine, trajectory)
        engine.set_state(trajectory, -engine.read_state(trajectory))

    monkeypatch.setattr(HostEngine, "start", start_elsewhere)
    failed = [case for case in verify_bundle(*bundle, expected, None, quiet).cases if not passes(case)]
    assert {(case.graph, case.batch_size, case.steps) for case in failed} == {("step", n, steps) for n in (1, 3) for steps in (1, 2)}


def ignore_mask(_module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    *others, conditioning = arguments
    return *others, {**conditioning, "prompt_attention_mask": torch.ones_like(conditioning["prompt_attention_mask"])}


def test_a_graph_that_ignores_the_mask_fails(bundle: tuple[Path, Manifest]) -> None:
    model = text_model()
    model.step.register_forward_pre_hook(ignore_mask)
    result = verify_bundle(*bundle, compute_references(model, quiet), None, quiet)
    assert not result.passed


def test_a_graph_that_does_not_run_is_a_failure_with_the_cases_so_far(bundle: tuple[Path, Manifest], expected: References, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(bundle[0], tmp_path / "damaged.scm"))
    (damaged / "decode.fp32.onnx").write_bytes(b"no graph")
    result = verify_bundle(damaged, bundle[1], expected, None, quiet)
    assert {case.graph for case in result.cases} == {"sample-2"}
    with pytest.raises(VerificationError, match=r"does not run .*decode\.fp32\.onnx"):
        result.require_passed()


def test_a_model_that_gives_nan_is_a_failure(bundle: tuple[Path, Manifest]) -> None:
    model = text_model()
    with torch.no_grad():
        next(model.step.parameters()).fill_(math.inf)
    result = verify_bundle(*bundle, compute_references(model, quiet), None, quiet)
    with pytest.raises(VerificationError, match="not finite"):
        result.require_passed()


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_half_precision_is_compared_in_both_dtypes_and_by_psnr(dtype: str, tmp_path: Path) -> None:
    done = export_model(text_model(extras=False), tmp_path / "half.scm", SOURCE, Options(dtype=dtype, steps=(1,)))  # type: ignore[arg-type]  # one of the two above
    assert done.manifest.verification is not None
    cases = done.manifest.verification.cases
    assert {(case.graph, case.dtype) for case in cases} == {(g, d) for g in ("step", "sample-1", "decode") for d in (dtype, "fp32")}
    assert all(case.min_psnr == 40 and (case.psnr is None or case.psnr >= 40) for case in cases)
    rounded = {d: max(case.max_abs for case in cases if (case.graph, case.dtype) == ("step", d)) for d in (dtype, "fp32")}
    assert rounded[dtype] > rounded["fp32"] > 1e-5  # only the weights are rounded in fp32 graphs
    assert {path.name for path in done.path.iterdir()} == {*done.manifest.files, "scm.json"}  # no emulated graph is left


def test_samples_that_are_latents_are_compared_as_such(tmp_path: Path) -> None:
    done = export_model(text_model(latents=True, extras=False), tmp_path / "latents.scm", SOURCE, Options(steps=(2,)))
    assert done.manifest.verification is not None
    cases = done.manifest.verification.cases
    assert {case.graph for case in cases} == {"step", "sample-2"}
    assert all(case.psnr is None or case.psnr > 80 for case in cases)  # relative to the range of the latents


def test_the_original_sampler_is_the_reference_if_there_is_one(bundle: tuple[Path, Manifest]) -> None:
    model = text_model()
    step_counts: list[int] = []

    def original(noises: list[Tensor], times: tuple[float, ...], conditioning: dict[str, Tensor]) -> Tensor:
        step_counts.append(len(times) - 1)
        return sample(model.step, noises, times, model.initial_scale, conditioning)

    model.reference = Reference("their sampler", original)  # type: ignore[arg-type]  # noises are a list
    result = verify_bundle(*bundle, compute_references(model, quiet), None, quiet)
    assert result.passed
    assert result.reference == "their sampler"
    assert step_counts == [1, 2, 1, 2]


def test_a_difference_from_the_original_sampler_is_noticed(bundle: tuple[Path, Manifest]) -> None:
    model = text_model()
    model.reference = Reference("their sampler", lambda noises, times, given: 1.01 * sample(model.step, noises, times, model.initial_scale, given))
    result = verify_bundle(*bundle, compute_references(model, quiet), None, quiet)
    assert {case.steps for case in result.cases if not passes(case)} == {1, 2}


def test_large_models_are_compared_at_every_point_but_not_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(references, "LARGE_NETWORK", 100)
    monkeypatch.setattr(references, "LARGE_IMAGE", 100)
    model = replace(text_model(), times={count: (*np.linspace(1.5, 0.1, count).tolist(), 0.0) for count in (1, 2, 4)})
    evaluated: list[int] = []
    model.step.register_forward_pre_hook(lambda _module, arguments: evaluated.append(len(arguments[0])))
    samples = compute_references(model, quiet).samples
    assert [(one.steps, one.batch_sizes, one.case.guidance_scale, one.case.sizes["tokens"]) for one in samples] == [
        (1, (1,), 4.5, 7),
        (2, (1, 3), 4.5, 7),
        (1, (1,), 6.75, 300),
    ]
    assert evaluated == [1, 3, 3, 1, 3]  # 11 samples: nothing is computed twice
    assert [None if one.pixels is None else len(one.pixels) for one in samples] == [1, 1, None]


def test_long_samplers_are_left_out() -> None:
    model = replace(text_model(), times={count: (*np.linspace(1.5, 0.1, count).tolist(), 0.0) for count in (2, 4, 8)})
    assert {one.steps for one in compute_references(model, quiet).samples} == {2, 4}


def test_a_graph_whose_bfloat16_cannot_be_emulated_is_a_failure(bundle: tuple[Path, Manifest], expected: References, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_model: onnx.ModelProto) -> onnx.ModelProto:
        raise ExportError("no type is known")

    monkeypatch.setattr(bf16_emulation, "emulate_bf16", refuse)
    folder, manifest = bundle
    shutil.copy(folder / "step.fp32.onnx", folder / "step.bf16.onnx")
    try:
        result = verify_bundle(folder, msgspec.structs.replace(manifest, dtypes=("bf16",), composed_steps=()), expected, None, quiet)
    finally:
        (folder / "step.bf16.onnx").unlink()
    with pytest.raises(VerificationError, match="no type is known"):
        result.require_passed()


@pytest.mark.parametrize(
    ("unit", "times", "single_times", "scales"),
    [
        ("radians", (1.5, 0.0), [1.125, 0.75, 0.375], [0.5] * 3),
        ("sigma", (80.0, 0.002), [80**0.75 * 0.002**0.25, 0.4, 80**0.25 * 0.002**0.75], [5.68, 0.64, 0.5]),
        ("timestep", (999.0, 0.0), [749, 500, 250], [0.5] * 3),
    ],
)
def test_single_evaluations_start_from_states_as_they_are_at_their_times(
    unit: str, times: tuple[float, ...], single_times: list[float], scales: list[float]
) -> None:
    model = replace(text_model(), time_unit=unit, times={1: times})  # type: ignore[arg-type]  # one of the three above
    (single,) = compute_references(model, quiet).single_steps
    np.testing.assert_allclose(single.inputs["t"], single_times, rtol=1e-3)
    np.testing.assert_array_equal(single.inputs["t_next"], np.float32(times[-1]))
    np.testing.assert_allclose(single.inputs["x"].reshape(3, -1).std(axis=1), scales, rtol=0.15)


def test_an_absolute_tolerance_replaces_all_others(bundle: tuple[Path, Manifest], expected: References) -> None:
    strict, loose = (verify_bundle(*bundle, expected, atol, quiet) for atol in (1e-12, 1e9))
    assert {case.atol for case in strict.cases if case.graph == "step"} == {1e-12}
    assert not any(passes(case) for case in strict.cases if case.graph == "step")
    assert loose.passed


@pytest.mark.parametrize(("max_abs", "psnr", "good"), [(0.1, 45.0, True), (0.1, None, True), (0.1, 39.0, False), (0.3, 45.0, False), (math.nan, None, False)])
def test_a_case_must_pass_both_the_largest_difference_and_psnr(max_abs: float, psnr: float | None, good: bool) -> None:
    case = VerifiedCase(graph="step", dtype="fp16", batch_size=1, steps=1, max_abs=max_abs, atol=0.2, psnr=psnr, min_psnr=40.0)
    assert passes(case) == good
    assert passes(msgspec.structs.replace(case, psnr=math.nan)) is False


def test_tf32_is_off_only_while_references_are_computed() -> None:
    backends: Any = torch.backends

    def settings() -> tuple[str, ...]:
        return backends.cuda.matmul.fp32_precision, backends.cudnn.conv.fp32_precision, backends.mkldnn.matmul.fp32_precision

    seen, model, untouched = set(), text_model(), backends.cuda.matmul.fp32_precision
    model.step.register_forward_pre_hook(lambda *_: seen.add(settings()))
    backends.cuda.matmul.fp32_precision = "tf32"
    try:
        before = settings()
        compute_references(model, quiet)
        assert seen == {("ieee", "ieee", "ieee")}
        assert settings() == before
    finally:
        backends.cuda.matmul.fp32_precision = untouched


# ----------------------------------------------------------------------------
# Emulation of bfloat16.


def stack(*layers: nn.Module) -> Precision:
    return Precision(nn.Sequential(*layers).requires_grad_(False).eval())


def write(network: Precision, x: Tensor, folder: Path) -> Path:
    """Write the bfloat16 graph of a network with bfloat16 weights; returns its path."""
    folder.mkdir()
    writer = BundleWriter(folder)
    for parameter in network.parameters():
        parameter.data = parameter.data.bfloat16()
    network.compute_dtype = torch.bfloat16
    writer.graph("map.onnx", trace_map("map", network, x, "x", "y", 22))
    writer.close()
    return folder / "map.onnx"


def convolutional() -> Precision:
    return stack(nn.Conv2d(4, 48, 3, padding=1), nn.ReLU(), nn.Conv2d(48, 48, 3, padding=1), nn.Tanh(), nn.Conv2d(48, 5, 1))


def dense() -> Precision:
    return stack(nn.Flatten(), nn.Linear(192, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 48), nn.Softmax(-1))


@pytest.mark.parametrize("make", [convolutional, dense])
def test_emulated_bfloat16_is_torchs_bfloat16(make: Callable[[], Precision], tmp_path: Path) -> None:
    torch.manual_seed(0)
    network, x = make(), torch.randn(3, *STATE)
    path = write(network, x, tmp_path / "half")
    half = network(x)
    network.compute_dtype = torch.float32
    full = network(x)
    with bf16_emulation.emulated_graph(path) as emulated:
        session = open_session(emulated)
        assert emulated.stat().st_size < 20_000 < (tmp_path / "half" / WEIGHTS).stat().st_size  # refers to the weights
    assert [file.name for file in (tmp_path / "half").iterdir() if "emulated" in file.name] == []
    found = torch.from_numpy(session(x=x.numpy()))
    rounding = (half - full).abs().mean()
    assert rounding > 1e-4 * full.abs().mean()
    assert (found - half).abs().mean() < 0.35 * rounding
    assert (found - full).abs().mean() > 0.5 * rounding
    assert torch.equal(found, found.bfloat16().float())


def test_emulation_changes_bfloat16_values_only() -> None:
    """Casts to and from bfloat16, constants, comparisons, and a lossless operator whose result is not rounded again."""
    model = onnx.parser.parse_model("""
        <ir_version: 10, opset_import: ["": 22]>
        g (float[N, 4] x) => (float[N, 4] y, bool[N, 4] above, float[N, 4] wide)
        {
            half = Cast <to = 16> (x)
            two = Constant <value = bfloat16[1] {16384}> ()
            third = Constant <value = float[1] {0.333333343}> ()
            third_half = CastLike (third, two)
            scaled = Mul (half, third_half)
            above = Greater (scaled, two)
            kept = Where (above, two, scaled)
            y = Cast <to = 1> (kept)
            wide_x = Cast <to = 1> (half)
            wide = Mul (wide_x, third)
        }
    """)
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)) * 5
    third = torch.tensor(1 / 3)
    scaled = x.bfloat16() * third.bfloat16()
    expected = [torch.where(scaled > 2, torch.tensor(2.0), scaled.float()), scaled > 2, x.bfloat16().float() * third]
    session = onnxruntime.InferenceSession(bf16_emulation.emulate_bf16(model).SerializeToString(), providers=["CPUExecutionProvider"])
    outputs = session.run(None, {"x": x.numpy()})
    for found, wanted in zip(outputs, expected, strict=True):
        np.testing.assert_array_equal(found, wanted.numpy())


def test_models_with_large_images_are_still_compared_by_images(bundle: tuple[Path, Manifest], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(references, "LARGE_IMAGE", 1)
    model: Model = text_model()
    assert isinstance(model.decoder, ImageNetwork)
    result = verify_bundle(*bundle, compute_references(model, quiet), None, quiet)
    result.require_passed()
    assert {(case.graph, case.batch_size) for case in result.cases if case.graph != "step"} == {(g, 1) for g in ("sample-2", "decode", "preview", "encode")}
    assert [len(pair.expected) for pair in result.images] == [1, 1]
