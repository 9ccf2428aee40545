"""``--dry-run``: description of the bundle that an export would make, computed from the model without tracing it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct
from torch import Tensor, nn

from scm_export.choices import GRAPH_DTYPES, QUANTIZED_BITS, TextDtype, text_graph_dtypes
from scm_export.graphs.functions import INLINE_BELOW
from scm_export.graphs.quantize import BLOCK_SIZE
from scm_export.model import DTYPES, ImageDecoder, ImageNetwork, Latents, Model
from scm_runtime.bundle.manifest import COMBINE, STEP_INPUTS, Conditioning, Dtype, OutputSpec, Source
from scm_runtime.common.message_text import printable


class PlannedInput(Struct, kw_only=True):
    """One input of the step graph. The first dimension of the shape is N."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


class Plan(Struct, kw_only=True):
    """Description of the bundle that an export would make."""

    out: str
    family: str
    licence: str | None
    source: Source
    parameters: dict[str, int]
    """Number of parameters by graph."""
    decoder: str
    inputs: tuple[PlannedInput, ...]
    conditioning: tuple[Conditioning, ...]
    sample_shape: tuple[int, ...]
    output: OutputSpec
    sigma_data: float
    initial_scale: float
    time_unit: str
    times: dict[str, tuple[float, ...]]
    samplers: dict[str, tuple[int, ...]]
    weights_dtype: str
    weights_bytes: dict[str, int]
    """Expected size of the weights file in bytes, by the dtype of the stored weights."""
    opset: int
    custom_ops: bool
    graphs: tuple[str, ...]
    text: str | None
    """Dtype of the text encoder's weights; None if there is no text encoder."""
    files: tuple[str, ...]
    """Files of the tokenizers."""
    exists: bool
    """Whether something is at ``out``, which an export replaces only with ``force``."""
    notes: tuple[str, ...]
    """What the user should know about assumptions of the export."""

    def to_json(self) -> bytes:
        """Encode as indented JSON."""
        return msgspec.json.format(msgspec.json.encode(self), indent=2)

    def facts(self) -> dict[str, str]:
        """Lines of text for a terminal, by name."""
        size = _format_size(self.weights_bytes[self.weights_dtype])
        others = ", ".join(f"{name} {_format_size(count)}" for name, count in self.weights_bytes.items() if name != self.weights_dtype)
        return {
            "checkpoint": f"{self.source.file} (SHA-256 {self.source.sha256[:12]}…)",
            **({} if self.source.weights is None else {"weights set": repr(self.source.weights)}),
            **({"LoRA": ", ".join(f"{printable(lora.file)} × {lora.scale:g}" for lora in self.source.loras)} if self.source.loras else {}),
            "family": self.family,
            "licence": printable(self.licence or "not stated"),
            "parameters": ", ".join(f"{name} {count / 1e6:,.2f} M" for name, count in self.parameters.items()),
            "inputs": ", ".join(f"{item.name} {item.dtype} [{', '.join(map(str, item.shape))}]" for item in self.inputs),
            "state": f"float32 [N, {', '.join(map(str, self.sample_shape))}], sigma_d {self.sigma_data:g}, starts as {self.initial_scale:g} × noise",
            "decoder": self.decoder,
            **({} if self.text is None else {"text encoder": f"{self.text}, with {', '.join(self.files)}"}),
            "output": f"{self.output.kind} [N, {', '.join(map(str, self.output.shape))}]",
            **{
                f"times, {count} step{'s' * (count != '1')}": f"{' → '.join(f'{t:.6g}' for t in times)} ({self.time_unit})"
                for count, times in self.times.items()
            },
            **({"samplers": "; ".join(f"{name}: {', '.join(map(str, counts))} steps" for name, counts in self.samplers.items())} if self.samplers else {}),
            "weights": f"{self.weights_dtype}, {size} (in {others})",
            "graphs": f"opset {self.opset}{', scm operators' if self.custom_ops else ', standard operators only'}: {', '.join(self.graphs)}",
            "bundle": self.out + " (exists: an export replaces it only with --force)" * self.exists,
        }


