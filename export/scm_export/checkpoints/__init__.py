"""Readers: one a file format, each from a file to tensors and metadata, none of which runs code from the file."""

from scm_export.checkpoints.native import Checkpoint, SamplerSpec, load_checkpoint, save_checkpoint

__all__ = ["Checkpoint", "SamplerSpec", "load_checkpoint", "save_checkpoint"]
