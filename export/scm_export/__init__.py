"""Turn trained consistency models into bundles that scm_runtime samples."""

from scm_export.export import Exported, export

__all__ = ["Exported", "export"]
