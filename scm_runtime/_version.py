"""The version, in its one place: packaging, manifests and the CLIs read it here."""

__version__ = "0.1.0"
