"""Reading of JSON and TOML from files nobody has checked, within limits on size and nesting."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from scm_runtime.common.files import read_limited

MAX_BYTES = 16 << 20
"""Largest JSON file that is read, unless a reader allows another size. The index of a model of 10 000 tensors has 1 MiB."""
MAX_TOML_BYTES = 1 << 20
MAX_DEPTH = 64
"""Deepest nesting of lists and dicts."""
MAX_INTEGER_BITS = 64
MAX_CONTAINERS = 1_000_000
"""Largest number of lists and dicts at one level of nesting."""
MAX_KEY_DOTS = 2000
"""Largest number of dots in TOML outside of numbers, strings and comments. tomllib needs memory quadratic in the number of parts of a dotted key."""
COMMENT_OR_STRING = re.compile(
    r"""
    \#[^\n]*+
    | \"{3} (?: [^"\\] | \\[\s\S] | "(?!"") )*+ "{0,5}  # a string without an end reaches to the end of the text: the search takes linear time
    | '{3} (?: [^'] | '(?!'') )*+ '{0,5}
    | " (?: [^"\\\n] | \\. )*+ "?
    | ' [^'\n]*+ '?
    """,
    re.VERBOSE,
)
DECIMAL_POINT = re.compile(r"(?<![\w.-])[+-]?\d[\d_]*\.\d")


def decode_json(data: bytes | str, *, max_depth: int = MAX_DEPTH) -> Any:
    """Decode JSON to dicts, lists, strings and numbers.

    Raises:
        ValueError: it is not JSON, holds a number out of range or an integer of more than 64 bits, or is nested more than ``max_depth`` deep.
    """
    try:
        value = msgspec.json.decode(data)
    except RecursionError:
        raise _too_deep(max_depth) from None
    check_depth(value, max_depth)
    return value


def read_json(path: Path, *, max_bytes: int = MAX_BYTES) -> Any:
    """Read and decode a JSON file.

    Raises:
        OSError: it cannot be read, or is not a regular file.
        ValueError: it is larger than ``max_bytes``, or ``decode_json`` refuses it.
    """
    return decode_json(read_limited(path, max_bytes))


def read_toml(path: Path) -> dict[str, Any]:
    """Read and decode a TOML file.

    Raises:
        OSError: it cannot be read, or is not a regular file.
        ValueError: it is larger than ``MAX_TOML_BYTES``, is not TOML in UTF-8, or is nested too deep.
    """
    text = read_limited(path, MAX_TOML_BYTES).decode("utf-8")
    keys = COMMENT_OR_STRING.sub('""', text)
    if keys.count(".") - len(DECIMAL_POINT.findall(keys)) > MAX_KEY_DOTS:
        raise ValueError(f"it has more than {MAX_KEY_DOTS} dots outside of numbers, strings and comments")
    try:
        value = tomllib.loads(text)
    except RecursionError:
        raise _too_deep(MAX_DEPTH) from None
    check_depth(value)
    return value


def check_depth(value: object, max_depth: int = MAX_DEPTH, max_integer_bits: int = MAX_INTEGER_BITS) -> None:
    """Raise ValueError if lists, dicts and tuples are nested more than ``max_depth`` deep, are too many, or hold an integer that is too long."""
    level, depth = [value], 0
    while level:
        inner: dict[int, object] = {}  # by identity: values from a pickle may be shared
        for container in level:
            for item in _items(container):
                if isinstance(item, int) and item.bit_length() > max_integer_bits:
                    raise ValueError(f"an integer must have at most {max_integer_bits} bits, got {item.bit_length()}")
                if isinstance(item, dict | list | tuple):
                    inner[id(item)] = item
            if len(inner) > MAX_CONTAINERS:
                raise ValueError(f"it must have at most {MAX_CONTAINERS} lists and dicts at each level of nesting")
        level, depth = list(inner.values()), depth + 1
        if level and depth >= max_depth:
            raise _too_deep(max_depth)


def _items(container: object) -> Iterable[object]:
    if isinstance(container, dict):
        return container.values()
    return container if isinstance(container, list | tuple) else (container,)


def _too_deep(max_depth: int) -> ValueError:
    return ValueError(f"it is nested more than {max_depth} levels deep")
