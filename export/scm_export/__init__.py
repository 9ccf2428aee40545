"""Turn trained consistency models into bundles that scm_runtime samples."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from scm_export.exporter import Exported, Options, export, plan

__all__ = ["Exported", "Options", "export", "plan"]


def __getattr__(name: str) -> object:
    # torch takes seconds to import, and may be missing: neither is the business of `scm-export --help`.
    if name in __all__:
        from scm_export import exporter

        return getattr(exporter, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
