"""Bundles on disk: the manifest, checksums, the location of a bundle, and the tables of a diffusion model's solvers."""

from scm_runtime.bundle.manifest import Manifest, read_manifest

__all__ = ["Manifest", "read_manifest"]
