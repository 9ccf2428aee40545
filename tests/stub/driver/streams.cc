#include "streams.h"

#include <array>
#include <atomic>

#include "devices.h"
#include "memory.h"

namespace stub {
namespace {

std::atomic<int> next_stream{10};  // the default streams have smaller numbers: 0 and 1

CUresult create_stream(CUstream* stream, unsigned flags, int priority) {
  *stream = new CUstream_st{next_stream++, flags, priority, current_device(), nullptr, {}};
  say("stream+", "%d flags %u", (*stream)->id, flags);
  return CUDA_SUCCESS;
}

CUstream_st* default_stream(int id) {
  static auto* const streams = new std::array<std::array<CUstream_st, kMaxDevices>, 2>;
  CUstream_st& stream = (*streams)[static_cast<size_t>(id)][static_cast<size_t>(current_device())];
  stream.id = id;
  stream.device = current_device();
  return &stream;
}

}  // namespace

CUstream_st* stream_of(CUstream handle) {
  if (handle == nullptr || handle == CU_STREAM_LEGACY) return default_stream(0);
  return handle == CU_STREAM_PER_THREAD ? default_stream(1) : handle;
}

const char* state_of(const CUstream_st* stream) { return stream->capture != nullptr ? "captured" : "now"; }

}  // namespace stub

using stub::stream_of;

STUB_API(cuStreamCreateWithPriority)(CUstream* stream, unsigned flags, int priority) {
  STUB_FAIL_IF_ORDERED();
  STUB_FAIL_IF_FORBIDDEN();
  return stub::create_stream(stream, flags, priority);
}
STUB_API(cuStreamCreate)(CUstream* stream, unsigned flags) { return cuStreamCreateWithPriority(stream, flags, 0); }
STUB_API(cuStreamDestroy_v2)(CUstream stream) {  // kept: work of others may still name it
  stub::say("stream-", "%d", stream_of(stream)->id);
  return CUDA_SUCCESS;
}
STUB_API(cuStreamGetPriority)(CUstream stream, int* priority) {
  *priority = stream_of(stream)->priority;
  return CUDA_SUCCESS;
}
STUB_API(cuStreamGetFlags)(CUstream stream, unsigned* flags) {
  *flags = stream_of(stream)->flags;
  return CUDA_SUCCESS;
}
STUB_API(cuStreamGetId)(CUstream stream, unsigned long long* id) {
  *id = static_cast<unsigned long long>(stream_of(stream)->id);
  return CUDA_SUCCESS;
}
STUB_API(cuStreamGetCtx)(CUstream stream, CUcontext* context) {
  *context = stub::primary_context(stream_of(stream)->device);
  return CUDA_SUCCESS;
}
STUB_API(cuStreamGetCtx_v2)(CUstream stream, CUcontext* context, CUgreenCtx* green) {
  if (green != nullptr) *green = nullptr;
  return cuStreamGetCtx(stream, context);
}
STUB_API(cuStreamGetDevice)(CUstream stream, CUdevice* device) {
  *device = stream_of(stream)->device;
  return CUDA_SUCCESS;
}
STUB_API(cuStreamSynchronize)(CUstream handle) {
  CUstream_st* stream = stream_of(handle);
  stub::say("sync", "stream %d", stream->id);
  if (const CUresult error = stub::forbidden_while_capturing(stream, __func__)) return error;
  STUB_FAIL_IF_ORDERED();
  STUB_FAIL_IF_FORBIDDEN();
  return stub::forbidden_on_legacy_stream(stream, __func__);
}
STUB_API(cuStreamQuery)(CUstream handle) {
  CUstream_st* stream = stream_of(handle);
  if (const CUresult error = stub::forbidden_while_capturing(stream, __func__)) return error;
  STUB_FAIL_IF_FORBIDDEN();
  return stub::forbidden_on_legacy_stream(stream, __func__);
}
STUB_API(cuCtxSynchronize)() {
  stub::say("sync", "context");
  STUB_FAIL_IF_FORBIDDEN();
  return CUDA_SUCCESS;
}

STUB_API(cuEventCreate)(CUevent* event, unsigned flags) {
  STUB_FAIL_IF_ORDERED();
  STUB_FAIL_IF_FORBIDDEN();
  *event = new CUevent_st{flags, std::make_shared<stub::Record>(), nullptr, {}};
  return CUDA_SUCCESS;
}
STUB_API(cuEventDestroy_v2)(CUevent event) {
  delete event;
  return CUDA_SUCCESS;
}
STUB_API(cuEventRecordWithFlags)(CUevent event, CUstream handle, unsigned flags) {
  const stub::Lock lock(stub::mutex());
  CUstream_st* stream = stream_of(handle);
  if (const CUresult error = stub::forbidden_on_legacy_stream(stream, __func__)) return error;
  if (stub::settings().trace) stub::say("record", "stream %d", stream->id);
  if (stream->capture != nullptr && (flags & CU_EVENT_RECORD_EXTERNAL) != 0) {  // a node of the graph: every launch records the event
    CUgraphNode_st node{stub::Kind::event};
    node.record = event->record;
    stub::capture_node(stream, node);
    return CUDA_SUCCESS;
  }
  *event->record = {true, stub::milliseconds()};
  event->capture = stream->capture;
  event->last = stream->last;
  return CUDA_SUCCESS;
}
STUB_API(cuEventRecord)(CUevent event, CUstream stream) { return cuEventRecordWithFlags(event, stream, 0); }
STUB_API(cuEventQuery)(CUevent event) {
  STUB_FAIL_IF_FORBIDDEN();
  return stub::forbidden_for_captured_event(event, __func__);
}
STUB_API(cuEventSynchronize)(CUevent event) {
  stub::say("sync", "event");
  STUB_FAIL_IF_FORBIDDEN();
  return stub::forbidden_for_captured_event(event, __func__);
}
// At least a microsecond, as work takes no time here and 0 would look like a missing measurement.
STUB_API(cuEventElapsedTime_v2)(float* elapsed, CUevent start, CUevent end) {
  const bool untimed = ((start->flags | end->flags) & CU_EVENT_DISABLE_TIMING) != 0;
  if (!start->record->done || !end->record->done || untimed) return CUDA_ERROR_INVALID_HANDLE;
  *elapsed = static_cast<float>(end->record->time - start->record->time) + 1e-3F;
  return CUDA_SUCCESS;
}
STUB_API(cuEventElapsedTime)(float* elapsed, CUevent start, CUevent end) { return cuEventElapsedTime_v2(elapsed, start, end); }

// An event of a capture makes the waiting stream a part of that capture.
STUB_API(cuStreamWaitEvent)(CUstream handle, CUevent event, unsigned) {
  const stub::Lock lock(stub::mutex());
  CUstream_st* stream = stream_of(handle);
  stub::say("wait", "stream %d for an event", stream->id);
  if (const CUresult error = stub::forbidden_on_legacy_stream(stream, __func__)) return error;
  if (event->capture != nullptr && !event->capture->ended) {
    if (stream->capture != nullptr && stream->capture != event->capture) return CUDA_ERROR_STREAM_CAPTURE_MERGE;
    if (stream->capture == nullptr) stream->last.clear();
    stream->capture = event->capture;
    stream->last.insert(stream->last.end(), event->last.begin(), event->last.end());
  } else if (stream->capture != nullptr && event->record->done && stub::settings().strict_capture) {
    stub::say("UNSAFE", "the capturing stream %d waits for an event from outside", stream->id);
    stream->capture->invalidated = true;
    return CUDA_ERROR_STREAM_CAPTURE_ISOLATION;
  }
  return CUDA_SUCCESS;
}
