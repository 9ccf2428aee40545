"""``scm-export``: one call to :func:`scm_export.export`, with its progress and its report on the terminal."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from scm_export.choices import DEFAULT_OPSET, GRAPH_DTYPES, OPSETS, PARAMETRISATION_NAMES
from scm_export.errors import VerificationError
from scm_export.versions import check_versions
from scm_runtime import __version__
from scm_runtime.bundle.manifest import Verification
from scm_runtime.cli import IntegerList, clean_errors
from scm_runtime.cli.parameter_type import ParamType
from scm_runtime.errors import MissingDependencyError

if TYPE_CHECKING:
    from scm_export.dry_run import Plan
    from scm_export.exporter import Exported

INTERRUPTED = 130  # as a shell has it: 128 + SIGINT


class Size(ParamType[tuple[int, int]]):
    """``HEIGHTxWIDTH``."""

    name = "size"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        found = re.fullmatch(r"(\d+)[x×](\d+)", str(value))
        if found is None:
            self.fail(f"must be HEIGHTxWIDTH in pixels, 512x512; got {value!r}", param, ctx)
        return int(found[1]), int(found[2])


def _negate(context: click.Context, parameter: click.Parameter, value: bool) -> bool:
    """What a flag with "no" in its name means: ``flag_value=False, default=True`` would say the same, but is False by default in click 8.3.0."""
    return not value


# The parameters of all options but -o, --dry-run and --json are fields of scm_export.exporter.Options, by name.
@click.command()
@click.argument("checkpoint")
@click.option("-o", "--out", type=click.Path(path_type=Path), metavar="BUNDLE", help="Folder to write; by default CHECKPOINT with the ending .scm.")
@click.option("--force", is_flag=True, help="Replace an existing bundle.")
# What is read.
@click.option("--revision", metavar="REVISION", help="Of a repository of the hub: branch, tag or commit.")
@click.option("--family", metavar="NAME", help="How to read the checkpoint; by default found from the checkpoint itself.")
@click.option("--config", metavar="FILE.toml", help="What bare tensors or a program are: docs/checkpoint-format.md.")
@click.option("--factory", metavar="PACKAGE.MODULE:FUNCTION", help="Function that returns the network that the checkpoint's tensors are for. It is run.")
@click.option("--weights", metavar="KEY", help="Of several sets of weights in a training checkpoint: ema. By default the only moving average.")
@click.option("--parametrisation", type=click.Choice(PARAMETRISATION_NAMES), help="What the network predicts, in place of what checkpoint or config say.")
@click.option("--trust", is_flag=True, help="Open files that run code when they are opened (TorchScript, pickled modules): only from people you trust.")
@click.option("--decoder", metavar="FOLDER", help="Autoencoder as diffusers saves it, for models of latents whose checkpoint brings none.")
@click.option("--latents", is_flag=True, help="Leave the decoder out: samples are latents.")
@click.option("--with-encoder", is_flag=True, help="Write the autoencoder's encoder too: editing needs it.")
@click.option("--preview-decoder", metavar="FOLDER", help="Small autoencoder (AutoencoderTiny) to look at states between steps with.")
@click.option("--guide", metavar="FILE", help="Worse version of a diffusion model, to lead it away from: autoguidance, with guidance_scale as an input.")
@click.option("--size", type=Size(), metavar="HEIGHTxWIDTH", help="Of the images, pixels; by default the checkpoint's own.")
# What is written.
@click.option(
    "--dtype", type=click.Choice(list(GRAPH_DTYPES)), help="Of the stored weights; beside fp16 and bf16 there is an fp32 graph. By default the family's."
)
@click.option(
    "--steps",
    type=IntegerList(minimum=1),
    help="Step counts to compose whole samplers for (sample-K.onnx): 1,2. By default those up to 4 that the checkpoint has times for.",
)
@click.option(
    "--opset",
    type=click.IntRange(OPSETS[0], OPSETS[-1]),
    help=f"ONNX operator set; by default {DEFAULT_OPSET['fp32']}, for bf16 {DEFAULT_OPSET['bf16']}.",
)
@click.option("--no-custom-ops", "custom_ops", is_flag=True, callback=_negate, help="Standard ONNX alone, for other runtimes and tools.")
# How it is verified.
@click.option("--no-verify", "verify", is_flag=True, callback=_negate, help="Leave out the comparison with PyTorch.")
@click.option("--atol", type=click.FloatRange(0, min_open=True), help="Largest absolute error allowed, in the scale of the state; by default by dtype.")
@click.option(
    "--report",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE.html",
    help="Write the comparison as a page with pictures, also when the bundle fails it.",
)
# What is shown.
@click.option("--dry-run", is_flag=True, help="Read the checkpoint and show what would be exported; write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the manifest, or what --dry-run shows, as JSON.")
@click.version_option(__version__)
def main(checkpoint: str, out: Path | None, dry_run: bool, as_json: bool, **options: Any) -> None:
    """Turn the trained consistency model in CHECKPOINT into a bundle that scm-runtime samples.

    CHECKPOINT is a file, a folder, or a repository of the Hugging Face hub (org/name). The bundle's samples are compared with those of the
    original's own sampler; over tolerance nothing is written and the exit code is 1.
    """
    terminal = Console(stderr=True)
    with clean_errors():
        try:
            done = _run(terminal, checkpoint, out, dry_run, options)
        except VerificationError as error:
            if error.report is not None:
                terminal.print(_table(error.report))
            raise
        except KeyboardInterrupt:
            click.echo("Interrupted: no bundle was written.", err=True)
            sys.exit(INTERRUPTED)
    from scm_export.exporter import Exported

    if as_json:
        click.echo((done.manifest if isinstance(done, Exported) else done).to_json().decode())
    elif isinstance(done, Exported):
        _show(done, options["report"])
    else:
        _show_plan(done)


def _run(terminal: Console, checkpoint: str, out: Path | None, dry_run: bool, options: Mapping[str, Any]) -> Exported | Plan:
    check_versions()
    try:
        from scm_export.exporter import Options, export_with, plan  # torch takes seconds to import: not for --help
    except ImportError as error:
        raise MissingDependencyError(f"{error}. Exporting needs more packages:\n  pip install 'scm-runtime[export,cpu]'") from error
    with terminal.status("starting") as status:

        def show(stage: str) -> None:
            status.update(stage)
            if not terminal.is_terminal:
                print(stage, file=sys.stderr, flush=True)  # noqa: T201 - a log of stages where there is no terminal

        return (plan if dry_run else export_with)(checkpoint, out, Options(**options, progress=show))


def _show(done: Exported, report: Path | None) -> None:
    console = Console()
    if done.manifest.verification is None:
        console.print("not verified (--no-verify)")
    else:
        console.print(_table(done.manifest.verification))
    if done.manifest.source.weights is not None:
        console.print(f"weights: {done.manifest.source.weights!r} of {done.manifest.source.file}", highlight=False, soft_wrap=True, markup=False)
    size = sum(entry.size for entry in done.manifest.files.values())
    console.print(f"wrote {done.path} ({size / 1e6:.1f} MB, {', '.join(done.manifest.dtypes)})", highlight=False, soft_wrap=True)
    if report is not None:
        console.print(f"wrote {report}", highlight=False, soft_wrap=True)


def _show_plan(plan: Plan) -> None:
    facts = Table(show_header=False, box=None, pad_edge=False)
    facts.add_column(no_wrap=True)
    facts.add_column(overflow="fold")
    for name, value in plan.facts().items():
        facts.add_row(f"[bold]{name}[/]", escape(value))
    console = Console()
    console.print(facts)
    console.print("nothing was written (--dry-run)")


def _table(verification: Verification) -> Table:
    from scm_export.verification.report import TEXT_COLUMNS, tabulate
    from scm_export.verification.tolerances import passes

    rows = tabulate(verification.cases)
    table = Table(title=f"against {verification.reference}", box=SIMPLE, padding=(0, 1, 0, 0))
    for name in rows[0]:
        table.add_column(name, justify="left" if name in TEXT_COLUMNS else "right", no_wrap=name != "conditioning")
    for case, row in zip(verification.cases, rows, strict=True):
        table.add_row(*row.values(), style=None if passes(case) else "bold red")
    return table


if __name__ == "__main__":
    main()
