"""The family ``module``: a user-defined network from a factory, an exported program, TorchScript or a pickled module."""

from __future__ import annotations

import difflib
import logging
import math
from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any

import torch
from msgspec import Struct
from torch import Tensor, nn

from scm_export.checkpoints import Checkpoint, Loaded, Program, SamplerSpec
from scm_export.checkpoints.header import MAX_ELEMENTS, PositiveInteger, convert
from scm_export.checkpoints.operator_graph import OperatorGraph
from scm_export.checkpoints.state_dict import uncompiled
from scm_export.dynamic_splits import DynamicSplits
from scm_export.errors import CheckpointError, ExportError
from scm_export.example_inputs import example_conditioning
from scm_export.families.autoencoders import ImageNetworks, LatentStatistics, image_networks, pixel_networks
from scm_export.families.diffusers_networks import make_batch_dynamic
from scm_export.families.family import BuildOptions, Family
from scm_export.families.parametrisation_check import suspicion
from scm_export.families.sampling import sampling_fields
from scm_export.families.weights import load_weights
from scm_export.graphs.trace import TRACE_BATCH
from scm_export.model import Model, Reference
from scm_export.parametrisation import Step, sample
from scm_export.precision import Precision, is_norm
from scm_runtime.bundle.manifest import Conditioning
from scm_runtime.common.message_text import first_line, printable

logger = logging.getLogger("scm_export")

PIXEL_CHANNELS = (1, 3, 4)
TRUSTED = "the parametrization {!r} is taken from the config or --parametrisation on trust: the verification applies it to the original network as well"
MAX_AXES = 8
MAX_TESTED = 200_000_000  # parameters of a network whose parametrization is tested: the evaluations of larger ones take minutes


class ModuleConfig(Struct, kw_only=True, forbid_unknown_fields=True):
    """The section ``[config]`` of the family."""

    sample_shape: tuple[PositiveInteger, ...]
    """Shape of the state of one sample, [C, H, W] for images and their latents."""
    keep_fp32: tuple[str, ...] = ()
    """Names of modules that compute in float32 in every graph, with "*" as a wildcard: the time embedding, custom norms."""
    arguments: dict[str, Any] = {}
    """Keyword arguments of the factory."""


def recognizes_module(loaded: Loaded) -> bool:
    return isinstance(loaded, Program) or (isinstance(loaded, Checkpoint) and loaded.family == "module")


def build_module(loaded: Loaded, options: BuildOptions) -> Model:
    """Build the Model of a network that takes ``(x, level, **conditioning)``.

    The network returns a tensor with the shape of x, or a container whose first element is one.

    Raises:
        CheckpointError: the network is missing, does not accept the inputs in the config, or its weights do not fit it.
    """
    if not isinstance(loaded, Program):
        raise CheckpointError(
            f"the family module needs the network itself, {loaded.describe()} has only weights: give --factory package.module:function, which returns it"
        )
    header, sampler = loaded.header, loaded.header.sampler
    try:
        config = convert(header.config, ModuleConfig)
        if not 1 <= len(config.sample_shape) <= MAX_AXES or math.prod(config.sample_shape) > MAX_ELEMENTS:
            raise ValueError(f"sample_shape must have 1 to {MAX_AXES} axes and at most {MAX_ELEMENTS} elements, got {list(config.sample_shape)!s:.200}")
        conditioning = tuple(item.conditioning() for item in header.conditioning)
        if header.label_names is not None:
            conditioning = _with_label_names(conditioning, header.label_names)
    except ValueError as error:
        raise CheckpointError(f"config of the family module: {first_line(error)} (docs/checkpoint-format.md)") from error
    if options.size is not None:
        raise CheckpointError("a network of the family module has the sample_shape of its config: leave out the size")
    _check_inputs(loaded, conditioning)
    network = loaded.network.eval().requires_grad_(False)
    if any(type(module).__module__.startswith("diffusers.") for module in network.modules()):
        make_batch_dynamic(network)
    if loaded.weights is not None:
        try:
            load_weights(network, loaded.weights)
        except CheckpointError as error:
            raise CheckpointError(f"{loaded.describe()}: {error}") from error
    else:
        _check_weights(network, loaded.describe())
    images = _images(config.sample_shape, sampler, options)
    kept = _modules_in_fp32(network, config.keep_fp32)
    own = FirstOutput(Precision(network, _keeps_fp32(kept), promote_dtypes=True, fp32_parameters=_weights_in(network, kept)))
    model = Model(
        family="module",
        step=Step(own, sampler.sigma_data, sampler.parametrisation, sampler.solver),
        sample_shape=config.sample_shape,
        **sampling_fields(sampler),
        conditioning=conditioning,
        decoder=images.decoder,
        encoder=images.encoder,
        preview=images.preview,
        licence=header.licence,
    )
    _check_call(own, model, loaded)
    if options.test_parametrisation and sum(p.numel() for p in network.parameters()) <= MAX_TESTED and (doubt := suspicion(model)) is not None:
        logger.warning("%s", doubt)
    model.notes = (TRUSTED.format(sampler.parametrisation),)
    if loaded.original is not None:
        step = Step(FirstOutput(loaded.original), sampler.sigma_data, sampler.parametrisation, sampler.solver)
        model.reference = Reference(
            f"the program itself in PyTorch {torch.__version__}",
            lambda noises, times, conditioning: sample(step, noises, times, model.initial_scale, conditioning),
        )
    return model


