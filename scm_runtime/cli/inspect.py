"""Printed output of ``scm-runtime inspect``: a bundle's manifest as tables."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from scm_runtime.bundle.manifest import Conditioning, Manifest, Source, TextSpec, Verification
from scm_runtime.cli.tables import OutputConsole, facts_table, print_table
from scm_runtime.common.message_text import printable

MAX_LABEL_NAMES = 12


def show_manifest(folder: Path, manifest: Manifest, verified: Collection[str]) -> None:
    """Print a manifest as tables. ``verified`` are the names of the files that are present and match it."""
    console = OutputConsole()
    output = "uint8" if manifest.output.kind == "image" else "no decoder, float32"
    extras = [
        what for kind, what in (("encode", "an encoder"), ("preview", "a preview decoder")) if any(name.startswith(f"{kind}.") for name in manifest.files)
    ]
    facts = {
        "bundle": printable(manifest.name),
        "folder": str(folder),
        "family": printable(manifest.family),
        "parameters": f"{manifest.parameters / 1e6:.2f} M, stored in {manifest.weights_dtype}",
        "graphs": ", ".join(manifest.dtypes) + "".join(f", {domain} {version}" for domain, version in {"opset": manifest.opset, **manifest.ops}.items()),
        "state": f"float32 [N, {', '.join(map(str, manifest.sample.shape))}], sigma_d {manifest.sigma_data:g}",
        "output": f"{manifest.output.kind}, {output} [N, {', '.join(map(str, manifest.output.shape))}]",
        **({"also": ", ".join(extras)} if extras else {}),
        **{f"times, {count} step{'s' * (count != '1')}": _times(times, manifest.time_unit) for count, times in manifest.times.items()},
        **{f"sampler {name}": f"{', '.join(map(str, counts))} steps" for name, counts in manifest.samplers.items()},
        **{item.name: _conditioning(item) for item in manifest.conditioning},
        **({} if manifest.text is None else {"text encoder": _text_encoder(manifest.text)}),
        "made by": f"{printable(manifest.producer)} from {printable(manifest.source.file)} (SHA-256 {manifest.source.sha256[:12]}…){_weights(manifest.source)}",
        **({"LoRA": _loras(manifest.source)} if manifest.source.loras else {}),
        "licence": printable(manifest.licence or "not stated"),
        "verified": "no" if manifest.verification is None else _verification(manifest.verification),
    }
    console.print(facts_table(facts))
    complete = len(verified) == len(manifest.files)
    title = "files, all present and unchanged" if complete else "files; those fetched so far are unchanged"
    columns = ("file", "bytes", "SHA-256", *(() if complete else ("fetched",)))
    rows = [
        (file, f"{entry.size:,}", entry.sha256[:16] + "…", *(() if complete else ("yes" if file in verified else "no",)))
        for file, entry in manifest.files.items()
    ]
    print_table(console, columns, rows, title=title)


def _times(times: Sequence[float], unit: str) -> str:
    return " → ".join(f"{t:.6g}" for t in times) + ("" if unit == "radians" else f" ({unit})")


def _conditioning(item: Conditioning) -> str:
    if item.kind == "class":
        names = item.label_names or ()
        listed = ", ".join(map(printable, names[:MAX_LABEL_NAMES])) + (", …" if len(names) > MAX_LABEL_NAMES else "")
        return f"{item.num_classes} classes" + (f": {listed}" if names else "")
    default = "default all ones" if item.kind == "mask" else "required" if item.default is None else f"default {item.default:g}"
    return f"{item.kind}, {item.describe()}, {default}"


def _text_encoder(text: TextSpec) -> str:
    tokenizers = " and ".join(f"{printable(tokenizer.file)}, up to {tokenizer.max_length} tokens" for tokenizer in text.tokenizers)
    negative = ", with a negative prompt" if text.negative_outputs else ""
    licence = "" if text.licence is None else f"; licence {printable(text.licence)}"
    return f"{tokenizers}{negative} → {', '.join((*text.outputs, *text.negative_outputs))}; weights in {printable(text.weights_dtype)}{licence}"


def _weights(source: Source) -> str:
    return "" if source.weights is None else f", weights '{printable(source.weights)}'"


def _loras(source: Source) -> str:
    return ", ".join(f"{printable(lora.file)} × {lora.scale:g} (SHA-256 {printable(lora.sha256[:12])}…)" for lora in source.loras)


def _verification(report: Verification) -> str:
    worst = max(report.cases, key=lambda case: case.max_abs / case.atol)
    devices = ", ".join(sorted({case.device for case in report.cases}))
    return f"{len(report.cases)} cases against {printable(report.reference)} on {devices}; worst max abs error {worst.max_abs:.2e} of {worst.atol:.2e} allowed"
