// 3x3 convolutions in float32 on any processor by Winograd's minimal filtering F(4x4, 3x3) (Lavin and Gray, arXiv 1509.09308).
//
// An output tile of 4x4 pixels takes an input tile of 6x6 and, instead of 144 products per pair of channels, 36:
//   y = A^T [sum over c of (G w G^T) * (B^T x B)] A,
// with an elementwise product. The sums over the input channels are thus 36 matrix products, of [tiles, channels] by [channels, outputs].
//
// A run takes the tiles of all samples in groups. There are two phases per group, which several threads may share:
//   transform   V = B^T x B for some tiles of the group
//   multiply    a piece of work: a chunk of the tiles by a block of output channels
// The weights are read where they are, [out, in, 3, 3], and transformed while they are read, so they take no memory besides the session's copy.
//
// The terms of a sum are always added in the order of the input channels, so a result depends neither on the batch nor on the division of the work. It is also
// the same for all instruction sets with fused multiply-adds.
//
// The transforms would spread NaN and infinity over a tile. If an output of a tile is not finite, its group of kDecided channels is computed again as the sum
// over the taps. The groups do not depend on the division of the work either.
#pragma once

#include "common/kernel.h"

namespace scm::winograd {

constexpr std::int64_t kTile = 4;    // side of an output tile, in pixels
constexpr std::int64_t kPoints = 36; // elements of a transformed tile
constexpr std::int64_t kTaps = 9;
constexpr std::int64_t kBlock = 32;  // most output channels of a piece
constexpr std::int64_t kStep = 16;   // input channels of a chunk of weights
// Output channels of a group that is finite or computed again. It starts at a multiple of 16 and is a whole number of vectors of each instruction set.
constexpr std::int64_t kDecided = 16;

// y[n, h, w, o] = bias[o] + sum over i, j, c of x[n, h + i - 1, w + j - 1, c] * weight[o, c, i, j], with zero padding.
struct Sizes {
  std::int64_t samples, height, width, in, out;
};

// How a run divides its work. The results do not depend on it.
struct Plan {
  std::int64_t group;  // tiles of a group
  std::int64_t chunk;  // tiles of a piece
  std::int64_t block;  // output channels of a piece: 16 or 32
  // Input channels whose transformed weights are kept, a multiple of kStep; or 0: weights are transformed in registers, for a few tiles at a time.
  std::int64_t depth;
  bool separate;  // a thread does both phases for a group of its own, and chunk = group; else all threads share a group
};

// The operation that follows. It reads the convolution's results rounded to T, as an operator of its own would.
enum class Epilogue {
  none,
  modulate_silu,  // ModulateSiLU by `scales`
  mp_sum,         // MPSum of `skip` and the results
};

template <typename T>
struct Params {
  const T* x;       // [samples, height, width, in], or [samples, in, height, width] if channels_first
  const T* weight;  // [out, in, 3, 3]
  const T* bias;    // [out], or null
  T* y;             // as x, with `out` channels
  Sizes sizes;
  bool channels_first;
  Epilogue epilogue;           // `none` if channels_first
  const T* scales;             // modulate_silu: that of sample n and channel o is scales[n * scales_stride + o]
  std::int64_t scales_stride;
  const T* skip;               // mp_sum: as y; may be y
  float weight_skip, weight_sum, clip;
  Plan plan;
  std::int64_t first, count;  // the group: tiles [first, first + count)
  float* v;                   // [steps of input channels, kPoints, group, kStep], with padding between the points
};

// Floats between the points of V and of a piece's buffers: without them the points would be a multiple of 4 KiB apart, and share a set of the L1 cache.
constexpr std::int64_t kPad = 16;

constexpr std::int64_t kChunkSize = kTaps * kStep * kBlock, kResultsSize = 4 * kTile * kTile * kBlock;  // buffers of a piece, in floats

template <typename T>
struct Kernels {
  void (*transform)(const Params<T>&, std::int64_t begin, std::int64_t end, float* scratch);  // tiles [begin, end) of the group
  void (*multiply)(const Params<T>&, std::int64_t piece, float* scratch);
};

inline namespace SCM_ISA {

inline std::int64_t round_up(std::int64_t value, std::int64_t to) { return (value + to - 1) / to * to; }

// Maps of one pixel take no transforms: only the middle tap reaches them, and point 0 is the pixel itself.
inline bool is_pixel(const Sizes& s) { return s.height == 1 && s.width == 1; }

inline std::int64_t tiles_down(const Sizes& s) { return (s.height + kTile - 1) / kTile; }
inline std::int64_t tiles_across(const Sizes& s) { return (s.width + kTile - 1) / kTile; }
inline std::int64_t total_tiles(const Sizes& s) { return s.samples * tiles_down(s) * tiles_across(s); }

// Sizes in floats: of V, and of a thread's scratch memory in each phase.
inline std::int64_t v_size(const Sizes& s, const Plan& plan) { return round_up(s.in, kStep) / kStep * kPoints * (plan.group * kStep + kPad); }
inline std::int64_t u_size(const Plan& plan) { return plan.depth == 0 ? 0 : kPoints * (plan.depth * plan.block + kPad); }
inline std::int64_t m_size(const Plan& plan) { return kPoints * (plan.chunk * plan.block + kPad); }
inline std::int64_t transform_scratch(const Sizes& s) { return 6 * (tiles_across(s) * kTile + 2 + 16) * 16; }
inline std::int64_t multiply_scratch(const Plan& plan) { return u_size(plan) + m_size(plan) + kChunkSize + kResultsSize; }

inline std::int64_t blocks(const Sizes& s, const Plan& plan) { return (s.out + plan.block - 1) / plan.block; }
inline std::int64_t pieces(const Sizes& s, const Plan& plan, std::int64_t tiles) { return blocks(s, plan) * ((tiles + plan.chunk - 1) / plan.chunk); }

}  // namespace SCM_ISA

template <typename T>
Kernels<T> kernels_generic();
template <typename T>
Kernels<T> kernels_v3();
template <typename T>
Kernels<T> kernels_v4();

}  // namespace scm::winograd
