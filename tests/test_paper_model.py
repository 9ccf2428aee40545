"""The paper model counts what the networks compute and what the CUDA provider launches. Its times are assumptions, and no test checks them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch.utils.flop_counter import FlopCounterMode

from scm_export.networks.edm2 import PRESETS
from support import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))  # the scripts import one another from there

import paper_model
from _paper.forms import FORMS
from _paper.gpus import GPUS
from _paper.kernels import library
from _paper.layers import Operation, network, operations
from _paper.own import TILES, own, seconds

# Billions of multiply-adds of the published networks (arXiv 2312.02696, table 6), attention included.
PUBLISHED = {"XS": 45, "S": 102, "M": 181, "L": 282, "XL": 406, "XXL": 552}


@pytest.mark.parametrize("size", PUBLISHED)
def test_arithmetic_is_that_of_the_published_networks(size: str) -> None:
    assert sum(one.flop for one in operations(size)) / 2e9 == pytest.approx(PUBLISHED[size], rel=0.03)


def test_convolutions_and_weights_are_those_of_the_network() -> None:
    step, net = operations("XXS"), network(PRESETS["XXS"])
    x, t, label = (torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in (((1, 4, 64, 64), torch.float32), (1, torch.float32), (1, torch.int64)))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net(x, t, label)
    counted = counter.get_flop_counts()["Global"][torch.ops.aten.convolution]
    assert sum(one.flop for one in step if one.kind == "convolution") == counted
    embeddings = ("emb_noise.weight", "emb_label.weight")  # among the small operations
    weights = sum(value.numel() for name, value in net.named_parameters() if name not in embeddings and value.ndim)
    assert sum(one.weight_bytes for one in step) == 2 * weights


@pytest.mark.parametrize(("form", "launches"), [("channels first", 513), ("fused", 206)])
def test_launches_are_those_of_the_cuda_provider(form: str, launches: int) -> None:
    """EDM2-XXS in fp16 with ONNX Runtime 1.31.1, counted on the stub GPU: before convolutions were fused, and since then."""
    assert sum(launch.count for launch in FORMS[form](GPUS["H200"], operations("XXS"))) == launches


@pytest.mark.parametrize("name", GPUS)
@pytest.mark.parametrize("size", ["XXS", "XXL"])
def test_a_step_is_never_faster_than_the_data_sheet_and_fusing_never_slows_it_down(name: str, size: str) -> None:
    gpu, step = GPUS[name], operations(size)
    times = [sum(launch.seconds for launch in form(gpu, step)) for form in FORMS.values()]
    assert times == sorted(times, reverse=True)
    assert times[-1] > sum(one.flop for one in step) / gpu.tensor_flop
    assert times[-1] > sum(one.weight_bytes for one in step) / gpu.memory_bytes


def test_a_small_map_is_faster_with_a_split_sum() -> None:
    small = Operation("convolution", "conv_res0", 8, 64, 1792, 1792, 9)
    large = Operation("convolution", "conv_res0", 64, 4096, 448, 448, 9)
    assert own(GPUS["H200"], small).split > 1
    assert own(GPUS["H200"], small).seconds < library(GPUS["H200"], small).seconds
    assert library(GPUS["H200"], large).split == 1


CHOOSE = """
#include <iostream>
#include "convolution/choice.h"
int main() {
  int capability, multiprocessors, taps;
  std::int64_t samples, side, in, out;
  while (std::cin >> capability >> multiprocessors >> samples >> side >> in >> out >> taps) {
    const auto tile = scm::convolution::estimate({samples, side, side, in, out, taps}, {capability, multiprocessors});
    std::cout << static_cast<int>(tile.shape) << ' ' << tile.split << '\\n';
  }
}
"""
CAPABILITIES = {"H200": 90, "A100": 80}


@pytest.fixture(scope="module")
def choose(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library's choice of a tile that was not measured, as a program."""
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    folder, source = tmp_path_factory.mktemp("choice"), ROOT / "cpp_ops" / "src"
    (folder / "main.cc").write_text(CHOOSE)
    program = folder / "choose"
    files = [str(folder / "main.cc"), str(source / "convolution" / "choice.cc")]
    subprocess.run([compiler, "-std=c++17", "-DSCM_OPS_SM90A", f"-I{source}", *files, "-o", str(program)], check=True)
    return program


@pytest.mark.parametrize("batch_size", [1, 8])
@pytest.mark.parametrize("name", GPUS)
def test_the_estimates_are_those_of_the_tiles_that_the_library_chooses(choose: Path, name: str, batch_size: int) -> None:
    gpu = GPUS[name]
    layers = [one for size in PRESETS for one in operations(size, batch_size) if one.kind in ("convolution", "product")]
    plain = list({replace(one, name="", follower="") for one in layers})
    asked = [f"{CAPABILITIES[name]} {gpu.multiprocessors} {batch_size} {one.resolution} {one.inputs} {one.outputs} {one.taps}\n" for one in plain]
    answers = subprocess.run([str(choose)], input="".join(asked), capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(answers) == len(plain) > 100
    for one, answer in zip(plain, answers, strict=True):
        tile, split = map(int, answer.split())
        chosen = own(gpu, one)
        assert seconds(gpu, one, TILES[tile], split) == pytest.approx(seconds(gpu, one, chosen.tile, chosen.split), rel=1e-6), one


def test_weights_are_read_once_for_a_whole_batch() -> None:
    one, eight = operations("S"), operations("S", 8)
    assert [8 * first.pixels for first in one if first.kind == "convolution"] == [then.pixels for then in eight if then.kind == "convolution"]
    assert sum(then.weight_bytes for then in eight) == sum(first.weight_bytes for first in one)


def test_the_launches_of_a_log_are_counted_by_kind(tmp_path: Path) -> None:
    lines = [
        "1\t1\t0.1\tgraph\tlaunch 1 of graph 1 nodes 1 on stream 10",
        "2\t1\t0.2\tkernel\treplayed\t10\tphilox\t1 1 1\t1 1 1\t0",
        *(f"3\t1\t0.3\tgraph\tlaunch {run} of graph 2 nodes 300 on stream 10\n{kernels()}" for run in (1, 2)),
        "9\t1\t0.9\tgraph\tlaunch 2 of graph 3 nodes 3 on stream 10",
        "10\t1\t1.0\tkernel\treplayed\t10\tReduceSum\t1 1 1\t1 1 1\t0",
    ]
    (tmp_path / "log").write_text("\n".join(lines))
    result = CliRunner(catch_exceptions=False).invoke(paper_model.main, ["--size", "XXS", "--launches", str(tmp_path / "log")])
    assert result.exit_code == 0
    for row in ("| convolution | 2 |", "| transposes | 1 |", "| product with one row | 1 |", "| other | 1 |"):
        assert row in result.output
    assert "\n5 launches; on paper 513 (channels first)" in result.output


def kernels() -> str:
    """Return the lines of a step's kernels."""
    names = ("cudnn[conv x=1x5x64x64]", "cudnn[conv x=1x64x64x64]", "transposeNoOverlap", "cublasGemmEx[m=64 n=1 k=256 batch=1]", "UnaryElementWise")
    return "\n".join(f"4\t1\t0.4\tkernel\treplayed\t10\t{name}\t1 1 1\t1 1 1\t0" for name in names)
