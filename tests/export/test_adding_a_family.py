"""Runs the code blocks of docs/adding-a-family.md: the family's file, its line in the dict, and its test."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from scm_export import families
from support import ROOT

BLOCKS = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs" / "adding-a-family.md").read_text("utf-8"), re.DOTALL | re.MULTILINE)


def test_the_family_of_the_document_is_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, line, test = BLOCKS
    assert file.startswith("# export/scm_export/families/ddpm.py\n")
    module = ModuleType("scm_export.families.ddpm")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(file, "docs/adding-a-family.md", "exec"), module.__dict__)
    monkeypatch.setattr(families, "FAMILIES", dict(families.FAMILIES))
    monkeypatch.setattr("scm_export.preparation.FAMILIES", families.FAMILIES)
    exec(line, {"FAMILIES": families.FAMILIES, "ddpm": module})
    namespace: dict[str, Any] = {}
    exec(test, namespace)
    namespace["test_ddpm"](tmp_path)
