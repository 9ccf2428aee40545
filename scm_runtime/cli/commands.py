"""``scm-runtime``: draw samples, look into bundles, check that one works here, and measure how fast."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, cast

import click

from scm_runtime._version import __version__
from scm_runtime.cli.parameter_type import ParamType
from scm_runtime.errors import InvalidArgumentError, ScmError

if TYPE_CHECKING:
    from scm_runtime.bundle.manifest import Dtype
    from scm_runtime.ort.native_ops import NativeOps

USAGE, FAILURE, INTERRUPTED = 2, 1, 130
USAGE_ERRORS = (InvalidArgumentError, FileNotFoundError)  # the second: no bundle, checkpoint or repository by that name


@contextmanager
def clean_errors() -> Iterator[None]:
    """Turn this project's errors into one message on stderr and an exit code, without a traceback.

    The code is 2 for a wrong argument or a path with nothing there, 130 for Ctrl-C, 1 for the rest.
    """
    try:
        yield
    except ScmError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(USAGE if isinstance(error, USAGE_ERRORS) else FAILURE)
    except MemoryError:
        click.echo("Error: out of memory. Try a smaller batch.", err=True)
        sys.exit(FAILURE)
    except KeyboardInterrupt as interrupt:
        click.echo(f"Interrupted{': ' * bool(str(interrupt))}{interrupt}", err=True)
        sys.exit(INTERRUPTED)


class IntegerList(ParamType[tuple[int, ...]]):
    """Integers separated by commas, each at least ``minimum``; with a minimum the list may be empty."""

    name = "integers"

    def __init__(self, minimum: int | None = None) -> None:
        self.minimum = minimum

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        text = str(value)
        try:
            numbers = () if self.minimum is not None and not text.strip() else tuple(int(part) for part in text.split(","))
            if self.minimum is not None and any(number < self.minimum for number in numbers):
                raise ValueError(numbers)
        except ValueError:
            bound = "" if self.minimum is None else f" of at least {self.minimum}"
            self.fail(f"must be one or more integers{bound}, separated by commas; got {text!r}", param, ctx)
        return numbers


skip_integrity_option = click.option("--skip-integrity", is_flag=True, help="Do not compare SHA-256 sums: saves the reading of large bundles.")
native_ops_option = click.option(
    "--native-ops/--no-native-ops",
    default=None,
    help="Run the native library's kernels, or the function bodies in the graphs. By default the kernels where they can be used.",
)
device_option = click.option("--device", default="auto", show_default=True, help="cpu, cuda or cuda:N; auto takes a GPU where one can be had, else the CPU.")
revision_option = click.option("--revision", help="Of a repository on the hub: branch, tag or commit. By default its main branch.")
threads_option = click.option("--threads", type=int, help="Threads to compute with; by default one a core.")


@click.group()
@click.version_option(__version__)
def main() -> None:
    """Sample consistency models in one or two steps through ONNX Runtime."""


@main.command()
@click.argument("bundle")
@click.option(
    "-o",
    "--out",
    required=True,
    help="Picture to write: the image, or a grid of all. For a file an image, a name with {seed} or {index}, or a folder, ending in /. "
    "Existing files are replaced.",
)
@click.option("--labels", help="Classes, by number or name, separated by commas: 3,1,4. By default seed modulo the number of classes.")
@click.option("--seed", type=IntegerList(), help="One seed (the images get seed, seed + 1, …), or one an image, separated by commas. By default random.")
@click.option("--steps", type=int, help="Sampling steps; 2 where the bundle has them.")
@click.option("--sampler", help="Of a diffusion model: dpm-solver-2s, heun, …; by default the bundle's own.")
@click.option("--num-images", type=click.IntRange(1), help="Number of images, drawn batch by batch; labels are repeated until there are enough.")
@click.option("--batch-size", type=int, help="Images computed at a time, 8 by default; without --num-images their number, by default that of labels or seeds.")
@click.option("--columns", type=click.IntRange(1), help="Pictures a row of the grid.")
@click.option("--guidance-scale", type=float, help="For models that take a guidance scale.")
@click.option(
    "--prompt-embeds",
    type=click.Path(path_type=Path, dir_okay=False),
    help="For models of text: a .npz with prompt_embeds, [tokens, D] or [N, tokens, D], and prompt_attention_mask where some tokens do not count; "
    "or a .npy with prompt_embeds alone.",
)
@device_option
@click.option("--dtype", default="auto", show_default=True, help="Which of the bundle's graphs: fp32, fp16 or bf16; auto takes half precision on a GPU.")
@revision_option
@native_ops_option
@threads_option
@skip_integrity_option
def generate(
    bundle: str,
    out: str,
    labels: str | None,
    seed: tuple[int, ...] | None,
    steps: int | None,
    sampler: str | None,
    num_images: int | None,
    batch_size: int | None,
    columns: int | None,
    guidance_scale: float | None,
    prompt_embeds: Path | None,
    device: str,
    dtype: str,
    revision: str | None,
    native_ops: bool | None,
    threads: int | None,
    skip_integrity: bool,
) -> None:
    """Draw images from BUNDLE. BUNDLE is a folder, the name of an embedded bundle, or org/name on the Hugging Face hub."""
    with clean_errors():
        from scm_runtime.cli.embeddings import read_embeddings
        from scm_runtime.cli.generate import Order, Output, draw, parse_labels
        from scm_runtime.generator import Generator

        output = Output.read(out)  # before the work, not after
        prompts = None if prompt_embeds is None else read_embeddings(prompt_embeds)
        with Generator(
            bundle,
            revision=revision,
            device=device,
            dtype=cast("Dtype", dtype),  # checked there
            threads=threads,
            native_ops="auto" if native_ops is None else native_ops,
            max_batch_size=max(batch_size or 8, 1),  # or two batches might be computed as one
            verify_integrity=not skip_integrity,
        ) as generator:
            names = next((item.label_names for item in generator.manifest.conditioning if item.name == "class_labels"), None) or ()
            classes = None if labels is None else parse_labels(labels, names)
            order = Order(classes, seed, num_images, batch_size, prompts, steps, sampler, guidance_scale)
            click.echo(draw(generator, order, output, columns))


@main.command()
@click.argument("bundle")
@click.option("--json", "as_json", is_flag=True, help="Print the manifest as JSON.")
@revision_option
@skip_integrity_option
def inspect(bundle: str, as_json: bool, revision: str | None, skip_integrity: bool) -> None:
    """Show what BUNDLE is, what it takes, and how it was verified; check its files, of a repository on the hub those in the cache."""
    from scm_runtime.bundle.location import find
    from scm_runtime.bundle.manifest import check_files, read_manifest
    from scm_runtime.cli.smoke import show_manifest

    with clean_errors():
        folder, repository = find(bundle, revision)
        manifest = read_manifest(folder)
        here = [name for name in manifest.files if repository is None or (folder / name).is_file()]
        check_files(folder, manifest, here, hashes=not skip_integrity)
    if as_json:
        click.echo(manifest.to_json().decode())
    else:
        show_manifest(folder, manifest, here)


@main.command()
@click.argument("bundle")
@device_option
@revision_option
@native_ops_option
@threads_option
@skip_integrity_option
def smoke(bundle: str, device: str, revision: str | None, native_ops: bool | None, threads: int | None, skip_integrity: bool) -> None:
    """Check that BUNDLE works on this machine: it loads, samples are finite and reproducible alone and in a batch. Prints latencies; the exit code tells.

    A model of text gets random numbers for embeddings: its text encoder is not part of the bundle.
    """
    with clean_errors():
        from scm_runtime.cli.smoke import smoke_test

        kernels: NativeOps = "auto" if native_ops is None else native_ops
        passed = smoke_test(bundle, threads, device=device, revision=revision, native_ops=kernels, verify_integrity=not skip_integrity)
    if not passed:
        click.echo("Error: the bundle loads but does not sample as it must: see the failed checks above. Export it again.", err=True)
        sys.exit(FAILURE)


@main.command()
@click.argument("bundle")
@click.option("--batch-sizes", type=IntegerList(1), default="1,8", show_default=True, help="Samples a call, separated by commas.")
@click.option("--steps", type=IntegerList(1), help="Numbers of steps, separated by commas. By default 1,2; of a diffusion model what a call takes.")
@click.option("--sampler", help="Of a diffusion model: dpm-solver-2s, heun, …; by default the bundle's own.")
@device_option
@click.option("--dtype", default="auto", show_default=True, help="Which of the bundle's graphs: fp32, fp16 or bf16; auto takes half precision on a GPU.")
@threads_option
@click.option("--seconds", type=click.FloatRange(0), default=3.0, show_default=True, help="Measure each cell for so long; three calls at least.")
@click.option("--compare", type=click.Path(path_type=Path, dir_okay=False), help="Show the ratios to an earlier result: a file of -o or --json.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON document.")
@click.option("-o", "--out", type=click.Path(path_type=Path, dir_okay=False), help="Write the JSON document to a file, too. An existing one is replaced.")
@revision_option
@native_ops_option
@skip_integrity_option
def bench(
    bundle: str,
    batch_sizes: tuple[int, ...],
    steps: tuple[int, ...] | None,
    sampler: str | None,
    device: str,
    dtype: str,
    threads: int | None,
    seconds: float,
    compare: Path | None,
    as_json: bool,
    out: Path | None,
    revision: str | None,
    native_ops: bool | None,
    skip_integrity: bool,
) -> None:
    """Measure how fast BUNDLE samples here: latency, throughput and memory by steps and batch size, and what share that is of the machine's peak.

    Ctrl-C shows what was measured so far. The exit code is 1 if nothing could be measured.
    """
    with clean_errors():
        from scm_runtime.bench.result import check_writable, read_result, write_result
        from scm_runtime.bench.run import Order
        from scm_runtime.bench.run import bench as measure
        from scm_runtime.cli.bench import progress, show_result

        other = None if compare is None else (compare, read_result(compare))  # before the work, not after
        if out is not None:
            check_writable(out)
        order = Order(
            bundle,
            batch_sizes,
            steps,
            sampler,
            seconds,
            revision=revision,
            device=device,
            dtype=cast("Dtype", dtype),  # checked there
            threads=threads,
            native_ops="auto" if native_ops is None else native_ops,
            verify_integrity=not skip_integrity,
        )
        with progress() as tell:
            result = measure(order, other, tell)
        if as_json:
            click.echo(result.to_json().decode())
        else:
            show_result(result)
        if out is not None:
            write_result(result, out)
        if result.interrupted:
            raise KeyboardInterrupt("the figures are those until then")
    if not result.works:
        click.echo("Error: no cell could be measured: see what failed above.", err=True)
        sys.exit(FAILURE)


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print the report as one JSON document.")
def doctor(as_json: bool) -> None:
    """Say what is installed, which devices really work here, and what the others lack. Draws the embedded digits on each; the exit code is 1 if none works."""
    import msgspec

    from scm_runtime.doctor.examine import examine

    with clean_errors():
        report = examine()
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(report), indent=2).decode())
    else:
        from scm_runtime.doctor.report import show_report

        show_report(report)
    if not report.works:
        sys.exit(FAILURE)


if __name__ == "__main__":
    main()
