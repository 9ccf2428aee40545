"""Text from a file, for a message."""

from __future__ import annotations

MAX_SHOWN = 200  # characters


def printable(text: object) -> str:
    """A name or a key as it can be shown: shortened, and with escapes for what a terminal would obey or not print."""
    named = str(text) if isinstance(text, str | int | float) else f"a {type(text).__name__}"
    shown = named if named.isprintable() else named.encode("unicode_escape").decode()
    return shown if len(shown) <= MAX_SHOWN else f"{shown[:MAX_SHOWN]}…"
