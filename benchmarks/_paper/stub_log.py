"""Launches of a step in a log of the stub GPU (tests/stub), by kind."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

# Parts of kernel names, in order of precedence, and the kinds that the paper model counts.
KINDS = (
    (r"cudnn\[conv", "convolution"),
    (r"convolution", "convolution, ours"),
    (r"cublas.*\[.* n=1 ", "product with one row"),
    (r"cublas", "product"),
    (r"transpose", "transposes"),
    (r"cosine_attention", "attention"),
    (r"PoolingForward|pool|Expand|upsample", "resampling"),
    (r"modulate_silu|mp_sum|mp_cat|mp_silu|pixel_norm", "elementwise"),
)
STEP = 100  # the graph of a step has at least so many nodes; noise, checks and decoders have fewer


def launches_of_a_step(log: Path) -> Counter[str]:
    """Count the kernels of the last captured graph of a step in a log: tab-separated lines whose fourth field is the kind of the line."""
    counts: Counter[str] = Counter()
    inside = False
    for fields in (line.split("\t") for line in log.read_text().splitlines()):
        if len(fields) > 4 and fields[3] == "graph" and (nodes := re.search(r"nodes (\d+)", fields[4])):
            inside = int(nodes[1]) >= STEP
            if inside:
                counts.clear()
        elif inside and len(fields) > 6 and fields[3] == "kernel" and fields[4] == "replayed":
            counts[next((kind for pattern, kind in KINDS if re.search(pattern, fields[6])), "other")] += 1
    return counts
