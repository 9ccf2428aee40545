"""A short run of kills.py, which ``make kills`` runs for 200 kills, exports included."""

from __future__ import annotations

from pathlib import Path

from soak.kills import Kills


def test_killed_generations_lose_and_leave_nothing(tmp_path: Path) -> None:
    run = Kills(tmp_path, seed=1)
    run.run(4)
    assert not run.wrong, "\n".join(run.wrong)
