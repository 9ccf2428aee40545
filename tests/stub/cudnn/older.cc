// cuDNN's older interface, which ONNX Runtime uses for what is not a convolution: pooling, softmax and reductions. Descriptors of tensors keep their
// dimensions; the others keep nothing.
#include "descriptors.h"

namespace {

struct Older {
  int dtype = -1;
  std::vector<std::int64_t> dimensions;
};

std::string describe(cudnnTensorDescriptor_t descriptor) {
  const auto* tensor = reinterpret_cast<const Older*>(descriptor);
  return stub::join(tensor->dimensions) + " " + stub::name_of(tensor->dtype);
}

cudnnStatus_t leave(cudnnHandle_t handle, const char* operation, cudnnTensorDescriptor_t from, cudnnTensorDescriptor_t to) {
  const std::string text = std::string(operation) + "[" + describe(from) + " to " + describe(to) + "]";
  const CUresult result = scm_stub_operation(reinterpret_cast<stub::Handle*>(handle)->stream, text.c_str());
  return result == CUDA_SUCCESS ? CUDNN_STATUS_SUCCESS : CUDNN_STATUS_EXECUTION_FAILED;
}

}  // namespace

#define STUB_DESCRIPTOR(name)                                                              \
  STUB_CUDNN(cudnnCreate##name##Descriptor)(cudnn##name##Descriptor_t * descriptor) {      \
    *descriptor = reinterpret_cast<cudnn##name##Descriptor_t>(new Older{});                \
    return CUDNN_STATUS_SUCCESS;                                                           \
  }                                                                                        \
  STUB_CUDNN(cudnnDestroy##name##Descriptor)(cudnn##name##Descriptor_t descriptor) {       \
    delete reinterpret_cast<Older*>(descriptor);                                           \
    return CUDNN_STATUS_SUCCESS;                                                           \
  }
STUB_DESCRIPTOR(Tensor)
STUB_DESCRIPTOR(Filter)
STUB_DESCRIPTOR(Convolution)
STUB_DESCRIPTOR(Pooling)
STUB_DESCRIPTOR(ReduceTensor)

STUB_CUDNN(cudnnSetTensorNdDescriptor)(cudnnTensorDescriptor_t descriptor, cudnnDataType_t dtype, int rank, const int* dimensions, const int*) {
  *reinterpret_cast<Older*>(descriptor) = {dtype, {dimensions, dimensions + rank}};
  return CUDNN_STATUS_SUCCESS;
}
STUB_CUDNN(cudnnSetPoolingNdDescriptor)
(cudnnPoolingDescriptor_t, const cudnnPoolingMode_t, const cudnnNanPropagation_t, int, const int[], const int[], const int[]) { return CUDNN_STATUS_SUCCESS; }
STUB_CUDNN(cudnnPoolingForward)
(cudnnHandle_t handle, cudnnPoolingDescriptor_t, const void*, cudnnTensorDescriptor_t from, const void*, const void*, cudnnTensorDescriptor_t to, void*) {
  return leave(handle, "cudnnPoolingForward", from, to);
}
STUB_CUDNN(cudnnSoftmaxForward)
(cudnnHandle_t handle, cudnnSoftmaxAlgorithm_t, cudnnSoftmaxMode_t, const void*, cudnnTensorDescriptor_t from, const void*, const void*,
 cudnnTensorDescriptor_t to, void*) {
  return leave(handle, "cudnnSoftmaxForward", from, to);
}
STUB_CUDNN(cudnnSetReduceTensorDescriptor)
(cudnnReduceTensorDescriptor_t, cudnnReduceTensorOp_t, cudnnDataType_t, cudnnNanPropagation_t, cudnnReduceTensorIndices_t, cudnnIndicesType_t) {
  return CUDNN_STATUS_SUCCESS;
}
STUB_CUDNN(cudnnGetReductionIndicesSize)
(cudnnHandle_t, cudnnReduceTensorDescriptor_t, cudnnTensorDescriptor_t, cudnnTensorDescriptor_t, size_t* bytes) {
  *bytes = 0;
  return CUDNN_STATUS_SUCCESS;
}
STUB_CUDNN(cudnnGetReductionWorkspaceSize)
(cudnnHandle_t, cudnnReduceTensorDescriptor_t, cudnnTensorDescriptor_t, cudnnTensorDescriptor_t, size_t* bytes) {
  *bytes = 0;
  return CUDNN_STATUS_SUCCESS;
}
STUB_CUDNN(cudnnReduceTensor)
(cudnnHandle_t handle, cudnnReduceTensorDescriptor_t, void*, size_t, void*, size_t, const void*, cudnnTensorDescriptor_t from, const void*, const void*,
 cudnnTensorDescriptor_t to, void*) {
  return leave(handle, "cudnnReduceTensor", from, to);
}
