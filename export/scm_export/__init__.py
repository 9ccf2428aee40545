"""Turn trained consistency models into bundles that scm_runtime samples."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from scm_export.exporter import Exported, export, plan
    from scm_export.options import Options

__all__ = ["Exported", "Options", "export", "plan"]


def __getattr__(name: str) -> object:
    # Importing torch takes seconds and fails if it is missing; `scm-export --help` must not depend on it.
    if name in __all__:
        from scm_export import exporter

        return getattr(exporter, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
