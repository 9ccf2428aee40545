"""The report of ``scm-runtime doctor``: its parts, which are the JSON document, and how it is printed."""

from __future__ import annotations

from msgspec import Struct
from rich.console import Console
from rich.markup import escape
from rich.table import Table

MARKS = {True: "[green]yes[/]", False: "[bold red]NO[/]", None: "not tried"}


class Problem(Struct, frozen=True):
    """Something that does not work, and what would mend it where that is known."""

    what: str
    reason: str


class Provider(Struct, frozen=True):
    """One of ONNX Runtime's providers, tried."""

    name: str
    works: bool | None
    """None: it was not tried."""
    reason: str | None
    milliseconds: float | None
    """Of ten digits in two steps, the second time."""


class Gpu(Struct, frozen=True):
    """A GPU, as the driver describes it."""

    index: int
    name: str
    compute_capability: str
    memory_bytes: int


class CudaLibrary(Struct, frozen=True):
    """A library that ONNX Runtime's CUDA provider needs."""

    name: str
    found: bool
    path: str | None
    """In a Python package; None where the system's loader found it."""
    package: str | None


class Cuda(Struct, frozen=True):
    """What CUDA needs, as far as this ONNX Runtime can use it."""

    usable: bool
    reason: str | None
    driver: str | None
    """The newest CUDA that the driver runs: "13.2"."""
    devices: tuple[Gpu, ...] = ()
    libraries: tuple[CudaLibrary, ...] = ()
    install: str | None = None
    """A pip command for the libraries that are missing."""


class Ops(Struct, frozen=True):
    """The library of native kernels."""

    path: str | None
    version: str | None = None
    ops: dict[str, int] = {}
    cuda: str | None = None
    """The toolkit that its CUDA kernels were built with; None: it has none."""
    runs: dict[str, bool] = {}
    """By device."""
    reason: str | None = None


class Cache(Struct, frozen=True):
    """The folder of optimised graphs."""

    folder: str | None
    """None, without a reason: SCM_CACHE_DIR is empty, no cache is wanted."""
    writable: bool
    size_bytes: int
    reason: str | None = None


class Threads(Struct, frozen=True):
    """The cores of the machine and those that this process may use, and variables that change what is used."""

    cores: int
    available: int
    variables: dict[str, str]


class Report(Struct, frozen=True):
    """All of it, as ``scm-runtime doctor --json`` prints it."""

    works: bool
    """Something here can sample."""
    versions: dict[str, str | None]
    onnxruntime_wheels: dict[str, str]
    """Versions, by name."""
    providers: tuple[Provider, ...]
    cuda: Cuda
    native_ops: Ops
    cache: Cache
    threads: Threads
    problems: tuple[Problem, ...]


def show_report(report: Report) -> None:
    """Print a report."""
    console = Console()
    facts = Table(show_header=False, box=None, pad_edge=False)
    facts.add_column(no_wrap=True)
    facts.add_column(overflow="fold")
    versions = dict(report.versions)
    system, onnxruntime = versions.pop("platform"), versions.pop("onnxruntime")
    wheels = ", ".join(f"{name} {version}" for name, version in report.onnxruntime_wheels.items()) or "no wheel"
    threads = report.threads
    variables = "".join(f", {name}={value}" for name, value in threads.variables.items())
    for name, value in {
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items() if version),
        "platform": system or "",
        "ONNX Runtime": f"{onnxruntime or 'none'} (wheels: {wheels})",
        "CUDA": _cuda(report.cuda),
        "native kernels": _ops(report.native_ops),
        "cache": _cache(report.cache),
        "threads": f"{threads.available} of {threads.cores} cores for this process{variables}",
    }.items():
        facts.add_row(f"[bold]{name}[/]", escape(value))
    console.print(facts, highlight=False)
    if report.providers:
        table = Table("provider", "works", "ten digits, two steps")
        for provider in report.providers:
            table.add_row(provider.name, MARKS[provider.works], _result(provider))
        console.print(table)
    for problem in report.problems:
        console.print(f"[bold red]problem:[/] {escape(problem.what)}\n  {escape(problem.reason)}", highlight=False, soft_wrap=True)
    working = [provider.name for provider in report.providers if provider.works]
    console.print(f"{', '.join(working)} can sample here." if report.works else "[bold red]Nothing here can sample.[/]", highlight=False)


def _result(provider: Provider) -> str:
    if provider.milliseconds is not None:
        return f"{provider.milliseconds:.0f} ms"
    return "see below" if provider.works is False else escape(provider.reason or "")


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
