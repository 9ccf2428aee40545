// The operators of the library (docs/custom-ops.md). Each function adds one operator of the domain `scm`, version 1, for all its devices and element types.
#pragma once

#include "common/custom_op.h"

namespace scm {

void add_pixel_norm(CustomOps& ops, const OrtApi& api);
void add_mp_silu(CustomOps& ops, const OrtApi& api);
void add_mp_sum(CustomOps& ops, const OrtApi& api);
void add_mp_cat(CustomOps& ops, const OrtApi& api);
void add_modulate_silu(CustomOps& ops, const OrtApi& api);
void add_norm_modulate_silu(CustomOps& ops, const OrtApi& api);
void add_cosine_attention(CustomOps& ops, const OrtApi& api);
void add_consistency_step(CustomOps& ops, const OrtApi& api);
void add_philox_normal(CustomOps& ops, const OrtApi& api);
void add_to_image(CustomOps& ops, const OrtApi& api);

// These add the convolutions of the domains `scm.channels_last` and `scm.channels_first` and layers of `scm.fused`, version 1, for the CPU, with float32
// arithmetic.
void add_float32_channels_last(CustomOps& ops, const OrtApi& api);
void add_float32_channels_first(CustomOps& ops, const OrtApi& api);
void add_float32_fused(CustomOps& ops, const OrtApi& api);
// True if this processor has the instructions with which those kernels are fast.
bool has_float32_kernels();

// These add the operators of the domains `scm.channels_last` and `scm.channels_first`, version 1: convolutions and matrix products that multiply bfloat16. With
// split_bf16 every float32 is split into two bfloat16, which keeps about 16 bits of precision; without it, bfloat16's 8.
template <bool kSplitBf16>
void add_channels_last(CustomOps& ops, const OrtApi& api);
template <bool kSplitBf16>
void add_channels_first(CustomOps& ops, const OrtApi& api);
// True if this processor, and the operating system, support those kernels.
bool has_dense_kernels(bool split_bf16);

// These add operators of the domain `scm.channels_last` and the operators of the domain `scm.fused`, version 1, for CUDA, float16 and bfloat16.
void add_convolution(CustomOps& ops, const OrtApi& api);
void add_fused(CustomOps& ops, const OrtApi& api);

}  // namespace scm
