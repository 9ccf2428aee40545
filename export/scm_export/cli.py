"""The command ``scm-export``: one call to :func:`scm_export.export`, with progress and results on the terminal."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.box import SIMPLE
from rich.text import Text

from scm_export.choices import (
    DEFAULT_OPSET,
    GRAPH_DTYPES,
    OPSETS,
    PARAMETRISATION_NAMES,
    PREDICTION_TYPES,
    SCHEDULER_NAMES,
    TEXT_DTYPES,
)
from scm_export.errors import VerificationError
from scm_export.versions import check_versions
from scm_runtime import __version__
from scm_runtime.bundle.manifest import Manifest, Verification
from scm_runtime.cli.options import IntegerList, ParamType
from scm_runtime.cli.program import Command
from scm_runtime.cli.streams import print_json, say_error
from scm_runtime.cli.tables import BAD, OutputConsole, facts_table, print_table
from scm_runtime.common.installed import install_extras
from scm_runtime.common.interrupts import raise_at_interrupt, was_interrupted
from scm_runtime.common.message_text import escape_controls
from scm_runtime.errors import MissingDependencyError

if TYPE_CHECKING:
    from scm_export.dry_run import Plan
    from scm_export.exporter import Exported


class ImageSize(ParamType[tuple[int, int]]):
    """A height and a width in pixels, ``HEIGHTxWIDTH``."""

    name = "size"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        match = re.fullmatch(r"(\d+)[x×](\d+)", str(value))
        if match is None:
            self.fail(f"must be HEIGHTxWIDTH in pixels, such as 512x512; got {value!r}", param, ctx)
        return int(match[1]), int(match[2])


def _negate(context: click.Context, parameter: click.Parameter, value: bool) -> bool:
    """Callback of the --no-… flags. ``flag_value=False, default=True`` would do the same, but its default is False in click 8.3.0."""
    return not value


# All parameters but checkpoint, out, dry_run and as_json are fields of scm_export.Options, by name.
@click.command(cls=Command)
@click.argument("checkpoint")
@click.option("-o", "--out", type=click.Path(path_type=Path), metavar="BUNDLE", help="Folder to write; by default CHECKPOINT with the extension .scm.")
@click.option("--force", is_flag=True, help="Replace an existing bundle.")
# Input.
@click.option("--revision", metavar="REVISION", help="Branch, tag or commit of a repository on the hub.")
@click.option("--family", metavar="NAME", help="How to read the checkpoint; by default detected from the checkpoint.")
@click.option("--config", metavar="FILE.toml", help="Description of bare tensors or a program: docs/checkpoint-format.md.")
@click.option("--factory", metavar="PACKAGE.MODULE:FUNCTION", help="Function that returns the network for the checkpoint's tensors. It is run.")
@click.option("--weights", metavar="KEY", help="Which set of weights in a training checkpoint to export, such as ema. By default the only moving average.")
@click.option("--parametrisation", type=click.Choice(PARAMETRISATION_NAMES), help="What the network predicts; replaces the value in the checkpoint or config.")
@click.option(
    "--trust",
    is_flag=True,
    help="Also open files that run code when they are read (TorchScript, pickled modules). Use it only for files from people you trust.",
)
@click.option(
    "--decoder",
    metavar="FOLDER",
    help="Autoencoder in diffusers' format, for latent models whose checkpoint has none: a folder, org/name on the hub, or your own decoder as "
    "PACKAGE.MODULE:FUNCTION, which is run.",
)
@click.option("--latents", is_flag=True, help="Leave the decoder out: samples are latents.")
@click.option("--with-encoder", is_flag=True, help="Also write the autoencoder's encoder, which image editing needs.")
@click.option("--preview-decoder", metavar="FOLDER", help="Small autoencoder (AutoencoderTiny) for previews between steps.")
@click.option("--no-text", "text", is_flag=True, callback=_negate, help="Leave the text encoder out: the bundle takes prompt_embeds only.")
@click.option("--guide", metavar="FILE", help="Worse version of a diffusion model for autoguidance, with guidance_scale as an input.")
@click.option(
    "--scheduler",
    type=click.Choice(SCHEDULER_NAMES),
    help="Scheduler of a distilled Stable Diffusion model, as its model card names it; by default the checkpoint's own.",
)
@click.option("--prediction-type", type=click.Choice(PREDICTION_TYPES), help="What its U-Net predicts; by default the value in the checkpoint.")
@click.option("--guidance", is_flag=True, help="Export it with classifier-free guidance: a negative prompt and guidance_scale, at twice the computation.")
@click.option(
    "--lora",
    multiple=True,
    metavar="FILE[:SCALE]",
    help="LoRA to add to the weights, in the layout of kohya, PEFT or diffusers, with a scale that is 1 by default. May be repeated.",
)
@click.option("--size", type=ImageSize(), metavar="HEIGHTxWIDTH", help="Size of the images in pixels; by default the checkpoint's own.")
# Output.
@click.option(
    "--dtype", type=click.Choice(list(GRAPH_DTYPES)), help="Dtype of the stored weights; fp16 and bf16 bundles also have fp32 graphs. By default the family's."
)
@click.option(
    "--text-dtype",
    type=click.Choice(TEXT_DTYPES),
    help="Dtype of the text encoder's weights; int8 and int4 quantize its linear layers. By default that of the other weights.",
)
@click.option(
    "--steps",
    type=IntegerList(minimum=1),
    help="Step counts to compose whole samplers for (sample-K.onnx), such as 1,2. By default the counts up to 4 that the checkpoint has times for.",
)
@click.option(
    "--opset",
    type=click.IntRange(OPSETS[0], OPSETS[-1]),
    help=f"ONNX operator set; by default {DEFAULT_OPSET['fp32']}, or {DEFAULT_OPSET['bf16']} for bf16.",
)
@click.option("--no-custom-ops", "custom_ops", is_flag=True, callback=_negate, help="Write standard ONNX only, for other runtimes and tools.")
# Verification.
@click.option("--no-verify", "verify", is_flag=True, callback=_negate, help="Skip the comparison with PyTorch.")
@click.option(
    "--atol", type=click.FloatRange(0, min_open=True), help="Largest allowed absolute error, in the scale of the state; by default it depends on the dtype."
)
@click.option(
    "--report",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE.html",
    help="Write the comparison as an HTML page with images, even if the bundle fails it.",
)
# Terminal.
@click.option("--dry-run", is_flag=True, help="Read the checkpoint and show what would be exported, without writing anything.")
@click.option("--json", "as_json", is_flag=True, help="Print the manifest, or the plan of --dry-run, as JSON.")
@click.version_option(__version__)
def main(checkpoint: str, out: Path | None, dry_run: bool, as_json: bool, **options: Any) -> None:
    """Turn the trained consistency model in CHECKPOINT into a bundle that scm-runtime samples.

    CHECKPOINT is a file, a folder, or a repository of the Hugging Face hub (org/name). The bundle's samples are compared with those of the
    original sampler. If they differ by more than the tolerance, nothing is written and the exit code is 1.
    """
    try:
        result = _run(checkpoint, out, dry_run, options)
    except VerificationError as error:
        if error.report is not None:
            _print_verification(OutputConsole(stderr=True), error.report)
        raise
    except KeyboardInterrupt:
        raise KeyboardInterrupt("no bundle was written") from None
    from scm_export.exporter import Exported

    for note in result.notes:
        OutputConsole(stderr=True).write_line(f"Note: {note}.")
    if as_json:
        print_json((result.manifest if isinstance(result, Exported) else result).to_json())
    elif isinstance(result, Exported):
        _print_exported(result, options["report"])
    else:
        _print_plan(result)


def _run(checkpoint: str, out: Path | None, dry_run: bool, options: Mapping[str, Any]) -> Exported | Plan:
    check_versions()
    try:
        from scm_export import Options, export, plan  # torch takes seconds to import: not for --help
    except ImportError as error:
        if was_interrupted(error):
            raise KeyboardInterrupt from error
        raise MissingDependencyError(f"{error}. Exporting needs more packages:\n  {install_extras('export', 'cpu')}") from error
    raise_at_interrupt()
    terminal = OutputConsole(stderr=True)
    with terminal.status("starting", spinner="dots" if terminal.encoding.startswith("utf") else "line") as status:

        def show(stage: str) -> None:
            status.update(Text(escape_controls(stage)))  # not as rich's markup: it may have a key from the file
            if not terminal.is_terminal:
                say_error(stage)  # a plain log of the stages

        if dry_run:
            return plan(checkpoint, out, Options(**options, progress=show))
        return export(checkpoint, out, **options, progress=show)


def _print_exported(exported: Exported, report: Path | None) -> None:
    console = OutputConsole()
    manifest = exported.manifest
    if manifest.verification is None:
        console.write_line("not verified (--no-verify)")
    else:
        _print_verification(console, manifest.verification)
    if manifest.source.weights is not None:
        console.write_line(f"weights: {manifest.source.weights!r} of {manifest.source.file}")
    console.write_line(_describe_samples(manifest))
    if manifest.text is not None:
        console.write_line(f"text encoder: weights in {manifest.text.weights_dtype}, licence: {escape_controls(manifest.text.licence or 'not stated')}")
    size = sum(entry.size for entry in manifest.files.values())
    console.write_line(f"wrote {exported.path} ({size / 1e6:.1f} MB, {', '.join(manifest.dtypes)})")
    if report is not None:
        console.write_line(f"wrote {report}")


def _describe_samples(manifest: Manifest) -> str:
    state = f"state [N, {', '.join(map(str, manifest.sample.shape))}]"
    if manifest.output.kind == "latent":
        return f"samples: latents, without a decoder, {state}"
    height, width, channels = manifest.output.shape
    kind = {1: "grayscale", 3: "RGB", 4: "RGBA"}.get(channels, f"{channels}-channel")
    origin = "the state is pixels" if manifest.sample.shape == (channels, height, width) else f"decoded from latents, the {state}"
    return f"samples: {kind} images of {height}x{width}, {origin}"


def _print_plan(plan: Plan) -> None:
    console = OutputConsole()
    console.print(facts_table(plan.facts()))
    console.write_line("nothing was written (--dry-run)")


def _print_verification(console: OutputConsole, verification: Verification) -> None:
    from scm_export.verification.report import TEXT_COLUMNS, tabulate
    from scm_export.verification.tolerances import passes

    rows = tabulate(verification.cases)
    columns = list(rows[0])
    cells = [[value if passes(case) else Text(value, BAD) for value in row.values()] for case, row in zip(verification.cases, rows, strict=True)]
    print_table(
        console,
        columns,
        cells,
        title=f"against {verification.reference}",
        right=[name for name in columns if name not in TEXT_COLUMNS],
        wrap=("conditioning",),
        box=SIMPLE,
    )


if __name__ == "__main__":
    main()
