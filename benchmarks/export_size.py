"""What does an export cost? Seconds and peak memory of the S preset (280 M parameters, random weights) in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch
from _common import keep

from scm_export.checkpoints import Checkpoint, SamplerSpec, save_checkpoint
from scm_export.networks.edm2 import PRESETS, UNet

MEASURE = """
import json, resource, sys, time
start = time.perf_counter()
from scm_export import export
imported = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
stages = []
export(sys.argv[1], sys.argv[2], progress=lambda stage: stages.append((round(time.perf_counter() - start, 1), stage)))
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"seconds": time.perf_counter() - start, "peak_bytes": peak, "bytes_after_imports": imported, "stages": stages}))
"""


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "s.pt"
        torch.manual_seed(0)
        net = UNet(PRESETS["S"])
        torch.nn.init.ones_(net.out_gain)
        weights = sum(p.numel() * p.element_size() for p in net.parameters())
        save_checkpoint(Checkpoint(family="edm2", config=asdict(PRESETS["S"]), sampler=SamplerSpec(), weights=net.state_dict()), path)
        del net
        run = subprocess.run([sys.executable, "-c", MEASURE, str(path), str(Path(folder) / "s.scm")], check=True, capture_output=True, text=True)
        figures = json.loads(run.stdout.splitlines()[-1])
    keep("export_size", {"preset": "S", "weights_bytes": weights, **figures, "peak / weights": figures["peak_bytes"] / weights})


if __name__ == "__main__":
    main()
