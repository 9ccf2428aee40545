// The operators of the domain `scm`, version 1 (docs/custom-ops.md). Each function adds one of them, for all its devices and element types.
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

// Of the domains `scm.channels_last` and `scm.channels_first`, version 1, to float32's accuracy (`split_bf16`) or to bfloat16's; and whether this processor can.
template <bool kSplitBf16>
void add_channels_last(CustomOps& ops, const OrtApi& api);
template <bool kSplitBf16>
void add_channels_first(CustomOps& ops, const OrtApi& api);
bool has_dense_kernels(bool split_bf16);

}  // namespace scm
