#include "common/cuda.h"
#include "convolution/device.h"

namespace scm::convolution {

const char* read_device(Device& device) {
  int index = 0, major = 0, minor = 0;
  cudaError_t error = cudaGetDevice(&index);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&device.multiprocessors, cudaDevAttrMultiProcessorCount, index);
  device.capability = 10 * major + minor;
  return message_of(error);
}

void* thread_stream() { return cudaStreamPerThread; }

const char* clear(void* data, std::size_t bytes, void* stream) { return message_of(cudaMemsetAsync(data, 0, bytes, static_cast<cudaStream_t>(stream))); }

const char* synchronize(void* stream) { return message_of(cudaStreamSynchronize(static_cast<cudaStream_t>(stream))); }

}  // namespace scm::convolution
