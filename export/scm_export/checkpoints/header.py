"""A checkpoint's description without its tensors. It is in the checkpoint file, or in a TOML or JSON file (``--config``)."""

from __future__ import annotations

import difflib
import keyword
import math
import os
import re
import types
import typing
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from scm_export.choices import PARAMETRISATION_NAMES, ParametrisationName
from scm_export.errors import CheckpointError, CheckpointNotFoundError
from scm_runtime.bundle.manifest import CONDITIONING_DTYPES, Conditioning, Dimension
from scm_runtime.common.documents import MAX_TOML_BYTES, read_json, read_toml
from scm_runtime.common.message_text import MAX_SHOWN, first_line, printable

T_LIMIT = math.pi / 2 + 1e-4  # some samplers round pi/2 up
DOCUMENT = "docs/checkpoint-format.md"

MAX_STEPS = 1000  #         the training steps of diffusion models
SMALLEST, LARGEST = 1e-6, 1e6  # of the numbers that scale the state and its pixels: float32 must hold their squares
# Control characters other than tabs and line breaks, characters that reorder the text around them, and halves of characters.
CONTROLS = r"\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff"
NOT_IN_LICENCE, NOT_IN_LABEL = re.compile(f"[{CONTROLS}]"), re.compile(rf"[{CONTROLS}\t\n\r\u2028\u2029]")
MAX_TEXT = 1000  #          characters of a label or licence
TYPICAL_LENGTH = 64  #      what a dynamic dimension counts as
MAX_ELEMENTS = 1 << 24  #   of the state or of one conditioning

PositiveNumber = Annotated[float, Meta(gt=0)]
PositiveInteger = Annotated[int, Meta(ge=1)]

AnyStruct = TypeVar("AnyStruct", bound=Struct)


class SamplerSpec(Struct, kw_only=True, forbid_unknown_fields=True):
    """How to sample from the network."""

    parametrisation: ParametrisationName = "trigflow"
    solver: Literal["consistency", "ddim"] = "consistency"
    """What a step does: jump to the data and add fresh noise, or follow the ODE without noise (diffusion teachers, segments)."""
    diffusion: bool | None = None
    """True if the network is a diffusion model, whose ODE any solver can follow; None = True for solver "ddim" without segments."""
    sigma_data: PositiveNumber = 0.5
    initial_scale: PositiveNumber | None = None
    """Standard deviation of the initial state, which is normal noise; None = sigma_data."""
    times: dict[str, tuple[float, ...]] | None = None
    """Times by step count, end time included; None = those of the sCM paper for one and two steps, or EDM's noise levels for 8, 16 and 32 steps if
    the network is a diffusion model."""
    pixel_scale: float = 127.5
    """Pixel level = x * pixel_scale + pixel_offset, with x in the scale of the model; the defaults are for data in [-1, 1]."""
    pixel_offset: float = 127.5
    latent_mean: tuple[float, ...] | None = None
    latent_std: tuple[float, ...] | None = None
    """Mean and standard deviation per channel of the autoencoder's latents z: z = x * latent_std / sigma_data + latent_mean."""

    def validate(self) -> None:
        """Check constraints that the types do not express. Raises ValueError."""
        for name in ("sigma_data", "initial_scale", "pixel_scale", "pixel_offset"):
            value = getattr(self, name)
            if value is not None and (not math.isfinite(value) or (name == "pixel_scale" and value == 0)):
                raise ValueError(f"sampler.{name} must be finite{' and not 0' * (name == 'pixel_scale')}, got {value}")
            if value is not None and (abs(value) > LARGEST or (name in ("sigma_data", "initial_scale") and value < SMALLEST)):
                raise ValueError(f"sampler.{name} must be a number from {SMALLEST:g} to {LARGEST:g} in magnitude, got {value:g}")
        for name in ("latent_mean", "latent_std"):
            if any(abs(number) > LARGEST for number in getattr(self, name) or () if math.isfinite(number)):
                raise ValueError(f"sampler.{name} must have numbers of at most {LARGEST:g}, got {list(getattr(self, name))!s:.200}")
            if not all(map(math.isfinite, getattr(self, name) or ())):
                raise ValueError(f"sampler.{name} must be finite, got {list(getattr(self, name))}")
        for count, times in (self.times or {}).items():
            steps = int(count) if count.isdecimal() and len(count) < 10 else 0
            if not 1 <= steps <= MAX_STEPS or len(times) != steps + 1:
                raise ValueError(
                    f"sampler.times must have step counts from 1 to {MAX_STEPS}, each with one time more than steps, got '{printable(count)}' with {len(times)}"
                )
            if not all(0 <= t <= T_LIMIT for t in times) or any(a <= b for a, b in pairwise(times)):
                raise ValueError(f"sampler.times must be TrigFlow's, decreasing and in [0, {T_LIMIT:.4f}], got {list(times)!s:.200} for {count} steps")
            if self.parametrisation == "edm" and times[0] >= math.pi / 2 - 1e-6:
                raise ValueError(f"sampler.times of the parametrisation edm must be below pi/2, where sigma is infinite, got {list(times)!s:.200}")
        if len({times[-1] for times in (self.times or {}).values()}) > 1:
            raise ValueError("sampler.times must have the same end time for every step count")
        if self.diffusion and self.solver != "ddim":
            raise ValueError(f"sampler.solver of a diffusion model must be 'ddim', got {self.solver!r}")
        if self.times == {}:
            raise ValueError("sampler.times must hold at least one step count, got none; leave it out for the paper's times")


