"""The batch sizes that are captured as CUDA graphs, and to which other batches are padded."""

from __future__ import annotations

from bisect import bisect_left, insort

# All sizes up to the default of max_batch_size; then steps of at most a third, so that a few graphs serve every size.
BATCH_SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64)


class BatchSizes:
    """The sizes of one engine."""

    def __init__(self, *, pads: bool) -> None:
        """Start with BATCH_SIZES, or with no size if ``pads`` is False: every batch then runs as it is."""
        self._sizes = list(BATCH_SIZES) if pads else []
        self._pads = pads
        self._kept: set[int] = set()

    def __contains__(self, size: int) -> bool:
        """Return True if batches of this size are captured."""
        return size in self._sizes

    def add(self, size: int) -> None:
        """Capture batches of exactly this size, always."""
        self._kept.add(size)
        if self._pads and size not in self._sizes:
            insort(self._sizes, size)

    def drop(self, size: int) -> bool:
        """Stop padding to this size, for which the device's memory does not suffice. Returns False if it was added: then it stays."""
        if size in self._kept:
            return False
        self._sizes.remove(size)
        return True

    def padded(self, n: int) -> int:
        """Return the size at which a batch of n samples runs: the next captured one, or n if that is more than a third larger."""
        at = bisect_left(self._sizes, n)
        return self._sizes[at] if at < len(self._sizes) and 3 * self._sizes[at] <= 4 * n else n
