"""What a graph is opened with on CUDA: which kernels compute its convolutions, and options of ONNX Runtime's provider, by what it holds and its dtype.

docs/architecture.md has what ONNX Runtime makes of the graphs of each family.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from scm_runtime.bundle.manifest import CHANNELS_LAST_DOMAIN, FUSED_DOMAIN
from scm_runtime.common.files import open_regular
from scm_runtime.ort.options import CONVOLUTION, Convolution, SessionSettings, check_convolution

HALF = ("fp16", "bf16")

# Domains of operators over channels-last maps. An exporter that writes the second one gives every size in its graphs as a constant.
DOMAINS = CHANNELS_LAST, FUSED = CHANNELS_LAST_DOMAIN.encode(), FUSED_DOMAIN.encode()

CHUNK = 1 << 20  # bytes of a graph that are searched at once


class GraphOptions(NamedTuple):
    """One way to open a graph."""

    convolution: Convolution
    provider_options: Mapping[str, str]
    """Options of the CUDA provider; the user's override them."""


def ways_to_open(path: Path, settings: SessionSettings) -> tuple[GraphOptions, ...]:
    """Return the ways to open a graph, the fastest first. The last one suits every graph.

    Args:
        path: the ``.onnx`` file, named ``NAME.DTYPE.onnx`` or ``NAME.onnx``.
        settings: settings of the session, with the user's choices.
    """
    dtype = path.name.split(".")[1]
    domains = _domains(path) if dtype in HALF else set()
    # Without TF32, ONNX Runtime 1.31 bars cuDNN from all tensor cores, those for float16 included. In fp32, which is the reference for the other dtypes and
    # in which overflowing samples are repeated, that is wanted.
    options = {"use_tf32": str(int(dtype in HALF))}
    # Channels last for cuDNN's convolutions and pools. It has no bfloat16 kernels, and sizes that a graph computes would be copied between the devices.
    # Diffusers' networks normalize groups of channels, around which it would add more transposes than it saves.
    layouts = [{"prefer_nhwc": "1"}] if dtype == "fp16" and FUSED in domains else []
    return tuple(GraphOptions(convolution, {**options, **layout}) for convolution in _convolutions(domains, settings) for layout in (*layouts, {}))


def _convolutions(domains: set[bytes], settings: SessionSettings) -> tuple[Convolution, ...]:
    """Return the choices for a graph in which the library has the operators of ``domains``; the user's "own" does not concern other graphs."""
    chosen = settings.session_options.get(CONVOLUTION)
    if chosen is not None:
        check_convolution(chosen)
    if settings.library is None or not domains or chosen == "cudnn":
        return ("cudnn",)
    return ("own",) if chosen == "own" else ("own", "cudnn")


def _domains(path: Path) -> set[bytes]:
    """Return which of the two domains a file mentions. A file that cannot be read mentions none; ``open_session`` reports it.

    The file is not mapped into memory: the process would end if another one truncated it meanwhile.
    """
    found, end = set[bytes](), b""
    with suppress(OSError), open_regular(path) as file:
        while len(found) < len(DOMAINS) and (chunk := file.read(CHUNK)):
            contents = end + chunk
            found.update(domain for domain in DOMAINS if domain in contents)
            end = contents[1 - max(map(len, DOMAINS)) :]  # a name may begin in one chunk and end in the next
    return found
