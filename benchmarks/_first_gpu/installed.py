"""installed.py FOLDER: fail unless this Python finds the native library that was installed into a folder, with CUDA kernels."""

from __future__ import annotations

import sys
from pathlib import Path

from scm_runtime.ort.native_ops import FOLDER, LIBRARY, find_library

if __name__ == "__main__":
    wanted, found = Path(sys.argv[1], "scm_runtime", FOLDER, LIBRARY), find_library()
    if found is None:
        sys.exit(f"'{wanted}' was installed, and scm_runtime finds no library: install the package with 'pip install -e .' and call this again")
    if not found.path.samefile(wanted):
        sys.exit(f"'{wanted}' was installed, and scm_runtime finds '{found.path}': remove it and call this again")
    if found.info.cuda is None:
        sys.exit(f"'{wanted}' was built without CUDA kernels")
