// Streams, events and graphs.
#include "runtime.h"

using stub::initialize;
using stub::result_of;

STUB_RUNTIME(cudaStreamCreateWithFlags)(cudaStream_t* stream, unsigned flags) {
  initialize();
  return result_of(cuStreamCreate(stream, flags));
}
STUB_RUNTIME(cudaStreamCreate)(cudaStream_t* stream) { return cudaStreamCreateWithFlags(stream, 0); }
STUB_RUNTIME(cudaStreamDestroy)(cudaStream_t stream) { return result_of(cuStreamDestroy_v2(stream)); }
STUB_RUNTIME(cudaStreamSynchronize)(cudaStream_t stream) {
  initialize();
  return result_of(cuStreamSynchronize(stream));
}
STUB_RUNTIME(cudaStreamQuery)(cudaStream_t stream) { return result_of(cuStreamQuery(stream)); }
STUB_RUNTIME(cudaStreamWaitEvent)(cudaStream_t stream, cudaEvent_t event, unsigned flags) {
  initialize();
  return result_of(cuStreamWaitEvent(stream, event, flags));
}
STUB_RUNTIME(cudaStreamIsCapturing)(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  initialize();
  return result_of(cuStreamIsCapturing(stream, reinterpret_cast<CUstreamCaptureStatus*>(status)));
}
STUB_RUNTIME(cudaStreamBeginCapture)(cudaStream_t stream, cudaStreamCaptureMode mode) {
  initialize();
  return result_of(cuStreamBeginCapture_v2(stream, static_cast<CUstreamCaptureMode>(mode)));
}
STUB_RUNTIME(cudaStreamEndCapture)(cudaStream_t stream, cudaGraph_t* graph) { return result_of(cuStreamEndCapture(stream, graph)); }
STUB_RUNTIME(cudaThreadExchangeStreamCaptureMode)(cudaStreamCaptureMode* mode) {
  return result_of(cuThreadExchangeStreamCaptureMode(reinterpret_cast<CUstreamCaptureMode*>(mode)));
}
STUB_RUNTIME(cudaLaunchHostFunc)(cudaStream_t stream, cudaHostFn_t function, void* data) {
  initialize();
  return result_of(cuLaunchHostFunc(stream, function, data));
}
STUB_RUNTIME(cudaEventCreateWithFlags)(cudaEvent_t* event, unsigned flags) {
  initialize();
  return result_of(cuEventCreate(event, flags));
}
STUB_RUNTIME(cudaEventCreate)(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, 0); }
STUB_RUNTIME(cudaEventDestroy)(cudaEvent_t event) { return result_of(cuEventDestroy_v2(event)); }
STUB_RUNTIME(cudaEventRecordWithFlags)(cudaEvent_t event, cudaStream_t stream, unsigned flags) {
  initialize();
  return result_of(cuEventRecordWithFlags(event, stream, flags));
}
STUB_RUNTIME(cudaEventRecord)(cudaEvent_t event, cudaStream_t stream) { return cudaEventRecordWithFlags(event, stream, 0); }
STUB_RUNTIME(cudaEventSynchronize)(cudaEvent_t event) { return result_of(cuEventSynchronize(event)); }
STUB_RUNTIME(cudaEventQuery)(cudaEvent_t event) { return result_of(cuEventQuery(event)); }
STUB_RUNTIME(cudaEventElapsedTime)(float* elapsed, cudaEvent_t start, cudaEvent_t end) { return result_of(cuEventElapsedTime_v2(elapsed, start, end)); }
STUB_RUNTIME(cudaGraphInstantiate)(cudaGraphExec_t* instance, cudaGraph_t graph, unsigned long long flags) {
  return result_of(cuGraphInstantiateWithFlags(instance, graph, flags));
}
STUB_RUNTIME(cudaGraphLaunch)(cudaGraphExec_t instance, cudaStream_t stream) {
  initialize();
  return result_of(cuGraphLaunch(instance, stream));
}
STUB_RUNTIME(cudaGraphDestroy)(cudaGraph_t graph) { return result_of(cuGraphDestroy(graph)); }
STUB_RUNTIME(cudaGraphExecDestroy)(cudaGraphExec_t instance) { return result_of(cuGraphExecDestroy(instance)); }
