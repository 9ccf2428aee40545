// CosineAttention (EDM2, arXiv 2312.02696, configuration G): q, k and v pixel-normalized per head, y = softmax(q k^T / sqrt(head_size)) v.
#pragma once

#include "common/kernel.h"

namespace scm::cosine_attention {

template <typename T>
struct Params {
  const T* qkv;  // [samples, length, 3, heads, head_size]
  T* y;          // [samples, length, heads, head_size]
  std::int64_t samples, length, heads, head_size;
  float eps;
  bool* out_of_memory;  // CPU: set to true if a thread fails to allocate scratch memory; null on CUDA
};

// The CPU kernel's unit of work is a block of kQueries queries of one head of one sample.
constexpr std::int64_t kQueries = 64;
static constexpr std::int64_t query_blocks(std::int64_t length) { return (length + kQueries - 1) / kQueries; }

SCM_DECLARE_KERNELS

}  // namespace scm::cosine_attention
