// A thin layer over ONNX Runtime's C API: attributes, tensors and threads for the operators, and no C++ ABI of ONNX Runtime.
#pragma once

#include <onnxruntime_c_api.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "common/shape.h"

#ifndef SCM_OPS_ORT_API
#define SCM_OPS_ORT_API 18  // the first with GetMayInplace; every later ONNX Runtime serves it too
#endif

namespace scm {

// Throws Error with ONNX Runtime's message unless the status is null.
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

// What is known of a node while a kernel is made or shapes are inferred: its attributes, and inputs that never change.
class Attributes {
 public:
  Attributes(const OrtApi& api, const OrtKernelInfo* info) : api_(api), info_(info) {}
  Attributes(const OrtApi& api, const OrtShapeInferContext* context) : api_(api), context_(context) {}

  float real(const char* name) const;
  std::int64_t integer(const char* name) const;
  std::vector<std::int64_t> integers(const char* name) const;  // all three throw Error where it is missing or of another type
  // Has no data where shapes are inferred, or where the input is no constant. The data belong to the session.
  Input constant(std::size_t input) const;

 private:
  void read(const char* name, OrtOpAttrType type, void* data, std::size_t bytes, std::size_t* got) const;

  const OrtApi& api_;
  const OrtKernelInfo* info_ = nullptr;
  const OrtShapeInferContext* context_ = nullptr;
};

// Memory of the session's own allocator, for one run of a kernel.
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

// One run of a kernel.
class Context {
 public:
  Context(const OrtApi& api, OrtKernelContext* context) : api_(api), context_(context) {}

  Input input(std::size_t index) const;
  // Allocates the output and returns its data, or null if it is optional and nobody reads it.
  template <typename T>
  T* output(std::size_t index, const Shape& shape) {
    return static_cast<T*>(raw_output(index, shape));
  }
  Scratch scratch(std::size_t bytes) const { return Scratch(api_, context_, bytes); }
  // cudaStream_t of the session; kernels are put on it and never waited for.
  void* cuda_stream() const;

  // Runs body(begin, end) over [0, count) on ONNX Runtime's own threads, in pieces of at least `grain`.
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
