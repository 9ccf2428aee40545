"""``scm-runtime``: draw samples, look into bundles, and check that one works here."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from scm_runtime._version import __version__
from scm_runtime.errors import BundleNotFoundError, CheckpointNotFoundError, HubNotFoundError, InvalidArgumentError, ScmError

if TYPE_CHECKING:
    from scm_runtime.native import NativeOps

USAGE, FAILURE = 2, 1
USAGE_ERRORS = (InvalidArgumentError, BundleNotFoundError, CheckpointNotFoundError, HubNotFoundError)


@contextmanager
def clean_errors() -> Iterator[None]:
    """Turn this project's errors into one message on stderr and an exit code, without a traceback.

    The code is 2 for a wrong argument or a path with nothing there, 1 for the rest.
    """
    try:
        yield
    except ScmError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(USAGE if isinstance(error, USAGE_ERRORS) else FAILURE)
    except MemoryError:
        click.echo("Error: out of memory. Try a smaller batch.", err=True)
        sys.exit(FAILURE)


class IntegerList(click.ParamType[tuple[int, ...]]):
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
    type=click.Path(path_type=Path, dir_okay=False),
    required=True,
    help="Picture to write: the sample, or a grid of all. An existing file is replaced.",
)
@click.option("--labels", help="Classes, by number or name, separated by commas: 3,1,4. By default seed modulo the number of classes.")
@click.option("--seed", type=IntegerList(), help="One seed (the samples get seed, seed + 1, …), or one a sample, separated by commas. By default random.")
@click.option("--steps", type=int, help="Sampling steps; 2 where the bundle has them.")
@click.option("--batch-size", type=int, help="Number of samples; by default as many as labels or seeds.")
@click.option("--columns", type=click.IntRange(1), help="Pictures a row of the grid.")
@click.option("--guidance-scale", type=float, help="For models that take a guidance scale.")
@click.option(
    "--prompt-embeds",
    type=click.Path(path_type=Path, dir_okay=False),
    help="For models of text: a .npz with prompt_embeds, [tokens, D] or [N, tokens, D], and prompt_attention_mask where some tokens do not count; "
    "or a .npy with prompt_embeds alone.",
)
@revision_option
@native_ops_option
@threads_option
@skip_integrity_option
def generate(
    bundle: str,
    out: Path,
    labels: str | None,
    seed: tuple[int, ...] | None,
    steps: int | None,
    batch_size: int | None,
    columns: int | None,
    guidance_scale: float | None,
    prompt_embeds: Path | None,
    revision: str | None,
    native_ops: bool | None,
    threads: int | None,
    skip_integrity: bool,
) -> None:
    """Draw samples from BUNDLE into a picture. BUNDLE is a folder, the name of an embedded bundle, or org/name on the Hugging Face hub."""
    from scm_runtime.embeddings import read_embeddings
    from scm_runtime.generator import Generator
    from scm_runtime.samples import EXPORT_A_DECODER, picture_format

    with clean_errors():
        picture_format(out)  # before the work, not after
        prompts = None if prompt_embeds is None else read_embeddings(prompt_embeds)
    kernels: NativeOps = "auto" if native_ops is None else native_ops
    with clean_errors(), Generator(bundle, revision=revision, threads=threads, native_ops=kernels, verify_integrity=not skip_integrity) as generator:
        if generator.manifest.output.kind != "image":
            raise InvalidArgumentError(f"the bundle {generator.manifest.name!r} makes latents, no pictures: it has no decoder. {EXPORT_A_DECODER}")
        names = next((item.label_names for item in generator.manifest.conditioning if item.name == "class_labels"), None) or ()
        samples = generator(
            None if labels is None else _parse_labels(labels, names),
            seed=seed[0] if seed is not None and len(seed) == 1 else seed,
            num_inference_steps=steps,
            batch_size=batch_size,
            guidance_scale=guidance_scale,
            conditioning=prompts,
            output_type="np",
        )
        path = samples.save(out, columns=columns)
    first, last = samples.seeds[0], samples.seeds[-1]
    listed = f"{first}…{last}" if samples.seeds == tuple(range(first, last + 1)) else ", ".join(map(str, samples.seeds))
    seeds = f"seed {first}" if len(samples) == 1 else f"seeds {listed}"
    count = "1 sample" if len(samples) == 1 else f"{len(samples)} samples"
    click.echo(f"wrote {path} ({count}, {seeds}, {len(samples.timings.steps)} steps, {samples.timings.total * 1e3:.0f} ms)")


def _parse_labels(text: str, names: tuple[str, ...]) -> int | str | list[int | str]:
    """Labels as typed: a name where the bundle has one (names may be digits themselves), else a number; one alone serves every sample."""

    def parse(part: str) -> int | str:
        try:
            return part if part in names else int(part)
        except ValueError:
            return part

    labels = [parse(text.strip())] if text.strip() in names else [parse(part.strip()) for part in text.split(",")]
    return labels[0] if len(labels) == 1 else labels


@main.command()
@click.argument("bundle")
@click.option("--json", "as_json", is_flag=True, help="Print the manifest as JSON.")
@revision_option
@skip_integrity_option
def inspect(bundle: str, as_json: bool, revision: str | None, skip_integrity: bool) -> None:
    """Show what BUNDLE is, what it takes, and how it was verified; check its files, of a repository on the hub those in the cache."""
    from scm_runtime.bundle import check_files, read_manifest
    from scm_runtime.inspection import show_manifest
    from scm_runtime.location import find

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
@revision_option
@native_ops_option
@threads_option
@skip_integrity_option
def smoke(bundle: str, revision: str | None, native_ops: bool | None, threads: int | None, skip_integrity: bool) -> None:
    """Check that BUNDLE works on this machine: it loads, samples are finite and reproducible alone and in a batch. Prints latencies; the exit code tells.

    A model of text gets random numbers for embeddings: its text encoder is not part of the bundle.
    """
    from scm_runtime.inspection import smoke_test

    with clean_errors():
        passed = smoke_test(bundle, threads, revision=revision, native_ops="auto" if native_ops is None else native_ops, verify_integrity=not skip_integrity)
    if not passed:
        click.echo("Error: the bundle loads but does not sample as it must: see the failed checks above. Export it again.", err=True)
        sys.exit(FAILURE)


if __name__ == "__main__":
    main()
