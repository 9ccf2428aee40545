"""random_bundle.py SIZE FOLDER: export an EDM2 network with sCM's changes and random weights in fp16, unless the folder exists."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from _peers.models import edm2_config, random_checkpoint

from scm_export import export

if __name__ == "__main__":
    size, folder = sys.argv[1], Path(sys.argv[2])
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            checkpoint = random_checkpoint(edm2_config(size), Path(temporary) / f"{size}.pt")
            export(checkpoint, folder, dtype="fp16", verify=False, steps=())
