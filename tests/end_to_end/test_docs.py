"""Every Python block of the guides runs, each page from top to bottom as one program, on the CPU."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from support import ROOT, run_python

PAGES = sorted(path for path in (ROOT / "docs").glob("*.md") if path.name in ("embedding.md", "troubleshooting.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_python_blocks_of_a_page(page: Path, tmp_path: Path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    assert blocks, "the page has none"
    # "# error: Name" on a line of its own says that the block ends with that error.
    program = []
    for block in blocks:
        if error := re.search(r"^# error: (\w+)$", block, re.MULTILINE):
            indented = "".join(f"    {line}" for line in block.splitlines(keepends=True))
            program.append(f"try:\n{indented}\nexcept {error[1]}:\n    pass\nelse:\n    raise AssertionError('no {error[1]}')")
        else:
            program.append(block)
    run_python("\n".join(program), cwd=tmp_path)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_tests_that_a_page_names_exist(page: Path) -> None:
    names = set(re.findall(r"`(?:tests/\w+/)?(test_\w+\.py)`", page.read_text()))
    assert names
    there = {path.name for path in (ROOT / "tests").rglob("test_*.py")}
    assert names <= there, names - there
