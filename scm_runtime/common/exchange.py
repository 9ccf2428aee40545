"""Exchange of two paths in one operation, so that neither is missing at any moment."""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from pathlib import Path
from typing import Any

AT_FDCWD = -100  # a relative path is one in the current folder
RENAME_EXCHANGE = 2  # of Linux; RENAME_SWAP of macOS has the same value
UNSUPPORTED = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}


def exchange(one: Path, other: Path) -> bool:
    """Exchange two existing files or folders on one file system. Returns False if the system or the file system cannot do it. Raises OSError."""
    libc: Any = ctypes.CDLL(None, use_errno=True) if sys.platform in ("linux", "darwin") else None
    paths = os.fsencode(one), os.fsencode(other)
    if hasattr(libc, "renameat2"):  # glibc 2.28
        failed = libc.renameat2(AT_FDCWD, paths[0], AT_FDCWD, paths[1], RENAME_EXCHANGE)
    elif hasattr(libc, "renamex_np"):  # macOS
        failed = libc.renamex_np(*paths, RENAME_EXCHANGE)
    else:
        return False
    if failed and (number := ctypes.get_errno()) not in UNSUPPORTED:
        raise OSError(number, os.strerror(number), os.fspath(one), None, os.fspath(other))
    return not failed
