"""What a Generator runs, and on what."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GeneratorInfo:
    """What a Generator runs, and on what."""

    bundle: str
    """Its name in the manifest."""
    dtype: str
    """Of the graphs: "fp32", "fp16" or "bf16"."""
    device: str
    """"cpu", "cuda:0", …; with ``providers=`` the first one's short name."""
    device_reason: str
    """Why this one."""
    provider: str
    """ONNX Runtime's name of what runs the step graph: "CPUExecutionProvider"."""
    onnxruntime: str
    """Its version."""
    native_ops: bool
    """Whether the library's kernels run; else the function bodies in the graphs do."""
    native_ops_version: str | None
    """Of the library, where its kernels run."""
    native_ops_reason: str | None
    """Why they do not run, and what would mend it."""
    cuda_graph: bool = False
    """Whether the step graph's runs are captured, one batch size at a time."""
