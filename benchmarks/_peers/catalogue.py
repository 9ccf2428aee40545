"""The peers: alternatives for running the same weights, each with the best settings in its documentation.

If the best settings depend on the machine, a peer has several variants: all are tried briefly, and the fastest is measured.
"""

from __future__ import annotations

import subprocess
import sys
import venv
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from scm_runtime.ort.options import MATMUL_PRECISION

CONTENDER, STARTS_SLOWLY, NEVER_FASTEST = range(3)
ENVIRONMENTS = Path(__file__).parents[2] / "build" / "peers" / "environments"


@dataclass(frozen=True, kw_only=True)
class Peer:
    """One way to run a model."""

    name: str
    opener: str
    """``module:function``; the function takes (case, batch size, threads, device) and a variant's options, and returns a ``Draw``."""
    dtype: str
    """Dtype it computes in, which determines its tolerance relative to PyTorch in float32."""
    needs: str
    """Module that must be importable."""
    install: str
    """Arguments of the pip command that installs it."""
    distributions: tuple[str, ...]
    """The same as requirements. The install size is that of their files and of all their dependencies."""
    variants: tuple[dict[str, Any], ...] = ({},)
    families: tuple[str, ...] | None = None
    """Families of models it can run; None for all."""
    memory: float = 1.2
    """Approximate memory as a multiple of the float32 weights."""
    always: bool = True
    """Whether it runs by default."""
    place: int = CONTENDER
    """When it is measured: those that may be the fastest and start at once come first."""
    environment: dict[str, str] = field(default_factory=dict)
    own: str | None = None
    """Name of its own virtual environment in ``ENVIRONMENTS``, for packages that exclude those of the others."""

    @property
    def python(self) -> Path:
        """The interpreter that runs it."""
        return Path(sys.executable) if self.own is None else ENVIRONMENTS / self.own / "bin" / "python"

    @property
    def packages(self) -> Path | None:
        """The folder of its packages, if it has an environment of its own."""
        return None if self.own is None else next((ENVIRONMENTS / self.own).glob("lib/python*/site-packages"), None)

    def missing(self) -> str | None:
        """Return why it cannot run on this machine, or None."""
        if self.own is not None:
            return None if self.python.exists() else f"{self.install} is not installed: python benchmarks/peers.py --install"
        if find_spec(self.needs) is None:
            return f"{self.needs} is not installed: pip install {self.install}"
        return None


def install_own(peers: Iterable[Peer]) -> None:
    """Install peers with environments of their own, where they are missing. Raises subprocess.CalledProcessError if pip fails."""
    for peer in peers:
        if peer.own is None or peer.python.exists():
            continue
        folder = ENVIRONMENTS / peer.own
        part = folder.with_name(f".{folder.name}.part")  # a virtual environment may be moved, as long as only its interpreter is used
        venv.create(part, with_pip=True, clear=True)
        subprocess.run([part / "bin" / "python", "-m", "pip", "--disable-pip-version-check", "--quiet", "install", *peer.install.split()], check=True)
        part.rename(folder)


OURS = Peer(
    name="scm_runtime",
    opener="_peers.ours:open_generator",
    dtype="fp32",
    needs="scm_runtime",
    install="'.[cpu]'",
    distributions=("scm-runtime[cpu]",),
    variants=({"native_ops": True},),
)
# Spinning threads reduce the latency on some machines, and take cores from other threads on others.
PLAIN = Peer(
    name="ONNX Runtime, plain export",
    opener="_peers.plain:open_onnxruntime",
    dtype="fp32",
    needs="onnxruntime",
    install="onnxruntime",
    distributions=("onnxruntime", "numpy"),
    variants=({"spinning": False}, {"spinning": True}),
)
EAGER = Peer(
    name="PyTorch eager",
    opener="_peers.pytorch:open_eager",
    dtype="fp32",
    needs="torch",
    install="torch",
    distributions=("torch", "numpy"),
    variants=({"channels_last": False}, {"channels_last": True}),
    place=NEVER_FASTEST,
)
COMPILED = replace(EAGER, name="torch.compile", opener="_peers.pytorch:open_compiled", variants=({"freezing": True},), memory=2.8, place=STARTS_SLOWLY)
OPENVINO = Peer(
    name="OpenVINO f32",
    opener="_peers.plain:open_openvino",
    dtype="fp32",
    needs="openvino",
    install="openvino",
    distributions=("openvino",),
    variants=({"precision": "f32", "hint": "LATENCY"}, {"precision": "f32", "hint": "THROUGHPUT"}),
    memory=1.4,  # in addition to the memory-mapped file
)
# onnxruntime-openvino has the files of onnxruntime, and its version of ONNX Runtime is older.
PROVIDER = Peer(
    name="ONNX Runtime, OpenVINO f32",
    opener="_peers.plain:open_openvino_provider",
    dtype="fp32",
    needs="onnxruntime",
    install="onnxruntime-openvino numpy",
    distributions=("onnxruntime-openvino", "numpy"),
    variants=OPENVINO.variants,
    memory=OPENVINO.memory,
    own="onnxruntime-openvino",
)
DIFFUSERS = replace(
    EAGER,
    name="diffusers",
    opener="_peers.pipelines:open_pipeline",
    needs="diffusers",
    install="diffusers torch",
    distributions=("diffusers", "torch"),
    families=("sana-sprint", "consistency", "latent-consistency"),
)


