"""What a checkpoint says besides its tensors: in the file itself, or in a small TOML or JSON file beside it (``--config``)."""

from __future__ import annotations

import difflib
import math
import re
import tomllib
import types
import typing
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from scm_export.choices import PARAMETRISATION_NAMES, ParametrisationName
from scm_export.errors import CheckpointError, CheckpointNotFoundError
from scm_runtime.bundle.manifest import CONDITIONING_DTYPES, Conditioning, Dimension

T_LIMIT = math.pi / 2 + 1e-4  # some samplers round pi/2 up
DOCUMENT = "docs/checkpoint-format.md"

PositiveNumber = Annotated[float, Meta(gt=0)]
PositiveInteger = Annotated[int, Meta(ge=1)]

AnyStruct = TypeVar("AnyStruct", bound=Struct)


class SamplerSpec(Struct, kw_only=True, forbid_unknown_fields=True):
    """How the network was trained to be sampled."""

    parametrisation: ParametrisationName = "trigflow"
    solver: Literal["consistency", "ddim"] = "consistency"
    """How a step moves: to the data and back into fresh noise, or along the ODE without noise (diffusion teachers, segments)."""
    diffusion: bool | None = None
    """Whether the network is a diffusion model, whose ODE any solver may follow; None = whatever has the solver "ddim" and no segments."""
    sigma_data: PositiveNumber = 0.5
    initial_scale: PositiveNumber | None = None
    """The state starts as this times standard normal noise; None = sigma_data."""
    times: dict[str, tuple[float, ...]] | None = None
    """Times by step count, each with its end; None = the paper's for one and two steps, of a diffusion model EDM's noise levels for 8, 16 and 32."""
    pixel_scale: float = 127.5
    """Pixel level = x * pixel_scale + pixel_offset, x in the model's own scale; the defaults are for data in [-1, 1]."""
    pixel_offset: float = 127.5
    latent_mean: tuple[float, ...] | None = None
    latent_std: tuple[float, ...] | None = None
    """Of the autoencoder's latents, by channel, before they were scaled to sigma_data: z = x * latent_std / sigma_data + latent_mean."""

    def validate(self) -> None:
        """Check what the types alone cannot say. Raises ValueError."""
        for name in ("sigma_data", "initial_scale", "pixel_scale", "pixel_offset"):
            value = getattr(self, name)
            if value is not None and (not math.isfinite(value) or (name == "pixel_scale" and value == 0)):
                raise ValueError(f"sampler.{name} must be finite{' and not 0' * (name == 'pixel_scale')}, got {value}")
        for name in ("latent_mean", "latent_std"):
            if not all(map(math.isfinite, getattr(self, name) or ())):
                raise ValueError(f"sampler.{name} must be finite, got {list(getattr(self, name))}")
        for count, times in (self.times or {}).items():
            steps = int(count) if count.isdecimal() else 0
            if steps < 1 or len(times) != steps + 1:
                raise ValueError(f"sampler.times must give a step count of at least 1 one time more than steps, got {count!r} with {len(times)}")
            if not all(0 <= t <= T_LIMIT for t in times) or any(a <= b for a, b in pairwise(times)):
                raise ValueError(f"sampler.times must be TrigFlow's, decreasing and in [0, {T_LIMIT:.4f}], got {list(times)} for {count} steps")
            if self.parametrisation == "edm" and times[0] >= math.pi / 2 - 1e-6:
                raise ValueError(f"sampler.times of the parametrisation edm must be below pi/2, where sigma is infinite, got {list(times)} for {count} steps")
        if len({times[-1] for times in (self.times or {}).values()}) > 1:
            raise ValueError("sampler.times must have the same end for every step count")
        if self.diffusion and self.solver != "ddim":
            raise ValueError(f"sampler.solver of a diffusion model must be 'ddim', got {self.solver!r}")
        if self.times == {}:
            raise ValueError("sampler.times must hold at least one step count, got none; leave it out for the paper's times")


class ConditioningSpec(Struct, kw_only=True, forbid_unknown_fields=True):
    """One input of the network beyond state and level, passed by name; the fields are those of :class:`~scm_runtime.bundle.Conditioning`."""

    name: str
    kind: Literal["class", "scalar", "embedding", "mask"]
    shape: tuple[PositiveInteger | Dimension, ...] = ()
    num_classes: PositiveInteger | None = None
    label_names: tuple[str, ...] | None = None
    default: int | float | None = None

    def conditioning(self) -> Conditioning:
        """As it stands in the manifest; the dtype follows from the kind.

        Raises:
            ValueError: the fields do not fit together.
        """
        dtype = typing.cast(Literal["int64", "float32"], CONDITIONING_DTYPES[self.kind])
        item = Conditioning(**{name: getattr(self, name) for name in self.__struct_fields__}, dtype=dtype)
        if not re.fullmatch(r"[a-z][a-z0-9_]*", self.name):
            raise ValueError(f"conditioning must have a name of lower-case letters, digits and underscores, got {self.name!r}")
        item.validate()
        return item


