// Captures of streams, and the rules of the CUDA programming guide on what they forbid.
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <utility>

#include "streams.h"

namespace stub {
namespace {

std::vector<std::shared_ptr<Capture>>& active_captures() {
  static auto* const captures = new std::vector<std::shared_ptr<Capture>>;
  return *captures;
}

thread_local CUstreamCaptureMode thread_mode = CU_STREAM_CAPTURE_MODE_GLOBAL;

pid_t this_thread() { return static_cast<pid_t>(syscall(SYS_gettid)); }

bool is_default_stream(const CUstream_st* stream) { return stream->id < 2; }

CUresult begin_capture(CUstream handle, CUstreamCaptureMode mode, CUgraph_st* graph, Nodes last) {
  const Lock lock(mutex());
  static unsigned long long next_id = 1;
  CUstream_st* stream = stream_of(handle);
  if (is_default_stream(stream)) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  if (stream->capture != nullptr) return CUDA_ERROR_ILLEGAL_STATE;
  stream->capture = std::make_shared<Capture>(Capture{graph, stream, mode, this_thread(), next_id++});
  stream->last = std::move(last);
  active_captures().push_back(stream->capture);
  say("capture+", "stream %d mode %d", stream->id, static_cast<int>(mode));
  return CUDA_SUCCESS;
}

}  // namespace

CUgraphNode_st* capture_node(CUstream_st* stream, CUgraphNode_st node) {
  node.dependencies = stream->last;
  CUgraphNode_st* added = add_node(stream->capture->graph, std::move(node));
  stream->last = {added};
  return added;
}

CUresult forbidden_by_capture(const char* function) {
  if (!settings().strict_capture || thread_mode == CU_STREAM_CAPTURE_MODE_RELAXED) return CUDA_SUCCESS;
  const Lock lock(mutex());
  CUresult result = CUDA_SUCCESS;
  for (const auto& capture : active_captures()) {
    const bool own = capture->thread == this_thread();
    const bool global = capture->mode == CU_STREAM_CAPTURE_MODE_GLOBAL && (own || thread_mode == CU_STREAM_CAPTURE_MODE_GLOBAL);
    if (!global && !(own && capture->mode == CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)) continue;
    capture->invalidated = true;
    const char* thread = own ? "its own" : "another";
    say("UNSAFE", "%s while stream %d captures (mode %d, %s thread)", function, capture->origin->id, static_cast<int>(capture->mode), thread);
    result = CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  }
  return result;
}

CUresult forbidden_on_legacy_stream(const CUstream_st* stream, const char* function) {
  if (stream->id != 0 || !settings().strict_capture) return CUDA_SUCCESS;
  const Lock lock(mutex());
  CUresult result = CUDA_SUCCESS;
  for (const auto& capture : active_captures()) {
    if ((capture->origin->flags & CU_STREAM_NON_BLOCKING) != 0) continue;
    capture->invalidated = true;
    say("UNSAFE", "%s on the legacy stream while the blocking stream %d captures", function, capture->origin->id);
    result = CUDA_ERROR_STREAM_CAPTURE_IMPLICIT;
  }
  return result;
}

CUresult forbidden_while_capturing(CUstream_st* stream, const char* function) {
  const Lock lock(mutex());
  if (stream->capture == nullptr || !settings().strict_capture) return CUDA_SUCCESS;
  stream->capture->invalidated = true;
  say("UNSAFE", "%s of the capturing stream %d", function, stream->id);
  return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
}

CUresult forbidden_for_captured_event(CUevent_st* event, const char* function) {
  const Lock lock(mutex());
  if (event->capture == nullptr || !settings().strict_capture) return CUDA_SUCCESS;
  event->capture->invalidated = true;
  say("UNSAFE", "%s of an event that was recorded in a capture", function);
  return CUDA_ERROR_CAPTURED_EVENT;
}

}  // namespace stub

using stub::stream_of;

STUB_API(cuStreamBeginCapture_v2)(CUstream stream, CUstreamCaptureMode mode) {
  STUB_FAIL_IF_ORDERED();
  return stub::begin_capture(stream, mode, new CUgraph_st, {});
}
STUB_API(cuStreamBeginCaptureToGraph)
(CUstream stream, CUgraph graph, const CUgraphNode* dependencies, const CUgraphEdgeData*, size_t count, CUstreamCaptureMode mode) {
  STUB_FAIL_IF_ORDERED();
  return stub::begin_capture(stream, mode, graph, {dependencies, dependencies + count});
}
STUB_API(cuStreamEndCapture)(CUstream handle, CUgraph* graph) {
  const stub::Lock lock(stub::mutex());
  CUstream_st* stream = stream_of(handle);
  const std::shared_ptr<stub::Capture> capture = std::exchange(stream->capture, nullptr);
  if (capture == nullptr) return CUDA_ERROR_ILLEGAL_STATE;
  auto& active = stub::active_captures();
  active.erase(std::remove(active.begin(), active.end(), capture), active.end());
  capture->ended = true;
  if (stub::ordered_failure(__func__) != CUDA_SUCCESS) capture->invalidated = true;
  stub::say("capture-", "stream %d nodes %zu%s", stream->id, capture->graph->nodes.size(), capture->invalidated ? " INVALIDATED" : "");
  *graph = capture->invalidated ? nullptr : capture->graph;
  return capture->invalidated ? CUDA_ERROR_STREAM_CAPTURE_INVALIDATED : CUDA_SUCCESS;
}
STUB_API(cuStreamIsCapturing)(CUstream handle, CUstreamCaptureStatus* status) {
  const stub::Lock lock(stub::mutex());
  const CUstream_st* stream = stream_of(handle);
  if (const CUresult error = stub::forbidden_on_legacy_stream(stream, __func__)) return error;
  if (stream->capture == nullptr) {
    *status = CU_STREAM_CAPTURE_STATUS_NONE;
  } else {
    *status = stream->capture->invalidated ? CU_STREAM_CAPTURE_STATUS_INVALIDATED : CU_STREAM_CAPTURE_STATUS_ACTIVE;
  }
  return CUDA_SUCCESS;
}
STUB_API(cuStreamGetCaptureInfo_v3)
(CUstream handle, CUstreamCaptureStatus* status, cuuint64_t* id, CUgraph* graph, const CUgraphNode** dependencies, const CUgraphEdgeData** edges,
 size_t* count) {
  const stub::Lock lock(stub::mutex());
  const CUresult error = cuStreamIsCapturing(handle, status);
  if (error != CUDA_SUCCESS || *status != CU_STREAM_CAPTURE_STATUS_ACTIVE) return error;
  const CUstream_st* stream = stream_of(handle);
  if (id != nullptr) *id = stream->capture->id;
  if (graph != nullptr) *graph = stream->capture->graph;
  if (dependencies != nullptr) *dependencies = stream->last.data();
  if (edges != nullptr) *edges = nullptr;
  if (count != nullptr) *count = stream->last.size();
  return CUDA_SUCCESS;
}
STUB_API(cuStreamGetCaptureInfo_v2)
(CUstream stream, CUstreamCaptureStatus* status, cuuint64_t* id, CUgraph* graph, const CUgraphNode** dependencies, size_t* count) {
  return cuStreamGetCaptureInfo_v3(stream, status, id, graph, dependencies, nullptr, count);
}
STUB_API(cuThreadExchangeStreamCaptureMode)(CUstreamCaptureMode* mode) {
  std::swap(*mode, stub::thread_mode);
  return CUDA_SUCCESS;
}
