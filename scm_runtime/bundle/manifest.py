"""A bundle's manifest, ``scm.json``: its types and its validation.

A host reads the manifest before any other file. It contains no model mathematics: what differs between models is in the graphs.
"""

from __future__ import annotations

from itertools import pairwise
from math import prod
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from scm_runtime.bundle.text_spec import TextSpec as TextSpec
from scm_runtime.bundle.text_spec import TextTokenizer as TextTokenizer
from scm_runtime.common.documents import read_json
from scm_runtime.common.message_text import first_line, printable
from scm_runtime.errors import BundleNotFoundError, BundleSchemaError

SCHEMA_VERSION = 1
MANIFEST = "scm.json"
WEIGHTS = "weights.onnx.data"
SAMPLERS = "samplers.json"
COMBINE = "combine.onnx"

OPS_DOMAIN = "scm"
CHANNELS_LAST_DOMAIN = "scm.channels_last"  # standard ONNX operators in another memory layout: bundles need no kernels for this domain and the next two
CHANNELS_FIRST_DOMAIN = "scm.channels_first"
FUSED_DOMAIN = "scm.fused"  # combinations of the operators above, without which their parts run
OPS_VERSION = 1  # version of the operators that scm-export writes: docs/custom-ops.md

MAX_FLOAT32 = 3.4028234663852886e38
MAX_NAME_BYTES = 255
MAX_ELEMENTS = 1 << 31  # of one sample's state, output or conditioning

Count = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
Positive = Annotated[int, Meta(ge=1, le=(1 << 31) - 1)]
Real = Annotated[float, Meta(ge=-MAX_FLOAT32, le=MAX_FLOAT32)]
NAME = r"^[a-z][a-z0-9_]{0,99}\Z"
Dimension = Annotated[str, Meta(pattern=NAME)]  # name of a dynamic dimension
Shape = Annotated[tuple[Positive, ...], Meta(min_length=1, max_length=8)]
Dtype = Literal["fp32", "fp16", "bf16"]
OptionalGraph = Literal["encode", "preview", "text"]

STEP_INPUTS = ("x", "t", "t_next", "noise")
LABELS = "class_labels"  # the argument of a call, and the usual name of the input that it is for
CONDITIONING_DTYPES = {"class": "int64", "scalar": "float32", "embedding": "float32", "mask": "int64"}


class FileEntry(Struct, kw_only=True):
    """Size in bytes and SHA-256 of one file."""

    size: Count
    sha256: Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]


class SampleSpec(Struct, kw_only=True):
    """The state ``x``: float32 ``[N, *shape]``."""

    shape: Shape


class OutputSpec(Struct, kw_only=True):
    """Output of ``decode``, ``[N, *shape]``.

    ``kind`` "image": uint8, shape ``[H, W, C]``; "latent": float32, the unchanged state, in a bundle without a decoder.
    """

    kind: Literal["image", "latent"]
    shape: Shape


class Conditioning(Struct, kw_only=True):
    """One conditioning input of the step graph, ``[N, *shape]``.

    ``kind`` "class" holds class indices in [0, num_classes), "scalar" one number per sample, "embedding" real numbers, "mask" ones and zeros.
    A name in ``shape`` is a dynamic dimension: it has one size in a call, the same in every input that uses the name.
    ``default`` is the value if a call gives none. The default of a mask is all ones; an embedding has no default.
    """

    name: Annotated[str, Meta(pattern=NAME)]
    kind: Literal["class", "scalar", "embedding", "mask"]
    dtype: Literal["int64", "float32"]
    shape: Annotated[tuple[Positive | Dimension, ...], Meta(max_length=8)] = ()
    num_classes: Positive | None = None
    label_names: tuple[str, ...] | None = None
    default: Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)] | Real | None = None

    @property
    def is_array(self) -> bool:
        """True if a sample has an array of values, not one number."""
        return self.kind in ("embedding", "mask")

    def describe(self) -> str:
        """Dtype and shape: ``float32 [N, tokens, 2304]``."""
        return f"{self.dtype} [{', '.join(map(str, ('N', *self.shape)))}]"

    def validate(self) -> None:
        """Check what types alone cannot express. Raises ValueError."""
        what = f"conditioning {self.name!r} of kind {self.kind!r}"
        if self.name in STEP_INPUTS:
            raise ValueError(f"conditioning must have other names than the step graph's {', '.join(STEP_INPUTS)}, got {self.name!r}")
        if self.dtype != CONDITIONING_DTYPES[self.kind]:
            raise ValueError(f"{what} must have the dtype {CONDITIONING_DTYPES[self.kind]}, got {self.dtype}")
        if self.is_array != bool(self.shape):
            raise ValueError(f"{what} must be {'an array' if self.is_array else 'one number'} per sample, got the shape {list(self.shape)}")
        if self.is_array and self.default not in (None, 1 if self.kind == "mask" else None):
            raise ValueError(f"{what} must have no default, got {self.default}")
        if self.kind == "class" and self.num_classes is None:
            raise ValueError(f"{what} must give num_classes")
        if self.kind == "class" and isinstance(self.default, float):
            raise ValueError(f"{what} must have an integer as default, got {self.default}")
        if self.label_names is not None and len(self.label_names) != self.num_classes:
            raise ValueError(f"conditioning {self.name!r} must have {self.num_classes} label_names, got {len(self.label_names)}")