class ConditioningSpec(Struct, kw_only=True, forbid_unknown_fields=True):
    """One input of the network besides state and level, passed by name. The fields are those of :class:`~scm_runtime.bundle.manifest.Conditioning`."""

    name: str
    kind: Literal["class", "scalar", "embedding", "mask"]
    shape: tuple[PositiveInteger | Dimension, ...] = ()
    num_classes: PositiveInteger | None = None
    label_names: tuple[str, ...] | None = None
    default: int | float | None = None

    def conditioning(self) -> Conditioning:
        """Convert to the manifest's description of this input; the dtype follows from the kind.

        Raises:
            ValueError: the fields do not fit together.
        """
        dtype = typing.cast(Literal["int64", "float32"], CONDITIONING_DTYPES[self.kind])
        if math.prod(size if isinstance(size, int) else TYPICAL_LENGTH for size in self.shape) > MAX_ELEMENTS:
            raise ValueError(
                f"conditioning must have at most {MAX_ELEMENTS} elements per sample, got the shape {list(self.shape)!s:.200} for {printable(self.name)}"
            )
        item = Conditioning(**{name: getattr(self, name) for name in self.__struct_fields__}, dtype=dtype)
        if not re.fullmatch(r"[a-z][a-z0-9_]{0,99}", self.name) or keyword.iskeyword(self.name):
            raise ValueError(
                "conditioning must have a name of at most 100 lower-case letters, digits and underscores that is no keyword of Python, "
                f"got '{printable(self.name)}'"
            )
        item.validate()
        return item


class Header(Struct, kw_only=True, forbid_unknown_fields=True):
    """A scm-checkpoint without its weights: the contents of a ``--config`` file, for tensors or programs that have no description."""

    family: str = "module"
    config: dict[str, Any] = {}
    sampler: SamplerSpec = msgspec.field(default_factory=SamplerSpec)
    conditioning: tuple[ConditioningSpec, ...] = ()
    label_names: tuple[str, ...] | None = None
    licence: str | None = None


def read_header(config: str | os.PathLike[str] | Mapping[str, Any]) -> Header:
    """Read a ``--config`` file, TOML or JSON, or a dict with the same contents.

    Raises:
        CheckpointNotFoundError: no such file.
        CheckpointError: not TOML or JSON, an unknown key, or a value of another type or range.
    """
    if isinstance(config, Mapping):
        return _header(config, "the config")
    path = Path(config)
    if path.suffix not in (".toml", ".json"):
        raise CheckpointError(f"the config '{path}' must end in .toml or .json ({DOCUMENT})")
    try:
        raw: object = read_toml(path) if path.suffix == ".toml" else read_json(path, max_bytes=MAX_TOML_BYTES)
    except OSError as error:
        missing = isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError)
        raise (CheckpointNotFoundError if missing else CheckpointError)(
            f"cannot read the config '{path}': {error.strerror or error}. {DOCUMENT} has an example."
        ) from error
    except ValueError as error:  # of UTF-8, TOML and JSON alike
        raise CheckpointError(f"the config '{path}' is not valid {path.suffix[1:].upper()}: {first_line(error)}. {DOCUMENT} has an example.") from error
    return _header(raw, f"the config '{path}'")


def _header(raw: object, what: str) -> Header:
    try:
        header = convert(raw, Header)
        validate(header.family, header.sampler, header.conditioning, header.label_names, header.licence)
    except ValueError as error:
        raise CheckpointError(f"{what}: {first_line(error)} ({DOCUMENT})") from error
    return header


