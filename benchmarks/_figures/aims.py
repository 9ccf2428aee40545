"""What is aimed at on every processor, and whether the results reach it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from _figures.tables import OURS, fastest_other, machine_line, markdown, ran, size_of

PLAIN = "ONNX Runtime, plain export"
EDM2, DIFFUSERS = ("digits", "XXS", "S", "XXL"), ("SANA-Sprint", "CM", "LCM")
MEMORY_BEFORE = {  # peak bytes of scm_runtime in November 2026, which the largest model is not to exceed
    ("Intel(R) Xeon(R) Processor", "XXL", 1): 12_584_000_000,
    ("AMD EPYC", "XXL", 1): 6_942_000_000,
    ("AMD EPYC", "XXL", 8): 9_375_000_000,
}
NOISE = 1.01  # peaks of two runs differ by less than this


@dataclass(frozen=True)
class Aim:
    """The smallest acceptable time of the fastest peer, relative to that of scm_runtime, for a model and batch size."""

    size: str
    batch_size: int
    dtype: str
    ratio: float
    first: float | None = None
    """The aim on the way to it."""

    @property
    def ours(self) -> str:
        return OURS if self.dtype == "fp32" else f"{OURS} {self.dtype}"

    def reached(self, ratio: float) -> str:
        """Return "yes", "no", or the aim on the way if it is reached."""
        if ratio >= self.ratio:
            return "yes"
        return f"{self.first:.1f}" if self.first is not None and ratio >= self.first else "no"


AIMS = (
    *(Aim(size, n, "fp32", {1: 1.5, 8: 1.3}[n]) for size in ("digits", "XXS", "S") for n in (1, 8)),
    *(Aim("XXL", n, "fp32", 1.3) for n in (1, 8)),
    *(Aim(size, n, "fp32", 1.2, first=1.0) for size in DIFFUSERS for n in (1, 8)),
    *(Aim(size, n, "bf16", 0.95) for size in (*EDM2, *DIFFUSERS) for n in (1, 8)),  # level with OpenVINO in bf16
)


def aims(result: Mapping[str, Any]) -> str:
    """Table of the aims: time and peak memory relative to those of the peers, and whether they are reached."""
    figures = result["figures"]
    rows = {(row["size"], row["batch_size"]): row for row in figures["rows"].values() if row["steps"] == 2}
    has_bf16 = figures["roof"].get("bfloat16_flop_per_s", 0) > figures["roof"].get("float32_flop_per_s", 0)  # bf16 instructions, which are faster
    applicable = [aim for aim in AIMS if (aim.size, aim.batch_size) in rows and (aim.dtype == "fp32" or has_bf16)]
    lines = [_line(aim, rows[aim.size, aim.batch_size], result["machine"]["cpu"]) for aim in applicable]
    header = ["model", "batch", "precision", "fastest peer", f"its time / {OURS}'s", "aim", "reached", "peak memory", "limit", "within it"]
    return "\n".join([markdown(header, lines), "", machine_line(result)])


def _line(aim: Aim, row: Mapping[str, Any], cpu: str) -> list[str]:
    found, number = ran(row), _ratio(aim, row)
    fastest, ratio, reached = ("–", "–", "not measured") if number is None else (number[0], f"{number[1]:.2f}", aim.reached(number[1]))
    wanted = f"{aim.ratio:.2f}".rstrip("0") if aim.first is None else f"{aim.first:.1f}, then {aim.ratio:.1f}"
    peak, limit = (found[aim.ours]["peak_bytes"] if aim.ours in found else None), _memory_limit(aim, row, cpu)
    within = "–" if peak is None or limit is None else "yes" if peak <= NOISE * limit else "no"
    return [row["title"], str(row["batch_size"]), aim.dtype, fastest, ratio, wanted, reached, size_of(peak), size_of(limit), within]


def _ratio(aim: Aim, row: Mapping[str, Any]) -> tuple[str, float] | None:
    """Return the fastest peer of the precision (in bf16: with OpenVINO) and its time relative to ours, or None if either was not measured."""
    found = ran(row)
    if aim.ours not in found:
        return None
    ours = found[aim.ours].get("times_as_long", 1.0)
    peers = {name: one for name, one in found.items() if aim.dtype == "fp32" or "OpenVINO" in name}
    fastest = fastest_other({"peers": peers}, aim.dtype)
    return None if fastest is None else (fastest[0], fastest[1] / ours)


def _memory_limit(aim: Aim, row: Mapping[str, Any], cpu: str) -> float | None:
    """Return the largest acceptable peak memory in fp32, for networks of diffusers' families that of the plain export; None if there is no aim."""
    if aim.dtype != "fp32":
        return None
    if aim.size in DIFFUSERS:
        plain = ran(row).get(PLAIN)
        return None if plain is None else plain["peak_bytes"]
    return MEMORY_BEFORE.get((cpu, aim.size, aim.batch_size))