class Header(Struct, kw_only=True, forbid_unknown_fields=True):
    """A scm-checkpoint without its weights: what ``--config`` says of tensors or of a program that cannot say it themselves."""

    family: str = "module"
    config: dict[str, Any] = {}
    sampler: SamplerSpec = msgspec.field(default_factory=SamplerSpec)
    conditioning: tuple[ConditioningSpec, ...] = ()
    label_names: tuple[str, ...] | None = None
    licence: str | None = None


def read_header(path: Path) -> Header:
    """Read a ``--config`` file, TOML or JSON.

    Raises:
        CheckpointNotFoundError: no such file.
        CheckpointError: not TOML or JSON, an unknown key, or a value of another type or range.
    """
    if path.suffix not in (".toml", ".json"):
        raise CheckpointError(f"the config '{path}' must end in .toml or .json ({DOCUMENT})")
    try:
        text = path.read_text("utf-8")
        raw = tomllib.loads(text) if path.suffix == ".toml" else msgspec.json.decode(text)
    except OSError as error:
        missing = isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError)
        raise (CheckpointNotFoundError if missing else CheckpointError)(
            f"cannot read the config '{path}': {error.strerror}. {DOCUMENT} has an example."
        ) from error
    except (ValueError, RecursionError) as error:  # of UTF-8, TOML and JSON alike
        raise CheckpointError(f"the config '{path}' is not valid {path.suffix[1:].upper()}: {error}") from error
    try:
        header = convert(raw, Header)
        validate(header.family, header.sampler, header.conditioning)
    except ValueError as error:
        raise CheckpointError(f"the config '{path}': {error} ({DOCUMENT})") from error
    return header


def example_config(inputs: tuple[str, ...] = ()) -> str:
    """A ``--config`` file to fill in, valid as it is. ``inputs`` are the names of a program's inputs besides state and level, where they are known."""
    blocks = [
        f"# [[conditioning]]\n"
        f'# name = "{name}"  # the keyword of the network\n'
        f'# kind = "class"  # or one of: {", ".join(kind for kind in CONDITIONING_DTYPES if kind != "class")}\n'
        f"# num_classes = 10  # of the kind class; an embedding and a mask have a shape, such as [77, 768]\n"
        for name in inputs or ("class_labels",)
    ]
    others = ", ".join(name for name in PARAMETRISATION_NAMES if name != "trigflow")
    return (
        'family = "module"  # a network of your own; bare weights of an EDM2 network have "edm2" and its [config]\n'
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


def validate(family: str, sampler: SamplerSpec, conditioning: tuple[ConditioningSpec, ...]) -> None:
    """Check what the types of a header alone cannot say. Raises ValueError."""
    sampler.validate()
    if conditioning and family != "module":
        raise ValueError(f"conditioning is for networks of your own, of the family 'module'; the family {family!r} knows its inputs: leave it out")
    for item in conditioning:
        item.conditioning()
    names = [item.name for item in conditioning]
    if len(set(names)) < len(names):
        raise ValueError(f"conditioning must have different names, got {', '.join(names)}")


def convert(raw: object, struct: type[AnyStruct]) -> AnyStruct:
    """Check plain values against a struct.

    Raises:
        ValueError: they do not fit; of an unknown key it names the closest known one.
    """
    try:
        return msgspec.convert(raw, struct)
    except msgspec.ValidationError as error:
        raise ValueError(explain(error, struct)) from error
    except OverflowError as error:  # an integer where a float is wanted
        raise ValueError(f"a number is too large: {error}") from error


def explain(error: msgspec.ValidationError, struct: type[Struct]) -> str:
    """The error's text, and for an unknown key the closest known one."""
    text = str(error)
    found = re.match(r"Object contains unknown field `(.*?)`(?: - at `\$(.*)`)?$", text, re.DOTALL)
    if not found:
        return text
    key, path = found[1], re.sub(r"\[.*?\]", "", found[2] or "")
    inner: type[Struct] | None = struct
    for name in filter(None, path.split(".")):
        inner = _struct_in(typing.get_type_hints(inner).get(name)) if inner else None
    known = inner.__struct_fields__ if inner else ()
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    where = f" in [{path.lstrip('.')}]" if path else ""
    meant = f"did you mean {close[0]!r}? Known" if close else "known"
    return f"unknown field `{key}`{where}; {meant} are {', '.join(known)}"


def _struct_in(hint: Any) -> type[Struct] | None:
    """The struct that a field's type is, or is a container of."""
    if isinstance(hint, type) and not isinstance(hint, types.GenericAlias) and issubclass(hint, Struct):
        return hint
    return next(filter(None, map(_struct_in, typing.get_args(hint))), None)
