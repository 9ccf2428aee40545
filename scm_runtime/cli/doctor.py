"""Printed output of ``scm-runtime doctor``: a report as tables."""

from __future__ import annotations

from rich.text import Text

from scm_runtime.cli.tables import BAD, GOOD, OutputConsole, facts_table, print_table
from scm_runtime.doctor.report import Cache, Cuda, Ops, Provider, Report

MARKS = {True: Text("yes", GOOD), False: Text("NO", BAD), None: Text("not tried")}


def show_report(report: Report) -> None:
    """Print a report."""
    console = OutputConsole()
    versions = dict(report.versions)
    system, onnxruntime = versions.pop("platform"), versions.pop("onnxruntime")
    wheels = ", ".join(f"{name} {version}" for name, version in report.onnxruntime_wheels.items()) or "no wheel"
    threads = report.threads
    variables = "".join(f", {name}={value}" for name, value in threads.variables.items())
    facts = {
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items() if version),
        "platform": system or "",
        "ONNX Runtime": f"{onnxruntime or 'none'} (wheels: {wheels})",
        "CUDA": _cuda(report.cuda),
        "native kernels": _ops(report.native_ops),
        "cache": _cache(report.cache),
        "threads": f"{threads.available} of {threads.cores} cores for this process{variables}",
    }
    console.print(facts_table(facts))
    if report.providers:
        rows = [(provider.name, MARKS[provider.works], _result(provider)) for provider in report.providers]
        print_table(console, ("provider", "works", "ten digits, two steps"), rows)
    for problem in report.problems:
        console.write_line(Text("problem: ", BAD), f"{problem.what}\n  {problem.reason}")
    working = [provider.name for provider in report.providers if provider.works]
    console.write_line(f"{', '.join(working)} can sample here." if report.works else Text("Nothing here can sample.", BAD))


def _result(provider: Provider) -> str:
    if provider.milliseconds is not None:
        return f"{provider.milliseconds:.0f} ms"
    return "see below" if provider.works is False else provider.reason or ""


def _cuda(cuda: Cuda) -> str:
    lines = [f"the driver runs CUDA {cuda.driver}"] if cuda.driver else []
    lines += [f"cuda:{gpu.index} is {gpu.name}, compute capability {gpu.compute_capability}, {gpu.memory_bytes / 2**30:.1f} GiB" for gpu in cuda.devices]
    if found := [library.name for library in cuda.libraries if library.found]:
        lines.append(f"found: {', '.join(found)}")
    if missing := [library.name for library in cuda.libraries if not library.found]:
        lines.append(f"missing: {', '.join(missing)}")
    verdict = "usable" if cuda.usable else "not usable, see below" if cuda.libraries else f"not usable: {cuda.reason}"
    return "\n".join([verdict, *lines])


def _ops(ops: Ops) -> str:
    if ops.path is None:
        return "no library; the function bodies in the graphs run"
    domains = ", ".join(f"{domain} {version}" for domain, version in ops.ops.items())
    runs = ", ".join(f"{device} {'yes' if ran else 'NO'}" for device, ran in ops.runs.items()) or "nowhere tried"
    return f"{ops.version} ({domains}), {f'CUDA {ops.cuda}' if ops.cuda else 'no CUDA kernels'}; run on: {runs}\n{ops.path}"


def _cache(cache: Cache) -> str:
    if cache.folder is None and cache.reason is None:
        return "none: SCM_CACHE_DIR is empty"
    state = "writable" if cache.writable else "not used, see below"
    return f"{cache.folder or 'no folder'}, {state}, {cache.size_bytes / 2**20:.1f} MiB"
