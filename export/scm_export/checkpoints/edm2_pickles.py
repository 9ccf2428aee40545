"""Converts a pickle of NVIDIA's EDM2 or of edm2_sCM to a Checkpoint of the family edm2: the network's class, its configuration and its sampler.

A class is identified by its name. If the author of a file changed a class without renaming it, the file is exported as the original class.
"""

from __future__ import annotations

import difflib
import math
import os
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from scm_export.checkpoints.header import SamplerSpec
from scm_export.checkpoints.persistent_objects import PersistentObject, pickle_errors, read_persistent
from scm_export.checkpoints.reading import reading
from scm_export.checkpoints.scm_checkpoint import Checkpoint
from scm_export.checkpoints.stored_tensors import as_floats
from scm_export.errors import CheckpointError
from scm_export.parametrisation import default_times
from scm_export.samplers import RHO, SIGMA_MAX, SIGMA_MIN, angles, karras_sigmas, teacher_times
from scm_runtime.common.message_text import first_line, printable

# Names of the known classes, and the arguments of their constructors in order.
NETWORKS = ("Precond", "TrigFlowPrecond")
UNETS = ("UNet", "TrigFlowUNet")
LAYERS = ("Block", "MPConv", "MPFourier", "PositionalEmbedding", "ModuleDict", "Linear")
ENCODERS = ("StandardRGBEncoder", "StabilityVAEEncoder")
NETWORK_ARGUMENTS = ("img_resolution", "img_channels", "label_dim", "use_fp16", "sigma_data", "logvar_channels")
UNET_ARGUMENTS = (
    *("img_resolution", "img_channels", "label_dim", "model_channels", "channel_mult", "channel_mult_noise", "channel_mult_emb"),
    *("num_blocks", "attn_resolutions", "label_balance", "concat_balance", "segment_conditioning"),
)
BLOCK_ARGUMENTS = ("channels_per_head", "res_balance", "attn_balance", "clip_act", "resample_filter")
WITHOUT_EFFECT = ("use_fp16", "logvar_channels", "dropout", "dout_resolutions", "segment_conditioning")  # on samples, or visible in the weights

# Layers with which the network estimates its own loss in training.
UNCERTAINTY_PREFIXES = ("logvar_fourier.", "logvar_pos.", "logvar_linear.")

# EDM2's statistics for latents of sd-vae-ft-mse, the defaults of its encoder. EDM2 feeds the autoencoder images in [0, 1], although it was trained on [-1, 1].
LATENT_MEAN: tuple[float, ...] = (5.81, 3.25, 0.12, -2.15)
LATENT_STD: tuple[float, ...] = (4.17, 4.62, 3.71, 3.28)
# EDM2 truncates 255 times the decoded image to an integer. Here levels are rounded, so the offset is nearly -0.5; 255 itself must stay 255.
PIXELS_FROM_ZERO_TO_ONE = {"pixel_scale": 255.0, "pixel_offset": -0.499}

SIGMAS = (1e-6, 1e6)  # allowed range of noise levels
SEGMENTS = (1, 2, 4)  # numbers of segments to offer if the file does not specify it


def load_edm2_pickle(path: str | os.PathLike[str], network: str | None = None) -> Checkpoint:
    """Read the network in an EDM2-style pickle as a checkpoint. No code from the file is run.

    Args:
        path: a snapshot, a post-hoc EMA, or a pickled network.
        network: name of the network if the file holds several; the error without it lists the names.

    Raises:
        CheckpointError: the file is damaged or needs more than data; or it holds no network, several, or one of an unknown class or architecture.
    """
    with reading(Path(path)):
        return read_edm2_pickle(Path(path), network)[0]


def read_edm2_pickle(source: Path, network: str | None = None) -> tuple[Checkpoint, str | None]:
    """Like :func:`load_edm2_pickle`, but also return the name of the selected network; None if the file is the network itself."""
    content = read_persistent(source)
    with pickle_errors(source):  # the tensors are read here
        return _checkpoint(content, network, f"'{source}'")


def is_plain_pickle(start: bytes) -> bool:
    """Return True if a file with these first 16 bytes is a pickle of protocol 2 or later, but not from torch.save, which starts with a magic number."""
    return start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05") and not start.startswith(b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.")


