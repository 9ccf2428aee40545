"""The commands of ``scm-runtime``: generate samples, inspect and check bundles, measure their speed, and diagnose the installation."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, cast

import click

from scm_runtime._version import __version__
from scm_runtime.cli.options import (
    IntegerList,
    NumberList,
    Seconds,
    device_option,
    dtype_option,
    native_ops_option,
    revision_option,
    sampler_option,
    skip_integrity_option,
    threads_option,
)
from scm_runtime.cli.program import FAILURE, Group
from scm_runtime.cli.streams import print_json, say, say_error
from scm_runtime.common.interrupts import raise_at_interrupt

if TYPE_CHECKING:
    from scm_runtime.bundle.manifest import Dtype


@click.group(cls=Group)
@click.version_option(__version__)
def main() -> None:
    """Sample consistency models in one or two steps through ONNX Runtime."""


@main.command()
@click.argument("bundle")
@click.option(
    "-o",
    "--out",
    required=True,
    help="Image file to write, with a grid of all samples if there are several. For one file per sample: a name with {seed} or {index}, or a folder, "
    "ending in /. Existing files are replaced.",
)
@click.option("--labels", help="Class indices or names, separated by commas: 3,1,4. By default the seed modulo the number of classes.")
@click.option("--seed", type=IntegerList(), help="One seed (samples get seed, seed + 1, …), or one per sample, separated by commas. By default a random one.")
@click.option("--steps", type=int, help="Number of sampling steps; by default 2 if the bundle supports it.")
@click.option(
    "--timesteps",
    type=NumberList(),
    help="Times of the steps instead, decreasing, separated by commas and without the final 0; `scm-runtime inspect` shows those of the bundle.",
)
@sampler_option
@click.option(
    "--num-images",
    type=click.IntRange(1),
    help="Number of images, of each prompt if there are several, generated in batches; labels are repeated until there are enough.",
)
@click.option(
    "--batch-size",
    type=int,
    help="Images per batch with --num-images or several prompts, 8 by default; else the number of images, by default that of labels or seeds.",
)
@click.option("--columns", type=click.IntRange(1), help="Number of images in a row of the grid.")
@click.option("--guidance-scale", type=float, help="Guidance scale, for models that have this input.")
@click.option("--prompt", multiple=True, metavar="TEXT", help="Prompt, for bundles with a text encoder. Repeat it for several prompts.")
@click.option("--prompts", metavar="FILE", help="File of prompts in UTF-8, one per line, blank lines ignored; - for standard input.")
@click.option("--negative-prompt", metavar="TEXT", help="Text to avoid in all images, for models that use one.")
@click.option("--strict-prompt", is_flag=True, help="Refuse a prompt that is too long. By default its end is cut off, with a warning.")
@click.option(
    "--prompt-embeds",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Text embeddings instead of a prompt: a .npz with prompt_embeds, [tokens, D] or [N, tokens, D], and what else the model takes, such as "
    "prompt_attention_mask if some tokens are padding; or a .npy with prompt_embeds alone.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(0, min_open=True),
    metavar="SECONDS",
    help="Time limit for sampling, after the bundle is open; the exit code is 1 if it is exceeded. Without it there is no limit.",
)
@click.option("--no-metadata", is_flag=True, help="Do not store prompt, seed, steps, bundle and its SHA-256 in the text chunks of PNG files.")
@click.option("--json", "as_json", is_flag=True, help="Print what was written as JSON: files, seeds, classes, prompts and timings.")
@device_option
@dtype_option
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
    timesteps: tuple[float, ...] | None,
    sampler: str | None,
    num_images: int | None,
    batch_size: int | None,
    columns: int | None,
    guidance_scale: float | None,
    prompt: tuple[str, ...],
    prompts: str | None,
    negative_prompt: str | None,
    strict_prompt: bool,
    prompt_embeds: Path | None,
    timeout: float | None,
    no_metadata: bool,
    as_json: bool,
    device: str,
    dtype: str,
    revision: str | None,
    native_ops: bool | None,
    threads: int | None,
    skip_integrity: bool,
) -> None:
    """Generate images with BUNDLE: the name of an embedded bundle (digits), a folder (./digits), or a repository of the Hugging Face hub (org/name)."""
    from scm_runtime.cli.embeddings import read_embeddings
    from scm_runtime.cli.generate import GenerateOptions, describe, generate_images, parse_labels
    from scm_runtime.cli.output_files import OutputPattern
    from scm_runtime.cli.prompts import gather_prompts
    from scm_runtime.generator import Generator

    raise_at_interrupt()
    output = OutputPattern.read(out)  # errors are reported before the bundle is opened
    conditioning = None if prompt_embeds is None else read_embeddings(prompt_embeds)
    texts = gather_prompts(prompt, prompts)
    with Generator(
        bundle,
        revision=revision,
        device=device,
        dtype=cast("Dtype", dtype),  # Generator checks it
        threads=threads,
        native_ops="auto" if native_ops is None else native_ops,
        max_batch_size=max(batch_size or 8, 1),  # so that two batches are not merged into one
        verify_integrity=not skip_integrity,
    ) as generator:
        labeled = generator.manifest.labels
        names = () if labeled is None or labeled.label_names is None else labeled.label_names
        classes = None if labels is None else parse_labels(labels, names)
        options = GenerateOptions(
            texts,
            negative_prompt,
            strict_prompt,
            classes,
            seed,
            num_images,
            batch_size,
            conditioning,
            steps,
            timesteps,
            sampler,
            guidance_scale,
            timeout,
        )
        written = generate_images(generator, options, output, columns, metadata=not no_metadata)
    if as_json:
        print_json(written.to_json())
    else:
        say(describe(written))


@main.command()
@click.argument("bundle")
@click.option("--json", "as_json", is_flag=True, help="Print the manifest as JSON.")
@revision_option
@skip_integrity_option
def inspect(bundle: str, as_json: bool, revision: str | None, skip_integrity: bool) -> None:
    """Show what BUNDLE contains, its inputs and how it was verified, and check its files; for a repository on the hub, only the files in the local cache."""
    from scm_runtime.bundle.checksums import check_files
    from scm_runtime.bundle.location import resolve_bundle
    from scm_runtime.bundle.manifest import read_manifest
    from scm_runtime.cli.inspect import show_manifest

    folder, repository = resolve_bundle(bundle, revision)
    manifest = read_manifest(folder)
    present = [name for name in manifest.files if repository is None or (folder / name).is_file()]
    check_files(folder, manifest, present, hashes=not skip_integrity)
    if as_json:
        print_json(manifest.to_json())
    else:
        show_manifest(folder, manifest, present)


@main.command()
@click.argument("bundle")
@click.option("--json", "as_json", is_flag=True, help="Print the results as one JSON document.")
@device_option
@revision_option
@native_ops_option
@threads_option
@skip_integrity_option
def smoke(bundle: str, as_json: bool, device: str, revision: str | None, native_ops: bool | None, threads: int | None, skip_integrity: bool) -> None:
    """Check that BUNDLE works on this machine: it loads, and samples are finite, reproducible, independent of their batch and not of one color.

    Also prints latencies. The exit code is 1 if a check fails. Text-to-image models get random embeddings: their text encoder is not checked.
    """
    from scm_runtime.cli.smoke import show_result, smoke_test

    raise_at_interrupt()
    result = smoke_test(
        bundle,
        device=device,
        revision=revision,
        threads=threads,
        native_ops="auto" if native_ops is None else native_ops,
        verify_integrity=not skip_integrity,
    )
    if as_json:
        print_json(result.to_json())
    else:
        show_result(result)
    if not result.passed:
        say_error("Error: the bundle loads but does not sample correctly: see the failed checks. Export it again.")
        sys.exit(FAILURE)


@main.command()
@click.argument("bundle")
@click.option("--batch-sizes", type=IntegerList(1), default="1,8", show_default=True, help="Numbers of samples per call, separated by commas.")
@click.option("--steps", type=IntegerList(1), help="Numbers of steps, separated by commas. By default 1,2; for a diffusion model the default number of steps.")
@sampler_option
@device_option
@dtype_option
@threads_option
@click.option(
    "--seconds",
    type=Seconds(),
    default=3.0,
    show_default=True,
    help="Time to measure each pair of steps and batch size; at least three calls.",
)
@click.option("--compare", type=click.Path(path_type=Path, dir_okay=False), help="Show the ratios to an earlier result: a file written by -o or --json.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON document.")
@click.option("-o", "--out", type=click.Path(path_type=Path, dir_okay=False), help="Also write the JSON document to a file. An existing file is replaced.")
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
    """Measure how fast BUNDLE samples on this machine: latency, throughput and memory by steps and batch size, and the share of the machine's peak.

    Ctrl-C shows what was measured so far. The exit code is 1 if nothing could be measured.
    """
    from scm_runtime.bench.result import check_writable, read_result, write_result
    from scm_runtime.bench.run import BenchOptions, run_bench
    from scm_runtime.cli.bench import bench_progress, show_result

    raise_at_interrupt()
    other = None if compare is None else (compare, read_result(compare))  # errors are reported before anything is measured
    if out is not None:
        check_writable(out)
    options = BenchOptions(
        bundle,
        batch_sizes,
        steps,
        sampler,
        seconds,
        revision=revision,
        device=device,
        dtype=cast("Dtype", dtype),  # Generator checks it
        threads=threads,
        native_ops="auto" if native_ops is None else native_ops,
        verify_integrity=not skip_integrity,
    )
    with bench_progress() as progress:
        result = run_bench(options, other, progress)
    if out is not None:
        write_result(result, out)  # first: it stays if standard output is full
    if as_json:
        print_json(result.to_json())
    else:
        show_result(result)
    if result.interrupted:
        raise KeyboardInterrupt("the figures are those measured so far")
    if not result.works:
        say_error("Error: nothing could be measured: see the failures.")
        sys.exit(FAILURE)


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print the report as one JSON document.")
def doctor(as_json: bool) -> None:
    """Show what is installed, which devices work, and what the others are missing. Each is tried with the embedded bundle; the exit code is 1 if none works."""
    from scm_runtime.doctor.examine import examine

    raise_at_interrupt()
    report = examine()
    if as_json:
        print_json(report.to_json())
    else:
        from scm_runtime.cli.doctor import show_report

        show_report(report)
    if not report.works:
        sys.exit(FAILURE)
