"""Turn trained consistency models into bundles that scm_runtime samples."""

from contextlib import suppress

with suppress(ImportError):  # torch or onnx is missing: the command line says how to get them, and importing `export` itself fails
    from scm_export.export import Exported, export

__all__ = ["Exported", "export"]