class FirstOutput(nn.Module):
    """Returns the first element of a network's output, which may be a tuple or a diffusers output."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, level: Tensor, **conditioning: Tensor) -> Tensor:
        # The network is traced without torch.compile, which could not compile PromoteDtypes.
        with torch.compiler.set_stance("force_eager"), DynamicSplits():
            output: Any = self.network(x, level, **conditioning)
        while not isinstance(output, Tensor):
            if isinstance(output, dict) and output:
                output = next(iter(output.values()))
            elif isinstance(output, tuple | list) and output:
                output = output[0]
            else:
                raise TypeError(f"it must return a tensor, got {type(output).__name__}")
        return output.float()


def _with_label_names(conditioning: tuple[Conditioning, ...], names: tuple[str, ...]) -> tuple[Conditioning, ...]:
    """Assign the header's label_names to the only input of kind "class". Raises ValueError if there is not exactly one."""
    classes = [item for item in conditioning if item.kind == "class"]
    if len(classes) != 1:
        raise ValueError(f"label_names need one conditioning of kind 'class', got {len(classes)}; give each its own label_names")
    classes[0].label_names = names
    classes[0].validate()
    return conditioning


def _check_inputs(loaded: Program, conditioning: tuple[Conditioning, ...]) -> None:
    if loaded.inputs is None:
        return
    named, given = list(loaded.inputs[2:]), [item.name for item in conditioning]
    if len(loaded.inputs) < 2 or sorted(named) != sorted(given):
        raise CheckpointError(
            f"{loaded.describe()} takes {', '.join(loaded.inputs)}: the state, its level, and then exactly the [[conditioning]] of the config, "
            f"got {', '.join(given) or 'none'}"
        )


def _check_weights(network: nn.Module, what: str) -> None:
    names = network.original_names if isinstance(network, OperatorGraph) else {}
    broken = [names.get(name, name) for name, tensor in network.state_dict().items() if tensor.is_floating_point() and not torch.isfinite(tensor).all()]
    if broken:
        raise CheckpointError(f"{what}: weights must be finite, got NaN or infinity in {', '.join(broken[:3])}")
    network.float()


