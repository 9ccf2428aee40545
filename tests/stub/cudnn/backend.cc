// The backend interface of cuDNN, which ONNX Runtime uses through NVIDIA's cudnn_frontend. Descriptors keep what is set; one engine is offered for every
// graph; executing a plan is a line in the log, with the graph's operations and tensors.
#include <algorithm>
#include <cstdio>
#include <cstring>

#include "descriptors.h"

namespace stub {
namespace {

Descriptor* descriptor_of(cudnnBackendDescriptor_t descriptor) { return static_cast<Descriptor*>(descriptor); }
Handle* handle_of(cudnnHandle_t handle) { return reinterpret_cast<Handle*>(handle); }

// Make the configuration of the only engine for a heuristic's graph.
void configure_engine(const Descriptor& heuristic, Descriptor* configuration) {
  auto* engine = new Descriptor(CUDNN_BACKEND_ENGINE_DESCRIPTOR);
  const Descriptor* graph = heuristic.descriptor(CUDNN_ATTR_ENGINEHEUR_OPERATION_GRAPH);
  const std::int64_t index = 0;
  engine->set(CUDNN_ATTR_ENGINE_OPERATION_GRAPH, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, &graph);
  engine->set(CUDNN_ATTR_ENGINE_GLOBAL_INDEX, CUDNN_TYPE_INT64, 1, &index);
  configuration->set(CUDNN_ATTR_ENGINECFG_ENGINE, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, &engine);
}

// Copy the elements of a set attribute. Descriptors are copied into those that the caller has made.
void copy_elements(const Descriptor& from, int attribute, cudnnBackendAttributeType_t type, std::int64_t count, void* elements) {
  if (type != CUDNN_TYPE_BACKEND_DESCRIPTOR) {
    std::memcpy(elements, from.find(attribute)->bytes.data(), static_cast<size_t>(count) * size_of(type));
    return;
  }
  for (std::int64_t i = 0; i < count; ++i) {
    Descriptor*& to = static_cast<Descriptor**>(elements)[i];
    Descriptor* source = from.descriptor(attribute, i);
    if (to != nullptr) {
      *to = *source;
    } else {
      to = source;
    }
  }
}

const Descriptor* graph_of(const Descriptor& plan) {
  const Descriptor* configuration = plan.descriptor(CUDNN_ATTR_EXECUTION_PLAN_ENGINE_CONFIG);
  const Descriptor* engine = configuration == nullptr ? nullptr : configuration->descriptor(CUDNN_ATTR_ENGINECFG_ENGINE);
  return engine == nullptr ? nullptr : engine->descriptor(CUDNN_ATTR_ENGINE_OPERATION_GRAPH);
}

}  // namespace
}  // namespace stub

using stub::descriptor_of;
using stub::handle_of;

