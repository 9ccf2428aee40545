"""Messages on the logger ``scm_runtime`` that a process writes once."""

from __future__ import annotations

import logging

log = logging.getLogger("scm_runtime")
_logged: set[str] = set()


def log_once(level: int, message: str, *, key: str | None = None) -> None:
    """Log a message unless one with the same key was logged before in this process; the key is the message by default."""
    if (key or message) not in _logged:
        _logged.add(key or message)
        log.log(level, "%s", message)
