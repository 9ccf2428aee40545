"""PROVISIONAL, replaced by A."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Placement:
    device: str
    providers: tuple[tuple[str, dict[str, str]], ...]
    reason: str
    hardware: str = ""

    @property
    def index(self) -> int | None:
        return int(self.device[5:]) if self.device.startswith("cuda:") else None


CPU = Placement("cpu", (("CPUExecutionProvider", {}),), "device='cpu'")


def place(device: str = "auto", providers: Any = None, provider_options: Any = None) -> Placement:
    return CPU