def make_plan(
    model: Model, destination: Path, source: Source, dtype: Dtype, text_dtype: TextDtype, steps: Sequence[int], opset: int, *, custom_ops: bool
) -> Plan:
    """Describe the bundle of a model with weights stored in ``dtype``, those of its text encoder in ``text_dtype``."""
    parts: dict[str, Any] = {"step": model.step, "decode": model.decoder, "preview": model.preview, "encode": model.encoder}
    networks = {name: part.network if isinstance(part, ImageNetwork) else part for name, part in parts.items()}
    counts = {name: sum(p.numel() for p in network.parameters()) for name, network in networks.items() if isinstance(network, nn.Module)}
    if model.text is not None:
        counts["text"] = sum(p.numel() for p in model.text.network.parameters())
    kinds = ["step", "decode", *(name for name in ("preview", "encode") if parts[name] is not None), *(f"sample-{count}" for count in steps)]
    shapes: dict[str, tuple[int | str, ...]] = {name: () if name in ("t", "t_next") else model.sample_shape for name in STEP_INPUTS}
    inputs = [*((name, "float32", shape) for name, shape in shapes.items()), *((item.name, item.dtype, item.shape) for item in model.conditioning)]
    return Plan(
        out=str(destination),
        family=model.family,
        licence=model.licence,
        source=source,
        parameters=counts,
        decoder=_describe_decoder(model, counts.get("decode", 0)),
        inputs=tuple(PlannedInput(name=name, dtype=kind, shape=("N", *shape)) for name, kind, shape in inputs),
        conditioning=model.conditioning,
        sample_shape=model.sample_shape,
        output=model.output,
        sigma_data=model.sigma_data,
        initial_scale=model.initial_scale,
        time_unit=model.time_unit,
        times={str(count): times for count, times in sorted(model.times.items())},
        samplers={name: tuple(sorted(table)) for name, table in model.samplers.items()},
        weights_dtype=dtype,
        weights_bytes={name: _weights_bytes(model, name, text_dtype) for name in GRAPH_DTYPES},
        opset=opset,
        custom_ops=custom_ops,
        graphs=(
            "noise.onnx",
            *((COMBINE,) if model.samplers else ()),
            *(f"{kind}.{compute}.onnx" for compute in GRAPH_DTYPES[dtype] for kind in kinds),
            *(() if model.text is None else (f"text.{compute}.onnx" for compute in text_graph_dtypes(text_dtype, dtype))),
        ),
        text=None if model.text is None else text_dtype,
        files=() if model.text is None else tuple(model.text.tokenizers),
        exists=os.path.lexists(destination),
        notes=model.notes,
    )


def _describe_decoder(model: Model, parameters: int) -> str:
    match model.decoder:
        case ImageDecoder(scale=scale, offset=offset):
            return f"none: the state is pixels, with levels x × {scale:g} + {offset:g}"
        case ImageNetwork():
            return f"a network of {parameters / 1e6:,.2f} M parameters: the state is latents"
        case Latents():
            return "none: the state is latents, and so are the samples"


def _weights_bytes(model: Model, dtype: Dtype, text_dtype: TextDtype) -> int:
    """Size of the weights file in bytes: every large tensor once, parameters in ``dtype``, buffers in their own dtype."""
    sizes = {}
    for tensor, itemsize in _stored_tensors(model, dtype, text_dtype):
        size = int(tensor.numel() * itemsize)
        if size >= INLINE_BELOW:
            sizes[tensor.data_ptr(), tuple(tensor.shape)] = size
    return sum(sizes.values())


def _stored_tensors(model: Model, dtype: Dtype, text_dtype: TextDtype) -> Iterator[tuple[Tensor, float]]:
    """Parameters and buffers, each with the number of bytes per element in the weights file."""
    for network in model.networks:
        yield from ((parameter, DTYPES[dtype].itemsize) for parameter in network.parameters())
        yield from ((buffer, buffer.itemsize) for buffer in network.buffers())
    if model.text is not None:
        for parameter, stored in model.text.stored_as(text_dtype, dtype):
            bits = QUANTIZED_BITS.get(stored)
            yield parameter, DTYPES[stored].itemsize if bits is None else bits / 8 + (4 + bits / 8) / BLOCK_SIZE  # and a float32 scale and an offset per block


def _format_size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