class LoraSource(Struct, kw_only=True):
    """A LoRA file that was added to the weights, and its scale."""

    file: str
    sha256: str
    scale: Real


class Source(Struct, kw_only=True, omit_defaults=True):
    """The checkpoint a bundle was made from."""

    file: str
    sha256: str
    weights: str | None = None
    """Key of the selected set of weights, if the checkpoint contains several."""
    guide: Source | None = None
    """Source of the autoguidance network, if there is one."""
    loras: tuple[LoraSource, ...] = ()
    """LoRA files in the weights, in the order in which they were added."""


class VerifiedCase(Struct, kw_only=True):
    """One comparison with the reference sampler.

    ``graph`` "step" with ``steps``: sampling with that graph, compared by final states; with ``steps`` 0: single evaluations, one sample at each of
    ``times``. "sample-K": the composed sampler. Other graphs have ``steps`` 0 and are compared alone, on the reference's input.
    ``max_abs`` and ``mean_abs`` are in the scale of the state, or in pixel levels if a network computes the pixels. ``psnr`` is in dB (null = identical),
    over uint8 pixels, or over the state, relative to the reference's range, if there are no pixels.
    """

    graph: str
    dtype: str
    batch_size: int
    steps: int
    max_abs: float
    atol: Annotated[float, Meta(gt=0)]
    psnr: float | None
    sampler: str | None = None
    """One of ``samplers``; None for the step graph's default sampler."""
    device: str = "cpu"
    mean_abs: float | None = None
    guidance_scale: float | None = None
    min_psnr: float | None = None
    """Lowest ``psnr`` that passes."""
    times: tuple[float, ...] = ()
    output: str | None = None
    """Name of the compared output of a graph with several."""
    sizes: dict[str, int] = {}
    """Sizes of the conditioning's dynamic dimensions, by name."""


class Verification(Struct, kw_only=True):
    """The exporter's comparison of the bundle with the reference."""

    reference: str
    device: str
    cases: Annotated[tuple[VerifiedCase, ...], Meta(min_length=1)]


