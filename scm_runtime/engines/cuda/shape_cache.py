"""The buffers and CUDA graphs of recent batch shapes, bounded in number."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, Protocol, TypeVar

# Maximum number of shapes that are captured at the same time. A graph of a large network takes some tens of MiB of device memory.
MAX_GRAPHS = 24
# A captured shape gives its place to another after so many uses of other shapes. Capturing costs several runs.
IDLE_USES = 200
# Maximum number of shapes without a captured graph whose buffers are kept.
MAX_UNCAPTURED = 8


class Entry(Protocol):
    """Buffers of one shape, and the work bound to them."""

    may_capture: bool
    """Whether the entry was made to be captured."""

    @property
    def waits(self) -> bool:
        """Whether the work is still to be captured, when it is first done."""

    @property
    def captured(self) -> bool:
        """Whether the work was captured."""

    def release(self) -> None:
        """Free the captured graphs."""


E = TypeVar("E", bound=Entry)


class ShapeCache(Generic[E]):
    """Entries by shape, least recently used first."""

    def __init__(self) -> None:
        self._entries: OrderedDict[Hashable, tuple[E, int]] = OrderedDict()  # with the use, by number, that was the last
        self._uses = 0

    def get(self, key: Hashable, make: Callable[[bool], E], *, capture: bool) -> E:
        """Return the entry of a shape, making it if needed.

        Args:
            key: identifies the shape.
            make: makes the entry; the argument says whether it may be captured. Its errors are raised.
            capture: False if the shape is not to be captured.
        """
        self._uses += 1
        found = self._entries.get(key)
        entry = found[0] if found else None
        if entry is None or (capture and not entry.may_capture and self._make_room_to_capture()):
            self._entries.pop(key, None)
            others = [other for other, (kept, _) in self._entries.items() if not kept.captured]
            if len(others) >= MAX_UNCAPTURED:
                self._entries.pop(others[0])[0].release()
            entry = make(capture and self._make_room_to_capture())
        self._entries[key] = entry, self._uses
        self._entries.move_to_end(key)
        return entry

    def captured(self) -> list[Hashable]:
        """Return the shapes that are captured."""
        return [key for key, (entry, _) in self._entries.items() if entry.captured]

    def release(self, matches: Callable[[Hashable], bool]) -> None:
        """Drop the entries without a captured graph, and those whose shape matches with or without one."""
        for other in [other for other, (entry, _) in self._entries.items() if matches(other) or not entry.captured]:
            self._entries.pop(other)[0].release()

    def clear(self) -> None:
        """Drop all entries."""
        self.release(lambda _: True)

    def _make_room_to_capture(self) -> bool:
        """Return True if another shape may be captured, after an idle one has made room if necessary."""
        captured = self.captured()
        waiting = sum(entry.waits and not entry.captured for entry, _ in self._entries.values())
        if len(captured) + waiting < MAX_GRAPHS:
            return True
        if not captured or self._uses - self._entries[captured[0]][1] <= IDLE_USES:
            return False
        self._entries.pop(captured[0])[0].release()
        return True
