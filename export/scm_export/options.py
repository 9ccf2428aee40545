"""``Options``: every option of an export, declared, documented and checked in one place.

:func:`scm_export.export` takes its fields as keyword arguments; the command line has an option of the same name for each field but ``progress``.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec, Protocol, TypeVar, cast

from scm_export.choices import (
    GRAPH_DTYPES,
    MIN_OPSET,
    OPSETS,
    PREDICTION_TYPES,
    QUANTIZED_BITS,
    SCHEDULER_NAMES,
    TEXT_DTYPES,
    ParametrisationName,
    PredictionType,
    SchedulerName,
    TextDtype,
)
from scm_runtime.bundle.manifest import Dtype
from scm_runtime.common.load_onnxruntime import load_onnxruntime
from scm_runtime.errors import InvalidArgumentError

if TYPE_CHECKING:
    from torch import nn

StrPath = str | os.PathLike[str]


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to export a checkpoint.

    Args:
        revision: branch, tag or commit of a repository of the Hugging Face hub; None for its main branch.
        family: how to read the checkpoint, one of ``scm_export.families.FAMILIES``; None to detect it from the checkpoint.
        config: TOML or JSON file, or a dict, that describes bare tensors, a program or a network in memory: family, configuration, sampler, conditioning
            (docs/checkpoint-format.md).
        factory: ``package.module:function``, for the family "module": returns the network that the checkpoint's tensors are loaded into. The function
            is run. Modules are also looked for in the current folder.
        weights: dotted key of the set of weights to export if a training checkpoint holds several (``"ema"``), or name of a network in an EDM2 pickle.
            None for the only set, or, of several, the only one whose key names a moving average. The manifest records the key.
        parametrisation: what the network predicts, one of ``scm_export.choices.PARAMETRISATION_NAMES``; replaces the value in the checkpoint or config.
        trust: also open files that can only be read by running code from them: TorchScript, pickled modules, unusual ``.pt2`` files.
        dtype: dtype of the stored weights, "fp32", "fp16" or "bf16"; None for the family's default. The last two give graphs in that dtype and fp32 graphs
            over the same half-precision weights.
        decoder: folder or repository of an autoencoder in diffusers' format, for latent models whose checkpoint does not contain one. Or your own decoder:
            ``package.module:function``, which returns a network from latents to pixels, or such a network. The function is run.
        latents: leave the decoder out; the bundle's samples are latents.
        with_encoder: also write the autoencoder's encoder, ``encode.*.onnx``.
        preview_decoder: folder or repository of a small autoencoder (AutoencoderTiny), written as ``preview.*.onnx``.
        text: write the text encoder and its tokenizer, if the checkpoint has them. False leaves them out: the bundle takes embeddings only.
        text_dtype: dtype of the text encoder's weights, "fp32", "fp16", "bf16", "int8" or "int4"; None for that of the other weights. The last two quantize its
            linear layers to operators of ONNX Runtime, in the fp32 graph only; its other weights have the dtype of the bundle's.
        guide: checkpoint of a worse version of a diffusion model (smaller, less trained, without classes) for autoguidance, with ``guidance_scale`` as an
            input of the bundle. For the family edm2. It must hold one set of weights: ``weights`` does not apply to it.
        scheduler: scheduler of a distilled Stable Diffusion model, one of ``scm_export.choices.SCHEDULER_NAMES``: the one that its model card names. None for
            the checkpoint's own. For the family sd-distilled.
        prediction_type: what the U-Net of such a model predicts, one of ``scm_export.choices.PREDICTION_TYPES``; None for the value in the checkpoint's
            scheduler, or "epsilon" if it has none.
        guidance: export such a model with classifier-free guidance: ``negative_prompt_embeds`` and ``guidance_scale`` become inputs, and each step evaluates
            the U-Net twice.
        lora: LoRA files to add to the weights, each ``"FILE"`` or ``"FILE:SCALE"``, in the layout of kohya, PEFT or diffusers; or repositories of the hub.
        size: height and width of the images in pixels; None for the checkpoint's own.
        steps: step counts to compose whole samplers for, ``sample-K``; the checkpoint must have times for each. None for all counts up to 4, or the
            smallest count if all are larger and it is at most 64, the largest. May be empty.
        opset: ONNX operator set, 18 to 23; None for 20, or 22 for bf16, which requires it.
        custom_ops: keep the operators of docs/custom-ops.md as nodes, with function bodies for runtimes without the library. False replaces the nodes
            by their bodies: standard ONNX, for other runtimes and tools.
        force: replace an existing bundle.
        verify: compare the bundle's samples with those of the original sampler (``scm_export.verification``).
        atol: largest allowed absolute difference, in the scale of the state; None for the table in ``verification/tolerances.py``.
        report: HTML file for a report of the verification with images; also written if the bundle fails it.
        progress: called with the name of each stage when it begins.

    Raises:
        InvalidArgumentError: a value is out of range, or two options exclude each other.
        MissingDependencyError: the bundle is to be verified, and ONNX Runtime is not installed.
    """

    revision: str | None = None
    family: str | None = None
    config: StrPath | Mapping[str, Any] | None = None
    factory: str | None = None
    weights: str | None = None
    parametrisation: ParametrisationName | None = None
    trust: bool = False
    dtype: Dtype | None = None
    decoder: StrPath | nn.Module | None = None
    latents: bool = False
    with_encoder: bool = False
    preview_decoder: StrPath | None = None
    text: bool = True
    text_dtype: TextDtype | None = None
    guide: StrPath | None = None
    scheduler: SchedulerName | None = None
    prediction_type: PredictionType | None = None
    guidance: bool = False
    lora: Sequence[StrPath] = ()
    size: tuple[int, int] | None = None
    steps: Sequence[int] | None = None
    opset: int | None = None
    custom_ops: bool = True
    force: bool = False
    verify: bool = True
    atol: float | None = None
    report: StrPath | None = None
    progress: Callable[[str], None] = lambda stage: None

    def __post_init__(self) -> None:
        if self.dtype is not None and self.dtype not in GRAPH_DTYPES:
            raise InvalidArgumentError(f"dtype must be one of {', '.join(GRAPH_DTYPES)}, got {self.dtype!r}")
        dtype = self.dtype or "fp32"
        if self.opset is not None and self.opset not in range(MIN_OPSET[dtype], OPSETS[-1] + 1):
            raise InvalidArgumentError(f"opset must be from {MIN_OPSET[dtype]} to {OPSETS[-1]} for {dtype}, got {self.opset}")
        if self.text_dtype is not None and self.text_dtype not in TEXT_DTYPES:
            raise InvalidArgumentError(f"text_dtype must be one of {', '.join(TEXT_DTYPES)}, got {self.text_dtype!r}")
        if self.text_dtype is not None and not self.text:
            raise InvalidArgumentError(f"text_dtype is {self.text_dtype}, but text is False, which leaves the text encoder out: give one of them")
        if self.text_dtype in QUANTIZED_BITS and not self.custom_ops:
            raise InvalidArgumentError(
                f"text_dtype {self.text_dtype} needs operators of ONNX Runtime, but custom_ops is False: use fp32, fp16 or bf16, or leave custom_ops on"
            )
        if self.atol is not None and not self.atol > 0:
            raise InvalidArgumentError(f"atol must be above 0, got {self.atol}")
        if self.size is not None and min(self.size) < 1:
            raise InvalidArgumentError(f"size must be a height and a width of at least 1, got {self.size[0]}x{self.size[1]}")
        for name, value, known in (("scheduler", self.scheduler, SCHEDULER_NAMES), ("prediction_type", self.prediction_type, PREDICTION_TYPES)):
            if value is not None and value not in known:
                raise InvalidArgumentError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        if isinstance(self.lora, str | os.PathLike):
            raise InvalidArgumentError(f"lora must be a list of files, got {os.fspath(self.lora)!r}: put it in a list")
        if self.latents and self.decoder is not None and not self.with_encoder:
            raise InvalidArgumentError(
                "latents leaves the decoder out, but a decoder was given: give one of them (or with_encoder, which reads the decoder's folder too)"
            )
        if self.report is not None and not self.verify:
            raise InvalidArgumentError("a report describes the verification, but verify is False: give one of them")
        if self.verify:
            load_onnxruntime()  # fail before minutes of work, not after


