// Thin wrapper around ONNX Runtime's C API for the operators: attributes, tensors, scratch memory and threads.
#pragma once

#include <onnxruntime_c_api.h>

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "common/shape.h"

#ifndef SCM_OPS_ORT_API
#define SCM_OPS_ORT_API 18  // the first version with GetMayInplace; later releases of ONNX Runtime support it as well
#endif

namespace scm {

// Throws Error with ONNX Runtime's message if the status is not null. Releases the status.
void check(const OrtApi& api, OrtStatus* status);

struct Input {
  Shape shape;
  const void* data;
  ONNXTensorElementDataType type;

  template <typename T>
  const T* as() const {
    return static_cast<const T*>(data);
  }
};

class Allocator;

// A block of an allocator's memory, which it owns, or none.
class Memory {
 public:
  Memory() = default;
  Memory(Memory&& other) noexcept : allocator_(std::exchange(other.allocator_, nullptr)), data_(std::exchange(other.data_, nullptr)) {}
  Memory& operator=(Memory&& other) noexcept {
    std::swap(allocator_, other.allocator_);
    std::swap(data_, other.data_);
    return *this;
  }
  ~Memory();

  void* data() const { return data_; }

 private:
  friend class Allocator;
  Memory(const Allocator& allocator, void* data) : allocator_(&allocator), data_(data) {}

  const Allocator* allocator_ = nullptr;
  void* data_ = nullptr;
};

// The session's allocator for the device of a kernel. It must outlive its memory.
class Allocator {
 public:
  Allocator(const OrtApi& api, const OrtKernelInfo* info);
  Allocator(const Allocator&) = delete;
  Allocator& operator=(const Allocator&) = delete;
  ~Allocator() { api_.ReleaseAllocator(allocator_); }

  // Allocates memory for longer than a run.
  Memory allocate(std::size_t bytes) const;
  // Allocates memory for one run on a device with streams. It may be freed as soon as the work is enqueued: what gets it next waits for the run's stream.
  Memory allocate(const OrtKernelContext* context, std::size_t bytes) const;

 private:
  friend class Memory;

  const OrtApi& api_;
  OrtAllocator* allocator_ = nullptr;
};

// A node's attributes and constant inputs, as available when a kernel is created or shapes are inferred.
class Attributes {
 public:
  Attributes(const OrtApi& api, const OrtKernelInfo* info) : api_(api), info_(info) {}
  Attributes(const OrtApi& api, const OrtShapeInferContext* context) : api_(api), context_(context) {}

  // These throw Error if the attribute is missing or has another type.
  float real(const char* name) const;
  std::int64_t integer(const char* name) const;
  std::vector<std::int64_t> integers(const char* name) const;
  // Returns an input without data if the input is not constant, and always during shape inference. The session owns the data.
  Input constant(std::size_t input) const;
  // Returns the allocator of the kernel's device, or null during shape inference.
  std::unique_ptr<Allocator> allocator() const;

 private:
  void read(const char* name, OrtOpAttrType type, void* data, std::size_t bytes, std::size_t* got) const;

  const OrtApi& api_;
  const OrtKernelInfo* info_ = nullptr;
  const OrtShapeInferContext* context_ = nullptr;
};

// Returns the number of logical processors, at least 1. ONNX Runtime does not tell kernels the session's number of threads, which may be smaller.
std::int64_t hardware_threads();

// Temporary memory on the CPU from the session's allocator, for one kernel run.
class Scratch {
 public:
  Scratch(const OrtApi& api, const OrtKernelContext* context, std::size_t bytes);
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch();

  void* data() const { return data_; }  // aligned to 64 bytes

 private:
  const OrtApi& api_;
  OrtAllocator* allocator_ = nullptr;
  void* allocated_ = nullptr;
  void* data_ = nullptr;
};

// One kernel run: its inputs, outputs, scratch memory, threads and CUDA stream.
class Context {
 public:
  Context(const OrtApi& api, OrtKernelContext* context) : api_(api), context_(context) {}

  Input input(std::size_t index) const;
  // Allocates an output and returns its data, or null if the node does not have this optional output.
  template <typename T>
  T* output(std::size_t index, const Shape& shape) {
    return static_cast<T*>(raw_output(index, shape));
  }
  Scratch scratch(std::size_t bytes) const { return Scratch(api_, context_, bytes); }
  Memory scratch(const Allocator& allocator, std::size_t bytes) const { return allocator.allocate(context_, bytes); }
  // Returns the session's cudaStream_t. Kernels are enqueued on it; nothing here synchronizes.
  void* cuda_stream() const;

  // Runs body(begin, end) over [0, count) on ONNX Runtime's threads, in pieces of `grain`.
  template <typename Body>
  void parallel(std::int64_t count, std::int64_t grain, const Body& body) const {
    if (count <= grain) {
      if (count > 0) body(std::int64_t{0}, count);
      return;
    }
    struct Job {
      const Body& body;
      std::int64_t count, grain;
    } job{body, count, grain};
    parallel_for(
        [](void* data, std::size_t piece) {
          const Job& job = *static_cast<const Job*>(data);
          const std::int64_t begin = static_cast<std::int64_t>(piece) * job.grain, end = begin + job.grain;
          job.body(begin, end < job.count ? end : job.count);
        },
        static_cast<std::size_t>((count + grain - 1) / grain), &job);
  }

 private:
  void* raw_output(std::size_t index, const Shape& shape);
  void parallel_for(void (*run)(void*, std::size_t), std::size_t pieces, void* data) const;

  const OrtApi& api_;
  OrtKernelContext* context_;
};

}  // namespace scm
