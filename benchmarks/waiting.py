"""Does the speed of ``submit`` depend on the number of waiting requests? Images per second of the digits model, while that many requests wait."""

from __future__ import annotations

import statistics
import threading
import time

import click
from _common import AGAIN, Cells

from scm_runtime import Generator

WAITING = (160, 10_000, 50_000)
ROUNDS = 3
MEASURED = 320  # images, or as many as wait


def images_per_second(waiting: int) -> float:
    """Queue requests of one image and one step while the scheduler is blocked, then time the first of them."""
    release = threading.Event()
    with Generator("digits", device="cpu", max_batch_size=8) as generate:
        generate.warmup((8,), num_inference_steps=1)
        generate.submit(seed=0, num_inference_steps=1, output_type="np", callback_on_step_end=lambda *_: (release.wait(), None)[1])
        futures = [generate.submit(seed=i, num_inference_steps=1, output_type="np") for i in range(waiting)]
        measured = min(MEASURED, waiting)
        start = time.perf_counter()
        release.set()
        futures[measured - 1].result()
        elapsed = time.perf_counter() - start
        generate.close()
    return measured / elapsed


def measure() -> dict[str, float]:
    """Return images per second by the number of waiting requests, measured in turn."""
    rates: dict[int, list[float]] = {waiting: [] for waiting in WAITING}
    for _ in range(ROUNDS):
        for waiting, found in rates.items():
            found.append(images_per_second(waiting))
    return {str(waiting): statistics.median(found) for waiting, found in rates.items()}


@click.command(help=__doc__)
@AGAIN
def main(again: bool) -> None:
    Cells("waiting", again=again).measure("images_per_second", by=measure)


if __name__ == "__main__":
    main()