def _checkpoint(content: object, network: str | None, where: str) -> tuple[Checkpoint, str | None]:
    """Convert the result of :func:`~scm_export.checkpoints.persistent_objects.read_persistent`; ``where`` is the start of error messages."""
    snapshot = _snapshot(content)
    name, found = _choose(dict(_networks(snapshot.get("ema", content), "ema")), network, where)
    _check_classes(found, where)
    config, sigma_data = _config(found, where)
    stored = {name.removeprefix("unet."): tensor for name, tensor in found.named_tensors().items() if not name.startswith(UNCERTAINTY_PREFIXES)}
    config |= {
        "time_embedding": "fourier" if "emb_fourier.freqs" in stored else "positional",
        "modulation": "scale" if any(name.endswith(".emb_gain") for name in stored) else "scale-shift",
        "segment_embedding": "emb_t_k.weight" in stored,
    }
    sampler = SamplerSpec(
        **_sampling(found.class_name, snapshot.get("loss_fn"), sigma_data, segments=config["segment_embedding"]),
        **_pixels(snapshot.get("encoder"), config["img_channels"], sigma_data, where),
    )
    try:
        sampler.validate()
    except ValueError as error:
        raise CheckpointError(f"{where}: the loss does not describe how to sample: {first_line(error)}") from error
    checkpoint = Checkpoint(family="edm2", config=config, sampler=sampler, weights={key: tensor.load() for key, tensor in stored.items()})
    return checkpoint, None if isinstance(content, PersistentObject) else name


# ----------------------------------------------------------------------------
# Finding the network in the file.


def _snapshot(content: object) -> dict[Any, Any]:
    """Return the dict with the key "ema", at any depth; an empty dict if there is none."""
    return next((value for _, value in _walk(content, "") if isinstance(value, dict) and "ema" in value), {})


def _networks(content: object, name: str) -> Iterator[tuple[str, PersistentObject]]:
    for path, value in _walk(content, name):
        if isinstance(value, PersistentObject):
            yield path, value


def _walk(content: object, name: str) -> Iterator[tuple[str, object]]:
    """Yield every object in nested containers once, outermost first, with its dotted path."""
    waiting, seen = deque([(name, content)]), set[int]()
    while waiting:
        path, value = waiting.popleft()
        if id(value) in seen:
            continue
        seen.add(id(value))
        yield path, value
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
        waiting.extend(
            (f"{path[:200]}.{printable(key)[:100]}".lstrip("."), item) for key, item in items if isinstance(item, dict | list | tuple | PersistentObject)
        )


def _choose(networks: dict[str, PersistentObject], name: str | None, where: str) -> tuple[str, PersistentObject]:
    if not networks:
        raise CheckpointError(f"{where} holds no network: a snapshot of EDM2 is a dict with one under 'ema'")
    if name is None and len(networks) == 1:
        return next(iter(networks.items()))
    if name in networks:
        return name, networks[name]
    raise CheckpointError(
        f"{where} holds {len(networks)} networks: {', '.join(networks)}; got {name!r}. "
        "Choose one with --weights NAME; for a guide, use load_edm2_pickle(path, network=NAME) and save_checkpoint, both in scm_export.checkpoints."
    )


# ----------------------------------------------------------------------------
# The network's class and configuration.


def _check_classes(network: PersistentObject, where: str) -> None:
    """Check that every module is of a class that the family's network has there. Raises CheckpointError."""
    for name, module in network.named_modules():
        known = NETWORKS if not name else UNETS if name == "unet" else LAYERS
        _check_class(module, known, f"{where}: {name or 'the network'}")
    if "unet" not in network.modules:
        raise CheckpointError(f"{where}: a {network.class_name} must have a submodule 'unet', got {', '.join(network.modules) or 'none'}")


def _check_class(saved: PersistentObject, known: Sequence[str], what: str) -> None:
    if saved.class_name not in known:
        closest = difflib.get_close_matches(saved.class_name, known, n=1, cutoff=0)[0]
        raise CheckpointError(f"{what} is of the unknown class {saved.class_name[:100]!r}. The closest known one is {closest!r}; known are {', '.join(known)}.")


