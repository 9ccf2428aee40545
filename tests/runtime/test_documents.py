"""JSON and TOML from files nobody has checked: limits on size, nesting and numbers, and regular files only."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from scm_runtime.common import documents
from scm_runtime.common.message_text import escape_controls, printable, safe_message


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 100_000, "nested"),
        ('{"a":' * 100_000, "nested"),
        ("[" * 65 + "]" * 65, "nested"),
        ("1" * 5000, "out of range"),
        ("1e999", "out of range"),
        ("{", "truncated"),
    ],
)
def test_json_out_of_bounds_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    file = tmp_path / "file.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=reason):
        documents.read_json(file)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a = " + "[" * 100_000, "nested"),
        ("a" + ".a" * 1000 + " = 1", "nested"),
        ("a" + ".a" * 200_000 + " = 1", "dots"),  # tomllib needs 160 GB for it
        ("1" + ".1" * 200_000 + " = 1", "dots"),
        ("1.1 . " * 100_000 + "1 = 1", "dots"),
        ('"=".' * 200_000 + "a = 1", "dots"),
        ("'=' . " * 150_000 + "a = 1", "dots"),
        ('a = """b""""" # c\n' + '"\\"".' * 200_000 + "a = 1", "dots"),
        ("a = '''b\n'''\n" + "'\"'." * 200_000 + "a = 1", "dots"),
        ('a = "' + '\\"' * 500_000, "Unterminated|Illegal"),
        ("a = " + "1" * 5000, "digits"),
        ("# " + "a" * (1 << 20), "bytes"),
    ],
)
def test_toml_out_of_bounds_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    file = tmp_path / "file.toml"
    file.write_text(text)
    with pytest.raises(ValueError, match=reason):
        documents.read_toml(file)


def test_dots_in_strings_and_comments_are_not_counted(tmp_path: Path) -> None:
    labels = [f"St. B. {number}" for number in range(1001)]
    several = f'a = """{". " * 1000}\n.\\"""""\nb = \'\'\'{". " * 1000}\n.\'\'\'\n'
    file = tmp_path / "file.toml"
    file.write_text(f"{several}label_names = {json.dumps(labels)}\n" + "# See e.g. appendix A.1.2 of the paper.\n" * 700)
    read = documents.read_toml(file)
    assert (read["label_names"], read["a"][-2:], read["b"][-1]) == (labels, '""', ".")


def test_long_lists_of_numbers_are_read(tmp_path: Path) -> None:
    toml, json = tmp_path / "file.toml", tmp_path / "file.json"
    toml.write_text(f"times = [{'1.5, ' * 20_000}-0.25]")
    json.write_text("[" * 64 + "]" * 64)
    assert documents.read_toml(toml)["times"][-2:] == [1.5, -0.25]
    documents.read_json(json)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("read", [documents.read_json, documents.read_toml])
def test_pipes_and_devices_are_not_opened(tmp_path: Path, read: type) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name in ("pipe", "zero"):
        with pytest.raises(OSError, match="must be a regular file"):
            read(tmp_path / name)


def test_control_characters_are_escaped_and_other_text_stays() -> None:
    assert escape_controls("no 'a\x1b[2J\rb\x9b\u202e' in\n\tbündle →") == "no 'a\\x1b[2J\\rb\\x9b\\u202e' in\n\tbündle →"


def test_a_name_keeps_its_letters_beside_characters_that_are_escaped() -> None:
    assert printable("重み\u3000ema\x1b\ud800\n") == "重み\\u3000ema\\x1b\\ud800\\n"


def test_long_messages_keep_their_beginning_and_end() -> None:
    message = safe_message("the cause " + "y" * 10_000 + "\x1b[31m the remedy")
    assert len(message) < 5000
    assert message.startswith("the cause y")
    assert message.endswith("y\\x1b[31m the remedy")
