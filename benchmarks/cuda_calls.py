"""What is the overhead of a call on a GPU, and which options of the CUDA provider are worth setting?

The overhead is the time of a call, from seeds to pixels on the host, minus the time of its graphs when they run back to back; the target is below 100 us.
Options: CUDA graphs, the search for convolution algorithms, channels last, TF32. Each is measured together with the first call of a shape, which includes
searching and capturing. Without a GPU nothing is measured.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import click
import numpy as np
from _common import RESULTS, interleaved

from scm_runtime import Generator
from scm_runtime.bundle.location import resolve_bundle
from scm_runtime.bundle.manifest import Dtype, read_manifest
from scm_runtime.bundle.solver_tables import from_times
from scm_runtime.common.load_onnxruntime import load_onnxruntime
from scm_runtime.devices.placement import resolve_device
from scm_runtime.engines.cuda.engine import CudaEngine
from scm_runtime.engines.cuda.open_engine import open_cuda_engine
from scm_runtime.engines.cuda.thread import CudaContext
from scm_runtime.engines.engine import Trajectory
from scm_runtime.errors import ScmError
from scm_runtime.inputs.call import Call
from scm_runtime.ort.native_ops import find_library
from scm_runtime.ort.options import SessionSettings

REPLAYS = 200
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "no CUDA graphs": {"cuda_graph": False},
    "EXHAUSTIVE": {"provider_options": {"cudnn_conv_algo_search": "EXHAUSTIVE"}},
    "DEFAULT": {"provider_options": {"cudnn_conv_algo_search": "DEFAULT"}},
    "prefer_nhwc": {"provider_options": {"prefer_nhwc": "1"}},
    "prefer_nhwc, EXHAUSTIVE": {"provider_options": {"prefer_nhwc": "1", "cudnn_conv_algo_search": "EXHAUSTIVE"}},
    "TF32": {"provider_options": {"use_tf32": "1"}},
}


def options(bundle: str, dtypes: Sequence[Dtype], batch_sizes: Sequence[int], repeats: int) -> dict[str, Any]:
    """Time every variant in turn, round after round."""
    figures: dict[str, Any] = {}
    for dtype in dtypes:
        generators: dict[str, Generator] = {}
        try:
            for name, arguments in VARIANTS.items():
                generators[name] = Generator(bundle, device="cuda", dtype=dtype, cache_dir=False, **arguments)
            for n in batch_sizes:
                candidates: dict[str, Callable[[], object]] = {}
                first: dict[str, float] = {}
                for name, generate in generators.items():
                    start = time.perf_counter()
                    generate(seed=0, batch_size=n, output_type="np")
                    first[name] = (time.perf_counter() - start) * 1e3
                    candidates[name] = lambda generate=generate, n=n: generate(seed=0, batch_size=n, output_type="np")  # type: ignore[misc]  # bound now
                timed = interleaved(candidates, repeats)
                figures[f"{dtype}, batch {n}"] = {name: {"first_call_ms": first[name], **timed[name]} for name in candidates}
        finally:
            for generate in generators.values():
                generate.close()
    return figures


def overhead(bundle: str, dtypes: Sequence[Dtype], batch_sizes: Sequence[int], repeats: int) -> dict[str, Any]:
    """Return the time of a call, of its graphs alone, and the difference."""
    figures: dict[str, Any] = {}
    folder = resolve_bundle(bundle, None).folder
    manifest, library = read_manifest(folder), find_library()
    settings = SessionSettings(resolve_device("cuda"), library=library.path if library else None)
    for dtype in dtypes:
        context = CudaContext(0)
        engine = open_cuda_engine(context, folder, manifest, dtype, settings)
        with Generator(bundle, device="cuda", dtype=dtype) as generate:
            for n in batch_sizes:
                conditioning = generate(seed=0, batch_size=n, output_type="np").conditioning
                whole = interleaved({"call": lambda generate=generate, n=n: generate(seed=0, batch_size=n, output_type="np")}, repeats)["call"]["median_ms"]  # type: ignore[misc]  # bound now
                own = engine.run(lambda: own_time_ms(engine, n, conditioning))  # noqa: B023 - called here
                steps = len(manifest.times["2"]) - 1
                graphs = own["noise"] * (steps + 1) + (own["step"] + own["finite"]) * steps + own["decode"]
                figures[f"{dtype}, batch {n}"] = {
                    "call_ms": whole,
                    "graphs_ms": graphs,
                    "overhead_us": (whole - graphs) * 1e3,
                    **{f"{k}_ms": v for k, v in own.items()},
                }
        engine.close()
    return figures


def own_time_ms(engine: CudaEngine, n: int, conditioning: Mapping[str, Any]) -> dict[str, float]:
    """Return the milliseconds of each graph, replayed back to back."""
    trajectory = Trajectory(Call(np.arange(n, dtype=np.int64), dict(conditioning), from_times(engine._manifest.times["2"]), None))
    engine.start(trajectory)
    engine.step([trajectory])
    engine.decode([trajectory])
    buffers = engine._buffers_for([trajectory])
    runs: dict[str, Callable[[], object]] = {"noise": buffers.noise, "step": buffers.step, "finite": buffers.check, "decode": buffers.decode}
    times = {}
    for name, run in runs.items():
        start = engine.timestamp()
        for _ in range(REPLAYS):
            run()
        times[name] = engine.elapsed(start, engine.timestamp()) * 1e3 / REPLAYS
    return times


@click.command()
@click.option("--bundle", default="digits", help="Folder or name of a bundle with times for two steps.")
@click.option("--batch-size", "batch_sizes", type=int, multiple=True, default=(1, 8, 64))
@click.option("--repeats", default=100)
def main(bundle: str, batch_sizes: tuple[int, ...], repeats: int) -> None:
    """Measure on the first GPU."""
    try:
        placement = resolve_device("cuda")
    except ScmError as error:
        print(f"no GPU, nothing measured: {error}")
        return
    dtypes = read_manifest(resolve_bundle(bundle, None).folder).dtypes
    figures = {"overhead": overhead(bundle, dtypes, batch_sizes, repeats), "options": options(bundle, dtypes, batch_sizes, repeats)}
    machine = {"gpu": placement.hardware, "bundle": bundle, "python": platform.python_version(), "onnxruntime": load_onnxruntime().__version__}
    text = json.dumps({"machine": machine, "figures": figures}, indent=2)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "cuda_calls.json").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
