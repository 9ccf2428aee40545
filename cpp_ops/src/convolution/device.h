// The calls of CUDA's runtime, other than launches, that the convolution operators make. Each returns null, or CUDA's error message.
#pragma once

#include <cstddef>

#include "convolution/op.h"

namespace scm::convolution {

// Reads the properties of the calling thread's current device.
const char* read_device(Device& device);

// Stream for work outside of runs. It waits for the default stream, on which ONNX Runtime copies weights.
void* thread_stream();

// Enqueues writing zeros.
const char* clear(void* data, std::size_t bytes, void* stream);

// Waits until the work on a stream is done.
const char* synchronize(void* stream);

}  // namespace scm::convolution
