"""A short run of soak.py, which ``make soak`` runs for ten minutes."""

from __future__ import annotations

from soak.soak import Soak


def test_all_ways_of_use_concurrently_for_some_seconds() -> None:
    soak = Soak(seconds=6.0, threads=4)
    soak.run()
    assert not soak.wrong, soak.wrong[0]
    assert not soak.threads_left
    assert soak.counts["images"] > 0