class Manifest(Struct, kw_only=True):
    """``scm.json``. Unknown keys are ignored; an unknown ``schema_version`` is an error."""

    schema_version: int
    name: str
    producer: str
    family: str
    licence: str | None
    source: Source
    parameters: Count
    sample: SampleSpec
    output: OutputSpec
    sigma_data: Real
    initial_scale: Real
    times: dict[Annotated[str, Meta(pattern=r"^[1-9][0-9]{0,6}\Z")], tuple[Real, ...]]
    time_unit: Literal["radians", "sigma", "timestep"] = "radians"
    solver: Literal["consistency", "ddim"] = "consistency"
    """How the step graph moves between two times: predict the data and add fresh noise, or follow the ODE without noise."""
    samplers: dict[Annotated[str, Meta(pattern=r"^[a-z][a-z0-9+-]*\Z")], Annotated[tuple[Positive, ...], Meta(min_length=1)]] = {}
    """Additional samplers of a diffusion model, each with its step counts in ``samplers.json``."""
    conditioning: tuple[Conditioning, ...]
    dtypes: Annotated[tuple[Dtype, ...], Meta(min_length=1)]
    weights_dtype: str
    opset: Positive
    ops: dict[str, Positive]
    composed_steps: tuple[Positive, ...] = ()
    verification: Verification | None = None
    files: dict[str, FileEntry]
    text: TextSpec | None = None
    """The text encoder. ``scm.json`` has no such key if there is none."""

    def to_json(self) -> bytes:
        """Contents of ``scm.json``."""
        contents = msgspec.to_builtins(self)
        if self.text is None:
            del contents["text"]
        return msgspec.json.format(msgspec.json.encode(contents), indent=2)

    @property
    def labels(self) -> Conditioning | None:
        """The input that ``class_labels`` of a call is for: the one of that name, else the only input of kind "class"; None if there is neither."""
        only, classes = None, 0
        for item in self.conditioning:
            if item.name == LABELS:
                return item
            if item.kind == "class":
                only, classes = item, classes + 1
        return only if classes == 1 else None

    def optional_graph(self, kind: OptionalGraph, dtype: Dtype) -> str | None:
        """File of an optional graph: in a dtype, else in fp32; None if the bundle has neither."""
        return next((name for name in (f"{kind}.{dtype}.onnx", f"{kind}.fp32.onnx") if name in self.files), None)

    def files_for(self, dtype: Dtype) -> tuple[str, ...]:
        """Files that a Generator reads to run the graphs in a dtype."""
        kinds: tuple[OptionalGraph, ...] = ("encode", "preview") if self.text is None else ("encode", "preview", "text")
        optional = [name for kind in kinds if (name := self.optional_graph(kind, dtype))]
        tokenizers = () if self.text is None else dict.fromkeys(tokenizer.file for tokenizer in self.text.tokenizers)
        solving = (SAMPLERS, COMBINE) if self.samplers else ()
        return ("noise.onnx", f"step.{dtype}.onnx", f"decode.{dtype}.onnx", *optional, *tokenizers, *solving, WEIGHTS)

    def validate(self) -> None:
        """Check what types alone cannot express. Raises ValueError."""
        for name in self.files:
            if not _is_plain(name):
                raise ValueError(f"files must have plain names inside the bundle's folder, got '{printable(name)}'")
        shapes = {"sample": self.sample.shape, "output": self.output.shape, **{item.name: item.shape for item in self.conditioning}}
        for name, shape in shapes.items():
            if prod(size for size in shape if isinstance(size, int)) > MAX_ELEMENTS:
                raise ValueError(f"the shape of {name} must have at most {MAX_ELEMENTS} elements, got {list(shape)}")
        if "fp32" not in self.dtypes:
            raise ValueError(f"dtypes must hold fp32, got {', '.join(self.dtypes)}")
        needed = {"noise.onnx", WEIGHTS, *(f"{graph}.{dtype}.onnx" for graph in ("step", "decode") for dtype in self.dtypes)}
        needed |= {SAMPLERS, COMBINE} if self.samplers else set()
        if missing := sorted(needed - set(self.files)):
            raise ValueError(f"files must list the weights and every graph of the dtypes {', '.join(self.dtypes)}, missing {', '.join(missing)}")
        if not self.times:
            raise ValueError("times must hold at least one step count, got none")
        for steps, times in self.times.items():
            if len(times) != int(steps) + 1:
                raise ValueError(f"times for {steps} steps must have {int(steps) + 1} values, got {len(times)}")
            if any(a <= b for a, b in pairwise(times)):
                raise ValueError(f"times must be decreasing, got {list(times)} for {steps} steps")
        if len({times[-1] for times in self.times.values()}) > 1:
            raise ValueError("times must have the same end for every step count")
        if self.solver in self.samplers:
            raise ValueError(f"samplers must not contain the step graph's default sampler, {self.solver!r}")
        if self.output.kind == "image" and len(self.output.shape) != 3:
            raise ValueError(f"output of kind 'image' must have the shape [H, W, C], got {list(self.output.shape)}")
        if self.output.kind == "latent" and self.output.shape != self.sample.shape:
            raise ValueError(f"output of kind 'latent' must have the state's shape {list(self.sample.shape)}, got {list(self.output.shape)}")
        for item in self.conditioning:
            item.validate()
        names = [item.name for item in self.conditioning]
        if len(set(names)) < len(names):
            raise ValueError(f"conditioning must have different names, got {', '.join(names)}")
        if self.text is not None:
            self.text.validate(self.conditioning, self.files)


def read_manifest(folder: Path) -> Manifest:
    """Read and check ``scm.json`` in a bundle's folder.

    Raises:
        BundleNotFoundError: the manifest cannot be read.
        BundleSchemaError: it is not valid JSON, has a newer schema, or its contents are inconsistent.
    """
    path = folder / MANIFEST
    try:
        raw = read_json(path)
        version = raw.get("schema_version") if isinstance(raw, dict) else None
        if isinstance(version, int) and version != SCHEMA_VERSION:
            raise BundleSchemaError(
                f"'{path}' has schema version {printable(version)}, this scm-runtime reads version {SCHEMA_VERSION}. "
                + ("Upgrade it: pip install -U . in an updated clone" if version > SCHEMA_VERSION else "Export the checkpoint again.")
            )
        manifest = msgspec.convert(raw, Manifest)
        manifest.validate()
    except OSError as error:
        raise BundleNotFoundError(f"cannot read '{path}': {error.strerror or error}. Expected a folder written by scm-export.") from error
    except ValueError as error:
        if isinstance(error, BundleSchemaError):
            raise
        raise BundleSchemaError(f"'{path}' is not a valid manifest: {first_line(error)}. Export the checkpoint again.") from error
    return manifest


def _is_plain(name: str) -> bool:
    """Return True if a file's name is one inside of the bundle's folder, on every system."""
    inside = PurePosixPath(name).name == name and not set(name) & {"\\", ":"} and name not in ("", ".", "..", MANIFEST)
    return inside and name.isprintable() and len(name.encode()) <= MAX_NAME_BYTES