def _config(network: PersistentObject, where: str) -> tuple[dict[str, Any], float]:
    """Return the fields of UNetConfig from the file, and sigma_data. Attributes override the constructor's arguments."""
    unet = network.modules["unet"]
    arguments = {
        **_bound(network, NETWORK_ARGUMENTS, where),
        **_bound(unet, UNET_ARGUMENTS, where),
        **{name: network.attributes[name] for name in NETWORK_ARGUMENTS if name in network.attributes},
        **{name: unet.attributes[name] for name in UNET_ARGUMENTS if name in unet.attributes},
        **_block_attributes(unet, where),
    }
    if unknown := sorted(set(arguments) - {*NETWORK_ARGUMENTS, *UNET_ARGUMENTS, *BLOCK_ARGUMENTS, *WITHOUT_EFFECT}):
        raise CheckpointError(
            f"{where}: the {network.class_name} was built with {', '.join(unknown[:8])}, which the known class {network.class_name} does not have"
        )
    if missing := [name for name in ("img_resolution", "img_channels", "label_dim") if name not in arguments]:
        raise CheckpointError(f"{where}: the {network.class_name} must have {', '.join(missing)} among its arguments or attributes, got none")
    arguments = {name: _plain(value, f"{where}: {name}") for name, value in arguments.items()}
    if arguments.pop("resample_filter", (1, 1)) != (1, 1):
        raise CheckpointError(f"{where}: resample_filter must be [1, 1]; other filters are not supported")
    _check_heads(unet, arguments.get("channels_per_head", 64), where)
    if arguments.get("clip_act", 0) is None:
        arguments["clip_act"] = math.inf
    sigma_data = arguments.pop("sigma_data", 0.5)
    if not isinstance(sigma_data, int | float) or not 1e-6 < sigma_data < 1e6:
        raise CheckpointError(f"{where}: sigma_data must be above 0 and finite, got {sigma_data!r:.100}")
    return {name: value for name, value in arguments.items() if name not in WITHOUT_EFFECT}, float(sigma_data)


def _bound(saved: PersistentObject, names: Sequence[str], where: str) -> dict[str, Any]:
    """Constructor arguments by name."""
    if len(saved.args) > len(names):
        raise CheckpointError(f"{where}: a {saved.class_name} takes at most {len(names)} arguments by position, got {len(saved.args)}")
    return {**dict(zip(names, saved.args, strict=False)), **{printable(name): value for name, value in saved.kwargs.items()}}


def _check_heads(unet: PersistentObject, channels_per_head: object, where: str) -> None:
    """Check the numbers of attention heads, the only part of the architecture that no tensor shape shows. Raises CheckpointError."""
    for name, module in unet.named_modules():
        heads, channels = (module.attributes.get(key) for key in ("num_heads", "out_channels"))
        if heads and isinstance(channels, int) and isinstance(channels_per_head, int) and heads != channels // max(channels_per_head, 1):
            raise CheckpointError(
                f"{where}: unet.{name} has {heads!r:.20} heads for {channels} channels, which does not match channels_per_head = {channels_per_head}"
            )


def _plain(value: object, what: str) -> object:
    """Check a constructor argument and return it: a single value, or a short tuple of numbers."""
    if value is None or isinstance(value, int | float | str):
        return value
    if isinstance(value, list | tuple) and len(value) <= 64 and all(isinstance(number, int | float) for number in value):
        return tuple(value)
    raise CheckpointError(f"{what} must be a number, text or a short list of numbers, got {type(value).__name__}")


def _block_attributes(unet: PersistentObject, where: str) -> dict[str, Any]:
    """Attributes of the blocks, which must be the same in all blocks."""
    blocks = {name: module.attributes for name, module in unet.named_modules() if module.class_name == "Block"}
    common: dict[str, Any] = {}
    for name, attributes in blocks.items():
        for key in BLOCK_ARGUMENTS:
            if key in attributes and common.setdefault(key, _plain(attributes[key], name)) != _plain(attributes[key], name):
                raise CheckpointError(f"{where}: all blocks must have the same {key}, got a different one in {name}")
    return common


# ----------------------------------------------------------------------------
# The sampler.


