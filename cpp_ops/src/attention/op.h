// Attention and MaskedAttention: y = softmax(scale q k^T + mask) v per head, without the matrix of scores. Several heads of q may share one of k and v.
#pragma once

#include "common/kernel.h"

namespace scm::attention {

template <typename T>
struct Params {
  const T* q;     // [samples, queries, heads, size]
  const T* k;     // [samples, keys, key_heads, size]
  const T* v;     // [samples, keys, key_heads, value_size]
  const T* mask;  // null, or element (sample, head, query, key) at sample * mask_strides[0] + head * mask_strides[1] + query * mask_strides[2] + key
  T* y;           // [samples, queries, heads, value_size]
  std::int64_t samples, queries, keys, heads, key_heads, size, value_size;
  std::int64_t mask_strides[3];  // 0 for an axis on which the mask is broadcast
  float scale;
  bool* out_of_memory;  // CPU: set to true if a thread fails to allocate scratch memory; null on CUDA
};

// The CPU kernel's unit of work is a block of kQueries queries of one head of one sample.
constexpr std::int64_t kQueries = 64;
static constexpr std::int64_t query_blocks(std::int64_t queries) { return (queries + kQueries - 1) / kQueries; }

SCM_DECLARE_KERNELS

}  // namespace scm::attention
