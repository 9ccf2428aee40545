"""Files that appear whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def beside(target: Path, what: str) -> Path:
    """A hidden path in the target's folder that nothing else uses."""
    return target.with_name(f".{target.name}.{what}-{os.urandom(6).hex()}")


@contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """A path to write to that takes the target's place when the block ends well, and vanishes when it does not. Raises what the system raises."""
    part = beside(target, "part")
    try:
        part.touch(exist_ok=False)
        mode = part.stat().st_mode
        yield part
        part.chmod(mode)  # the user's umask; some writers make private files
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