def _in(dtype: str, peer: Peer, name: str, **changes: Any) -> Peer:
    """Return the peer with another dtype, which is also set in its variants."""
    variants = tuple({**variant, ("precision" if "precision" in variant else "dtype"): dtype} for variant in changes.pop("variants", peer.variants))
    return replace(peer, name=name, dtype=dtype, variants=variants, **changes)


CPU_PEERS = (
    OURS,
    replace(OURS, name="scm_runtime, function bodies", variants=({"native_ops": False},), place=NEVER_FASTEST),
    replace(OURS, name="scm_runtime bf16", dtype="bf16", variants=({"native_ops": True, "session_options": {MATMUL_PRECISION: "medium"}},)),
    PLAIN,
    EAGER,
    COMPILED,
    OPENVINO,
    _in("bf16", OPENVINO, "OpenVINO bf16"),
    PROVIDER,
    _in("bf16", PROVIDER, "ONNX Runtime, OpenVINO bf16"),
    DIFFUSERS,
    _in("bf16", EAGER, "PyTorch eager bf16", always=False),
    _in("bf16", COMPILED, "torch.compile bf16", always=False),
)

AUTOTUNED = ({"mode": "max-autotune", "channels_last": True},)
GPU_OURS = replace(OURS, dtype="fp16", install="'.[gpu]'", distributions=("scm-runtime[gpu]",))
GPU_PLAIN = replace(
    PLAIN,
    dtype="fp16",
    install="'onnxruntime-gpu[cuda,cudnn]' nvidia-cublas",
    distributions=("onnxruntime-gpu[cuda,cudnn]", "nvidia-cublas"),
    variants=({"prefer_nhwc": False}, {"prefer_nhwc": True}),
)
CUDA_PEERS = (
    GPU_OURS,
    replace(GPU_OURS, name="scm_runtime, no CUDA graph", variants=({"native_ops": True, "cuda_graph": False},)),
    replace(GPU_OURS, name="scm_runtime, function bodies", variants=({"native_ops": False},)),
    GPU_PLAIN,
    _in("fp16", EAGER, "PyTorch eager fp16"),
    _in("bf16", EAGER, "PyTorch eager bf16"),
    _in("fp16", COMPILED, "torch.compile fp16", variants=AUTOTUNED),
    _in("bf16", COMPILED, "torch.compile bf16", variants=AUTOTUNED),
    replace(
        GPU_PLAIN,
        name="TensorRT",
        needs="tensorrt",
        install="tensorrt 'onnxruntime-gpu[cuda,cudnn]' nvidia-cublas",
        distributions=("tensorrt", *GPU_PLAIN.distributions),
        variants=({"tensorrt": True},),
    ),
    _in("fp16", DIFFUSERS, "diffusers fp16"),
)

PEERS = {"cpu": {peer.name: peer for peer in CPU_PEERS}, "cuda": {peer.name: peer for peer in CUDA_PEERS}}
ANCHOR = "scm_runtime"  # every other peer is compared with it, round by round

# Largest allowed error (Case.error) by the dtype that a peer computes in. The weights are random; trained networks are less sensitive. A peer with a
# larger error has computed something else and is not timed.
LARGEST_ERROR = {"fp32": 2e-3, "fp16": 3e-2, "bf16": 1.5e-1}