STUB_CUDNN(cudnnBackendCreateDescriptor)(cudnnBackendDescriptorType_t type, cudnnBackendDescriptor_t* descriptor) {
  *descriptor = new stub::Descriptor(type);
  return CUDNN_STATUS_SUCCESS;
}
STUB_CUDNN(cudnnBackendDestroyDescriptor)(cudnnBackendDescriptor_t) { return CUDNN_STATUS_SUCCESS; }  // kept: others point to it
STUB_CUDNN(cudnnBackendFinalize)(cudnnBackendDescriptor_t descriptor) {
  const stub::Descriptor* made = descriptor_of(descriptor);
  if (made->type == CUDNN_BACKEND_OPERATIONGRAPH_DESCRIPTOR) scm_stub_say("cudnn graph", stub::describe_graph(made).c_str());
  return CUDNN_STATUS_SUCCESS;
}
STUB_CUDNN(cudnnBackendSetAttribute)
(cudnnBackendDescriptor_t descriptor, cudnnBackendAttributeName_t name, cudnnBackendAttributeType_t type, std::int64_t count, const void* elements) {
  descriptor_of(descriptor)->set(name, type, count, elements);
  return CUDNN_STATUS_SUCCESS;
}
STUB_CUDNN(cudnnBackendGetAttribute)
(cudnnBackendDescriptor_t descriptor, cudnnBackendAttributeName_t name, cudnnBackendAttributeType_t type, std::int64_t wanted, std::int64_t* count,
 void* elements) {
  const stub::Descriptor& asked = *descriptor_of(descriptor);
  std::int64_t unused = 0;
  std::int64_t& found = count != nullptr ? *count : unused;
  if (const stub::Value* value = asked.find(name)) {
    found = value->count;
    if (elements != nullptr) stub::copy_elements(asked, name, type, std::min(wanted, value->count), elements);
    return CUDNN_STATUS_SUCCESS;
  }
  switch (static_cast<int>(name)) {
    case CUDNN_ATTR_ENGINEHEUR_RESULTS:
      found = 1;
      if (wanted > 0 && elements != nullptr) stub::configure_engine(asked, *static_cast<stub::Descriptor**>(elements));
      return CUDNN_STATUS_SUCCESS;
    case CUDNN_ATTR_ENGINE_NUMERICAL_NOTE:
    case CUDNN_ATTR_ENGINE_BEHAVIOR_NOTE:
    case CUDNN_ATTR_ENGINE_KNOB_INFO:
    case CUDNN_ATTR_ENGINECFG_KNOB_CHOICES:
      found = 0;
      return CUDNN_STATUS_SUCCESS;
    case CUDNN_ATTR_EXECUTION_PLAN_WORKSPACE_SIZE:
    case CUDNN_ATTR_ENGINECFG_WORKSPACE_SIZE:
    case CUDNN_ATTR_OPERATIONGRAPH_ENGINE_GLOBAL_COUNT:
      found = 1;
      *static_cast<std::int64_t*>(elements) = name == CUDNN_ATTR_OPERATIONGRAPH_ENGINE_GLOBAL_COUNT ? 1 : 0;
      return CUDNN_STATUS_SUCCESS;
    case CUDNN_ATTR_ENGINECFG_SHARED_MEMORY_USED:
      found = 1;
      if (elements != nullptr) *static_cast<std::int32_t*>(elements) = 0;
      return CUDNN_STATUS_SUCCESS;
    default: {
      char text[128];
      std::snprintf(text, sizeof text, "cudnnBackendGetAttribute %d of type %d of a descriptor %d", static_cast<int>(name), static_cast<int>(type),
                    static_cast<int>(asked.type));
      scm_stub_unknown(text);
      found = 0;
      return CUDNN_STATUS_NOT_SUPPORTED;
    }
  }
}
STUB_CUDNN(cudnnBackendExecute)(cudnnHandle_t handle, cudnnBackendDescriptor_t plan, cudnnBackendDescriptor_t) {
  const std::string text = "cudnn[" + stub::describe_graph(stub::graph_of(*descriptor_of(plan))) + "]";
  return scm_stub_operation(handle_of(handle)->stream, text.c_str()) == CUDA_SUCCESS ? CUDNN_STATUS_SUCCESS : CUDNN_STATUS_EXECUTION_FAILED;
}

STUB_CUDNN(cudnnCreate)(cudnnHandle_t* handle) {
  *handle = reinterpret_cast<cudnnHandle_t>(new stub::Handle{});
  return CUDNN_STATUS_SUCCESS;
}
STUB_CUDNN(cudnnDestroy)(cudnnHandle_t handle) {
  delete handle_of(handle);
  return CUDNN_STATUS_SUCCESS;
}
STUB_CUDNN(cudnnSetStream)(cudnnHandle_t handle, cudaStream_t stream) {
  handle_of(handle)->stream = stream;
  return CUDNN_STATUS_SUCCESS;
}
STUB_CUDNN(cudnnGetStream)(cudnnHandle_t handle, cudaStream_t* stream) {
  *stream = handle_of(handle)->stream;
  return CUDNN_STATUS_SUCCESS;
}
extern "C" __attribute__((visibility("default"))) size_t cudnnGetVersion() { return CUDNN_VERSION; }
extern "C" __attribute__((visibility("default"))) size_t cudnnGetCudartVersion() { return 13000; }
extern "C" __attribute__((visibility("default"))) const char* cudnnGetErrorString(cudnnStatus_t status) {
  return status == CUDNN_STATUS_SUCCESS ? "CUDNN_STATUS_SUCCESS" : "an error of the stub";
}
extern "C" __attribute__((visibility("default"))) void cudnnGetLastErrorString(char* text, size_t length) {
  if (length > 0) std::snprintf(text, length, "none");
}
