"""Text from files and exceptions, made safe and short for messages."""

from __future__ import annotations

MAX_SHOWN = 200  # characters of one name or key
MAX_MESSAGE = 4000  # characters
MAX_LINE = 1000


def printable(text: object) -> str:
    """Shorten a name or key from a file and escape characters that a terminal would interpret or cannot print."""
    named = str(text)[: MAX_SHOWN + 1] if isinstance(text, str | int | float) else f"a {type(text).__name__}"
    shown = "".join(map(_escaped, named))
    return shown if len(shown) <= MAX_SHOWN else f"{shown[:MAX_SHOWN]}…"


def first_line(error: BaseException) -> str:
    """First line of an exception's message, escaped and shortened like :func:`printable`, or its class name if the message is empty."""
    start = str(error).strip()[: 2 * MAX_LINE]  # a message may hold an entry of a file, of any size
    line = escape_controls((start.splitlines() or [type(error).__name__])[0])
    return line if len(line) <= MAX_LINE else f"{line[:MAX_LINE]}…"


def escape_controls(text: str) -> str:
    """Escape the characters of a message that a terminal would interpret, such as those of ANSI sequences. Line breaks and tabs stay."""
    return "".join(char if char in "\n\t" else _escaped(char) for char in text)


def _escaped(char: str) -> str:
    return char if char.isprintable() else char.encode("unicode_escape").decode()


def safe_message(text: str, max_length: int = MAX_MESSAGE) -> str:
    """Escape the control characters of a message, and cut out the middle of a very long one."""
    if len(text) > max_length:
        text = f"{text[: max_length // 2]} … {text[-max_length // 2 :]}"
    return escape_controls(text)
