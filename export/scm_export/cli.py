"""``scm-export``: one call to :func:`scm_export.export`, with its progress and its report on the terminal."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal, cast

import click
from rich.console import Console
from rich.table import Table

from scm_runtime import __version__
from scm_runtime.bundle import Verification
from scm_runtime.cli import IntegerList, clean_errors
from scm_runtime.errors import MissingDependencyError, VerificationError


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("-o", "--out", type=click.Path(path_type=Path), metavar="BUNDLE", help="Folder to write; by default CHECKPOINT with the ending .scm.")
@click.option(
    "--dtype", type=click.Choice(["fp32", "fp16"]), default="fp32", show_default=True, help="Of the stored weights. fp16 gives an fp16 and an fp32 graph."
)
@click.option(
    "--steps",
    type=IntegerList(minimum=1),
    help="Step counts to compose whole samplers for (sample-K.onnx): 1,2. By default all that the checkpoint has times for.",
)
@click.option("--opset", type=click.IntRange(18, 23), default=20, show_default=True, help="ONNX operator set.")
@click.option("--force", is_flag=True, help="Replace an existing bundle.")
@click.option("--no-verify", is_flag=True, help="Leave out the comparison with PyTorch.")
@click.option("--atol", type=click.FloatRange(0, min_open=True), help="Largest absolute error allowed, in the scale of the state; by default by dtype.")
@click.option("--no-custom-ops", is_flag=True, help="Standard ONNX alone, for other runtimes and tools.")
@click.option("--json", "as_json", is_flag=True, help="Print the manifest as JSON instead of the table.")
@click.version_option(__version__)
def main(
    checkpoint: Path,
    out: Path | None,
    dtype: str,
    steps: tuple[int, ...] | None,
    opset: int,
    force: bool,
    no_verify: bool,
    atol: float | None,
    no_custom_ops: bool,
    as_json: bool,
) -> None:
    """Turn the trained consistency model in CHECKPOINT into a bundle that scm-runtime samples.

    The bundle's samples are compared with those of PyTorch; over tolerance nothing is written and the exit code is 1.
    """
    terminal = Console(stderr=True)
    with clean_errors():
        try:
            from scm_export.exporter import export  # torch takes seconds to import: not for --help
        except ImportError as error:
            raise MissingDependencyError(f"{error}. Exporting needs more packages:\n  pip install 'scm-runtime[export,cpu]'") from error
        try:
            with terminal.status("starting") as status:

                def show(stage: str) -> None:
                    status.update(stage)
                    if not terminal.is_terminal:
                        print(stage, file=sys.stderr, flush=True)  # noqa: T201 - a log of stages where there is no terminal

                done = export(
                    checkpoint,
                    out,
                    dtype=cast(Literal["fp32", "fp16"], dtype),
                    steps=steps,
                    opset=opset,
                    force=force,
                    verify=not no_verify,
                    atol=atol,
                    progress=show,
                    custom_ops=not no_custom_ops,
                )
        except VerificationError as error:
            if error.report is not None:
                terminal.print(_table(error.report))
            raise
    if as_json:
        click.echo(done.manifest.to_json().decode())
        return
    console = Console()
    if done.manifest.verification is None:
        console.print("not verified (--no-verify)")
    else:
        console.print(_table(done.manifest.verification))
    size = sum(entry.size for entry in done.manifest.files.values())
    console.print(f"wrote {done.path} ({size / 1e6:.1f} MB, {', '.join(done.manifest.dtypes)})", highlight=False, soft_wrap=True)


def _table(report: Verification) -> Table:
    table = Table(title=f"against {report.reference}")
    for name in ("graph", "dtype", "batch", "steps", "max abs error", "tolerance", "PSNR / dB"):
        table.add_column(name, justify="left" if name in ("graph", "dtype") else "right")
    for case in report.cases:
        psnr = "identical" if case.psnr is None else f"{case.psnr:.1f}"
        style = None if case.max_abs <= case.atol else "bold red"
        table.add_row(case.graph, case.dtype, str(case.batch_size), str(case.steps), f"{case.max_abs:.2e}", f"{case.atol:.2e}", psnr, style=style)
    return table


if __name__ == "__main__":
    main()