def _modules_in_fp32(network: nn.Module, keep_fp32: tuple[str, ...]) -> set[str]:
    """Names of the modules that match the patterns in keep_fp32. Raises CheckpointError for a pattern without a match."""
    names = _module_names(network)
    kept = {name for name in names if any(fnmatchcase(name, pattern) for pattern in keep_fp32)}
    for pattern in keep_fp32:
        if not any(fnmatchcase(name, pattern) for name in names):
            close = difflib.get_close_matches(pattern, names, n=1)
            meant = f"; did you mean {close[0]!r}?" if close else ""
            raise CheckpointError(f"config.keep_fp32 must name modules of the network, got '{printable(pattern)}'{meant}")
    return kept


def _module_names(network: nn.Module) -> list[str]:
    """Dotted names of a network's modules. A program has no modules: theirs are derived from the names of its tensors in the file."""
    if isinstance(network, OperatorGraph):
        paths = [name.split(".")[:-1] for name in network.original_names.values()]
        return list(dict.fromkeys(".".join(path[:depth]) for path in paths for depth in range(1, len(path) + 1)))
    return [uncompiled(name) for name, _ in network.named_modules() if uncompiled(name)]


def _weights_in(network: nn.Module, kept: set[str]) -> set[str]:
    """Names of a program's tensors that belong to these modules; empty for other networks."""
    if not isinstance(network, OperatorGraph):
        return set()
    return {own for own, original in network.original_names.items() if any(original.startswith(f"{name}.") for name in kept)}


def _keeps_fp32(kept: set[str]) -> Callable[[str, nn.Module], bool]:
    """Return the predicate for Precision: norms and the named modules compute in float32; submodules of a named module follow it."""

    def inside(name: str) -> bool:
        return any(name.startswith(f"{outer}.") for outer in kept)

    return lambda name, module: not inside(uncompiled(name)) and (uncompiled(name) in kept or is_norm(name, module))


def _images(sample_shape: tuple[int, ...], sampler: SamplerSpec, options: BuildOptions) -> ImageNetworks:
    """Create the image networks. The state is latents if the config has latent statistics, a decoder is given, or it does not have 1, 3 or 4 channels."""
    pixels, mean, std = (sampler.pixel_scale, sampler.pixel_offset), sampler.latent_mean, sampler.latent_std
    if (mean is None) != (std is None):
        raise CheckpointError("sampler.latent_mean and sampler.latent_std must be given together, got one of them")
    statistics = None if mean is None or std is None else LatentStatistics(mean, std)
    if len(sample_shape) == 3 and statistics is None and options.decoder is None and (sample_shape[0] in PIXEL_CHANNELS or options.latents):
        return pixel_networks(options, sample_shape, pixels)
    return image_networks(options, sample_shape, sampler.sigma_data, statistics=statistics, pixels=pixels)


def _check_call(network: nn.Module, model: Model, loaded: Program) -> None:
    """Call the network with two batch sizes. Raises CheckpointError with the network's own message if a call fails.

    The calls are real ones in float32, before tracing, so that a table that the network caches at its first call holds real tensors.
    """
    for n in (TRACE_BATCH, TRACE_BATCH + 1):
        x, level = torch.zeros(n, *model.sample_shape), torch.full((n,), 0.5)
        conditioning = {item.name: example_conditioning(item, n) for item in model.conditioning}
        try:
            with torch.no_grad():
                output = network(x, level, **conditioning)
        except CheckpointError as error:
            raise CheckpointError(f"{loaded.describe()} was not run: {error}") from error
        except ExportError:
            raise
        except Exception as error:
            asked = ", ".join(["x", "level", *(f"{item.name}=" for item in model.conditioning)])
            raise CheckpointError(
                f"{loaded.describe()} cannot be called as network({asked}) with x of {[n, *model.sample_shape]}: {type(error).__name__}: {first_line(error)}"
            ) from error
        if output.shape != x.shape:
            raise CheckpointError(f"{loaded.describe()} must return a tensor with the shape of x, {list(x.shape)}, got {list(output.shape)}")


FAMILY = Family(
    looks_for="a user-defined network: --factory package.module:function, a .pt2, or TorchScript; described by --config FILE.toml",
    recognizes=recognizes_module,
    build=build_module,
)
