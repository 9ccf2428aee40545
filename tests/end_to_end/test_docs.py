"""The documentation works: its Python blocks and commands run, its links and anchors exist, and the index names every page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from scm_export.cli import main as scm_export
from scm_runtime.cli import main as scm_runtime
from support import ROOT, run_python

README, DOCS = ROOT / "README.md", ROOT / "docs"
PROGRAMS = (README, DOCS / "embedding.md", DOCS / "troubleshooting.md")
PAGES = sorted([README, ROOT / "CONTRIBUTING.md", *DOCS.glob("*.md"), *(ROOT / "examples").rglob("*.md"), *(ROOT / "benchmarks").glob("*.md")])
PYTHON_BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", PROGRAMS, ids=name_of)
def test_the_python_blocks_of_a_page(page: Path, tmp_path: Path) -> None:
    """The blocks run on the CPU, each page from top to bottom as one program."""
    blocks = PYTHON_BLOCK.findall(page.read_text())
    assert blocks, "the page has none"
    # A line "# error: Name" in a block means that the block ends with that error.
    program = []
    for block in blocks:
        if error := re.search(r"^# error: (\w+)$", block, re.MULTILINE):
            indented = "".join(f"    {line}" for line in block.splitlines(keepends=True))
            program.append(f"try:\n{indented}\nexcept {error[1]}:\n    pass\nelse:\n    raise AssertionError('no {error[1]}')")
        else:
            program.append(block)
    run_python("\n".join(program), cwd=tmp_path)


def test_the_python_block_of_the_export_page(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    block, *_ = PYTHON_BLOCK.findall((DOCS / "exporting.md").read_text())  # export/test_user_networks.py has the others
    (tmp_path / "model.pt").write_bytes(tiny_checkpoint.read_bytes())
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "docs/exporting.md", "exec"), {})
    assert (tmp_path / "model.scm" / "step.fp16.onnx").is_file()


def test_the_runtime_commands_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = "".join(re.findall(r"^```sh\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL))
    commands = re.findall(r"^scm-runtime (.*?)(?: +#.*)?$", blocks, re.MULTILINE)
    assert [command.split()[0] for command in commands] == ["generate", "inspect", "smoke", "bench"]
    for command in commands:
        words = command.split() + ["--seconds", "0"] * command.startswith("bench")
        result = CliRunner().invoke(scm_runtime, words)
        assert result.exit_code == 0, f"{command}\n{result.output}"
    assert (tmp_path / "digits.png").is_file()


def test_the_options_of_the_export_page_exist() -> None:
    text = (DOCS / "exporting.md").read_text()
    known = {option for parameter in scm_export.params for option in (*parameter.opts, *parameter.secondary_opts)} | {"--help"}
    assert set(re.findall(r"`(--?[a-z][a-z-]*)", text)) <= known


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_make_targets_and_extras_exist(page: Path) -> None:
    text = page.read_text()
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {target for target in re.findall(r"^make ([a-z0-9-]+)|`make ([a-z0-9-]+)", text, re.MULTILINE) for target in target if target} <= targets
    extras = set(re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE))
    assert {extra for group in re.findall(r"(?:'\.|scm-runtime)\[([\w,]+)\]", text) for extra in group.split(",")} <= extras


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for target in re.findall(r"(?:\]\(|src(?:set)?=\")([^)\"\s]+)", page.read_text()):
        path, _, anchor = target.partition("#")
        if "://" in target or target.startswith("mailto:"):
            continue
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert not broken


def test_the_index_links_every_page() -> None:
    linked = set(re.findall(r"\]\((\w[\w-]*\.md)", (DOCS / "index.md").read_text()))
    assert linked == {path.name for path in DOCS.glob("*.md")} - {"index.md"}


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [page for page in PROGRAMS if page != README], ids=name_of)
def test_the_tests_that_a_page_names_exist(page: Path) -> None:
    names = set(re.findall(r"`(?:tests/\w+/)?(test_\w+\.py)`", page.read_text()))
    assert names
    there = {path.name for path in (ROOT / "tests").rglob("test_*.py")}
    assert names <= there, names - there