def _sampling(class_name: str, loss: object, sigma_data: float, *, segments: bool) -> dict[str, Any]:
    """Fields of SamplerSpec for parametrisation, solver and times.

    The loss shows how the network was trained. If the file has none, an EDM network counts as a diffusion model and a TrigFlow network as a
    consistency model.
    """
    trained_with = loss.class_name if isinstance(loss, PersistentObject) else ""
    loss_attributes = loss.attributes if isinstance(loss, PersistentObject) else {}
    sigma_max = _number(loss_attributes, "sigma_max", SIGMA_MAX, *SIGMAS)
    start = math.atan(sigma_max / sigma_data)
    solver, diffusion = "ddim", False
    if segments:
        count, schedule = _number(loss_attributes, "num_segments", 0, 0, 64), loss_attributes.get("boundary_schedule", "uniform_t")
        times = {n: segment_times(start, n, schedule) for n in ([int(count)] if count >= 1 else SEGMENTS)}
    elif trained_with == "EDMConsistencyDistillLoss":
        middle_sigmas, steps = as_floats(loss_attributes.get("student_sigma_mids")), int(min(max(_number(loss_attributes, "S", 8, 1, 1e6), 2), 64))
        sigma_min, rho = _number(loss_attributes, "sigma_min", SIGMA_MIN, *SIGMAS), _number(loss_attributes, "rho", RHO, 0.1, 100)
        sigmas = (sigma_max, *middle_sigmas, 0.0) if middle_sigmas else karras_sigmas(steps, sigma_min, sigma_max, rho)
        times = {len(sigmas) - 1: angles(sigmas, sigma_data)}
    elif class_name == "Precond" or trained_with == "TrigFlowLoss":
        times, diffusion = teacher_times(sigma_data), True
    else:
        solver, times = "consistency", default_times(sigma_data)
    return {
        "parametrisation": "edm" if class_name == "Precond" else "trigflow",
        "solver": solver,
        "diffusion": diffusion,
        "sigma_data": sigma_data,
        "initial_scale": sigma_data * math.sin(start),  # = sigma_max cos(start), EDM's noise at its largest
        "times": {str(count): values for count, values in times.items()},
    }


def segment_times(start: float, segments: int, schedule: str = "uniform_t") -> tuple[float, ...]:
    """Boundaries of edm2_sCM's segments in radians, from ``start`` down to 0: evenly spaced in t, or in the logarithm of tan t."""
    shares = [1 - k / segments for k in range(segments)]
    if schedule == "uniform_log_snr":
        low, high = math.log(math.tan(1e-6)), math.log(math.tan(start))
        return (start, *(math.atan(math.exp(low + share * (high - low))) for share in shares[1:]), 0.0)
    return (*(start * share for share in shares), 0.0)


def _number(attributes: dict[str, Any], name: str, default: float, least: float, most: float) -> float:
    """Return a numeric attribute of the loss, or the default if it is missing. Raises CheckpointError if it is out of range."""
    value = attributes.get(name)
    if value is None:
        return default
    if not isinstance(value, int | float) or not least <= value <= most:
        raise CheckpointError(f"the loss's {name} must be a number from {least:g} to {most:g}, got {value!r:.100}")
    return float(value)


def _pixels(encoder: object, channels: object, sigma_data: float, where: str) -> dict[str, Any]:
    """Fields of SamplerSpec for the conversion of the state to pixels."""
    if isinstance(encoder, PersistentObject):
        _check_class(encoder, ENCODERS, f"{where}: the encoder")
    if (channels != 4) if not isinstance(encoder, PersistentObject) else encoder.class_name == "StandardRGBEncoder":
        return {}
    mean, std = LATENT_MEAN, LATENT_STD
    if isinstance(encoder, PersistentObject):  # x = z * scale + bias
        scale, bias = as_floats(encoder.attributes.get("scale")), as_floats(encoder.attributes.get("bias"))
        if not scale or not bias or not len(scale) == len(bias) == channels or not all(scale):
            raise CheckpointError(f"{where}: the encoder must have a scale other than 0 and a bias for each of the {channels} channels of its latents")
        mean, std = tuple(-b / s for b, s in zip(bias, scale, strict=True)), tuple(sigma_data / s for s in scale)
    return {"latent_mean": mean, "latent_std": std, **PIXELS_FROM_ZERO_TO_ONE}