# ----------------------------------------------------------------------------
# export()'s signature is derived from Options, so that an option is declared once.

P = ParamSpec("P")
Result_co = TypeVar("Result_co", covariant=True)


class _WithKeywords(Protocol[P, Result_co]):
    def __call__(self, checkpoint: StrPath | nn.Module, out: StrPath | None = None, *args: P.args, **options: P.kwargs) -> Result_co: ...


def options_as_keywords(
    options_type: Callable[P, Options],
) -> Callable[[Callable[[StrPath | nn.Module, StrPath | None, Options], Result_co]], _WithKeywords[P, Result_co]]:
    """Decorator for ``function(checkpoint, out, options)``: callers pass the fields of Options as keyword arguments, with their types and defaults.

    ``options_type`` is Options itself; as an argument, it gives type checkers the fields.
    """

    def decorate(function: Callable[[StrPath | nn.Module, StrPath | None, Options], Result_co]) -> _WithKeywords[P, Result_co]:
        @wraps(function)
        def with_keywords(checkpoint: StrPath | nn.Module, out: StrPath | None = None, *args: P.args, **options: P.kwargs) -> Result_co:
            try:
                given = options_type(*args, **options)
            except TypeError as error:  # an unknown keyword
                raise TypeError(str(error).replace("Options.__init__()", f"{function.__name__}()")) from None
            return function(checkpoint, out, given)

        checkpoint, out, _ = inspect.signature(function).parameters.values()
        fields = inspect.signature(options_type)
        signature = inspect.signature(function).replace(parameters=[checkpoint, out.replace(default=None), *fields.parameters.values()])
        with_keywords.__signature__ = signature  # type: ignore[attr-defined]  # for help() and editors
        return cast("_WithKeywords[P, Result_co]", with_keywords)

    return decorate