def example_config(inputs: tuple[str, ...] = ()) -> str:
    """Return a valid ``--config`` file as a template.

    Args:
        inputs: names of the program's inputs besides state and level, if they are known.
    """
    blocks = [
        f"# [[conditioning]]\n"
        f'# name = "{name}"  # the keyword of the network\n'
        f'# kind = "class"  # or one of: {", ".join(kind for kind in CONDITIONING_DTYPES if kind != "class")}\n'
        f"# num_classes = 10  # for the kind class; an embedding and a mask have a shape instead, such as [77, 768]\n"
        for name in inputs or ("class_labels",)
    ]
    others = ", ".join(name for name in PARAMETRISATION_NAMES if name != "trigflow")
    return (
        'family = "module"  # a user-defined network; for bare weights of an EDM2 network, use "edm2" and its [config]\n'
        "\n"
        "[config]\n"
        "sample_shape = [3, 32, 32]  # fill in: channels, height and width of what the network denoises\n"
        "\n"
        "[sampler]\n"
        f'parametrisation = "trigflow"  # what the network predicts; or one of: {others}\n'
        "sigma_data = 0.5  # fill in: standard deviation of the training data in the scale of the network\n"
        "# times = { 1 = [1.5645, 0], 2 = [1.5645, 1.1, 0] }  # by step count, in radians; these are close to the defaults\n"
        "\n"
        "# A block for each input of the network besides the state and its level:\n" + "\n".join(blocks)
    )


def validate(family: str, sampler: SamplerSpec, conditioning: tuple[ConditioningSpec, ...], label_names: Sequence[str] | None, licence: str | None) -> None:
    """Check constraints of a header that its types do not express. Raises ValueError."""
    sampler.validate()
    labels = [label for names in (label_names, *(item.label_names for item in conditioning)) for label in names or ()]
    for what, text, excluded in (("licence", licence or "", NOT_IN_LICENCE), *(("label_names", label, NOT_IN_LABEL) for label in labels)):
        if len(text) > MAX_TEXT or excluded.search(text):
            lines = " or line breaks" * (excluded is NOT_IN_LABEL)
            raise ValueError(f"{what} must have at most {MAX_TEXT} characters and no control characters{lines}, got '{printable(text)}'")
    if conditioning and family != "module":
        raise ValueError(f"conditioning is for user-defined networks, of the family 'module'; the family {family!r} defines its inputs: leave it out")
    for item in conditioning:
        item.conditioning()
    names = [item.name for item in conditioning]
    if len(set(names)) < len(names):
        raise ValueError(f"conditioning must have different names, got {', '.join(names)}")


def convert(raw: object, struct: type[AnyStruct]) -> AnyStruct:
    """Convert plain values to a struct.

    Raises:
        ValueError: a value has the wrong type, or a key is unknown; the message then suggests the closest known key.
    """
    try:
        return msgspec.convert(raw, struct)
    except msgspec.ValidationError as error:
        raise ValueError(explain_error(error, struct)) from error
    except OverflowError as error:  # an integer for a float field
        raise ValueError(f"a number is too large: {error}") from error


def explain_error(error: msgspec.ValidationError, struct: type[Struct]) -> str:
    """Text of the error; for an unknown key, with the closest known key; for a value that is none of several strings, with all of them."""
    text = str(error)
    if enum := re.match(r"Invalid enum value (.*) - at `\$\.(.*)`$", text, re.DOTALL):
        path = re.sub(r"\[.*?\]", "", enum[2])
        choices = _choices(path, struct)
        close = difflib.get_close_matches(enum[1].strip("'"), choices, n=1)
        return f"{path} must be one of {', '.join(choices)}, got {enum[1]}" + (f"; did you mean {close[0]!r}?" if close else "")
    found = re.match(r"Object contains unknown field `(.*?)`(?: - at `\$(.*)`)?$", text, re.DOTALL)
    if not found:
        return text
    key, path = found[1], re.sub(r"\[.*?\]", "", found[2] or "")
    inner = _struct_at(path, struct)
    known = inner.__struct_fields__ if inner else ()
    close = difflib.get_close_matches(key[:MAX_SHOWN], known, n=1, cutoff=0.5)
    where = f" in [{path.lstrip('.')}]" if path else ""
    meant = f"did you mean {close[0]!r}? Known" if close else "known"
    return f"unknown field `{printable(key)}`{where}; {meant} are {', '.join(known)}"


def _struct_at(path: str, struct: type[Struct]) -> type[Struct] | None:
    """Return the struct at a dotted path of fields; None if there is none."""
    inner: type[Struct] | None = struct
    for name in filter(None, path.split(".")):
        inner = _struct_in(typing.get_type_hints(inner).get(name)) if inner else None
    return inner


def _choices(path: str, struct: type[Struct]) -> tuple[str, ...]:
    """Return the strings that the field at a dotted path may have; empty if it is not a field of that kind."""
    parent, _, name = path.rpartition(".")
    inner = _struct_at(parent, struct)
    return typing.get_args(typing.get_type_hints(inner).get(name)) if inner else ()


def _struct_in(hint: Any) -> type[Struct] | None:
    """Return the struct in a field's type, which may be a container of it; None if there is none."""
    if isinstance(hint, type) and not isinstance(hint, types.GenericAlias) and issubclass(hint, Struct):
        return hint
    return next(filter(None, map(_struct_in, typing.get_args(hint))), None)
