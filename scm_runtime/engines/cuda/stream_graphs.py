"""Capture and launch of CUDA graphs on a stream."""

from __future__ import annotations

from typing import Any

from scm_runtime.engines.cuda.cuda_errors import check, translate_errors


class StreamGraphs:
    """The captures of one stream. It is used in the thread of the stream only."""

    def __init__(self, driver: Any, handle: Any) -> None:
        """Capture the stream with this handle; ``driver`` is the module cuda.bindings.driver."""
        self._driver, self._handle = driver, handle

    @translate_errors
    def begin(self) -> None:
        """Record the work that this thread enqueues from now on, instead of doing it. Allocations in other threads do not disturb the capture."""
        check(self._driver.cuStreamBeginCapture(self._handle, self._driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL))

    @translate_errors
    def end(self) -> Any:
        """End a capture, and return its executable graph."""
        graph = check(self._driver.cuStreamEndCapture(self._handle))
        try:
            return check(self._driver.cuGraphInstantiate(graph, 0))
        finally:
            check(self._driver.cuGraphDestroy(graph))

    @translate_errors
    def abort(self) -> None:
        """End a failed capture, and drop what was recorded."""
        driver = self._driver
        if check(driver.cuStreamIsCapturing(self._handle)) != driver.CUstreamCaptureStatus.CU_STREAM_CAPTURE_STATUS_NONE:
            status, graph = driver.cuStreamEndCapture(self._handle)
            if not int(status):  # otherwise it reports the failure that the caller knows about
                check(driver.cuGraphDestroy(graph))

    @translate_errors
    def launch(self, graph: Any) -> None:
        """Enqueue an executable graph."""
        check(self._driver.cuGraphLaunch(graph, self._handle))

    @translate_errors
    def destroy(self, graph: Any) -> None:
        """Free an executable graph whose launches are done."""
        check(self._driver.cuGraphExecDestroy(graph))
