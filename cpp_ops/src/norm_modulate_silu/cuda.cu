// z = mp_silu(pixel_norm(y) * pixel_norm(s) + pixel_norm(b)), with one row of s and one of b per sample. blockIdx.y is the sample. 1 to 32 lanes of a warp hold
// a row of y in registers, from the sum of squares to the result; longer rows are read twice. The same lanes compute the norms of s and b once for all their
// rows, and read s and b from the cache again for each row.
#include "common/cuda.h"
#include "norm_modulate_silu/op.h"

namespace scm::norm_modulate_silu {
namespace {

// A sample's modulation: its two rows and their normalization factors.
template <typename T, int kWidth>
struct Modulation {
  const T *scale, *shift;
  float inverse_channels, norm_scale, norm_shift;

  __device__ __forceinline__ Modulation(const Params<T>& p, std::int64_t sample, int lane, int lanes)
      : scale(p.modulation + sample * p.modulation_stride), shift(scale + p.channels) {
    inverse_channels = __fdividef(1.0f, static_cast<float>(p.channels));
    float squares_scale = 0, squares_shift = 0;
    for (std::int64_t v = lane; v < p.channels / kWidth; v += lanes) {
      squares_scale += sum_of_squares(load<kWidth>(scale, v));
      squares_shift += sum_of_squares(load<kWidth>(shift, v));
    }
    norm_scale = norm_factor(group_sum(squares_scale, lanes), inverse_channels, p.eps);
    norm_shift = norm_factor(group_sum(squares_shift, lanes), inverse_channels, p.eps);
  }

  // Returns vector v of z. `factor` is the product of the row's normalization factor and norm_scale.
  __device__ __forceinline__ Vector<T, kWidth> apply(std::int64_t v, const Vector<T, kWidth>& y, float factor) const {
    const Vector<T, kWidth> s = load<kWidth>(scale, v), b = load<kWidth>(shift, v);
    return vector_of<T, kWidth>([&](int c) { return activate(y[c] * factor * s[c] + b[c] * norm_shift); });
  }
};

template <typename T, int kWidth, int kVectors>
__global__ void __launch_bounds__(kThreads) kernel(const Params<T> p, int lanes_of_row) {
  const int lanes = kWidth > 1 && kVectors > 2 ? static_cast<int>(kWarp) : lanes_of_row;  // a compile-time constant needs fewer address registers
  const int vectors = static_cast<int>(p.channels / kWidth), lane = static_cast<int>(threadIdx.x) & (lanes - 1);
  const std::int64_t rows = kThreads / lanes;  // per block
  for (std::int64_t sample = blockIdx.y; sample < p.samples; sample += gridDim.y) {
    const Modulation<T, kWidth> modulation(p, sample, lane, lanes);
    for (std::int64_t first = blockIdx.x * rows; first < p.pixels; first += gridDim.x * rows) {
      const std::int64_t pixel = first + threadIdx.x / lanes, start = (sample * p.pixels + pixel) * vectors + lane;
      const int count = pixel < p.pixels ? vectors : 0;  // lanes without a row must execute group_sum too
      Vector<T, kWidth> y[kVectors];
      float sum = 0;
#pragma unroll
      for (int j = 0; j < kVectors; ++j) {
        if (lane + j * lanes < count) y[j] = load<kWidth>(p.y, start + j * lanes);
      }
#pragma unroll
      for (int j = 0; j < kVectors; ++j) {
        if (lane + j * lanes < count) sum += sum_of_squares(y[j]);
      }
      const float factor = norm_factor(group_sum(sum, lanes), modulation.inverse_channels, p.eps) * modulation.norm_scale;
#pragma unroll
      for (int j = 0; j < kVectors; ++j) {
        if (lane + j * lanes < count) store(p.z, start + j * lanes, modulation.apply(lane + j * lanes, y[j], factor));
      }
    }
  }
}

// For rows that do not fit into registers: one warp per row.
template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads) long_rows(const Params<T> p) {
  const std::int64_t vectors = p.channels / kWidth, warps = kThreads / kWarp;
  const int lane = threadIdx.x % kWarp;
  for (std::int64_t sample = blockIdx.y; sample < p.samples; sample += gridDim.y) {
    const Modulation<T, kWidth> modulation(p, sample, lane, kWarp);
    for (std::int64_t pixel = blockIdx.x * warps + threadIdx.x / kWarp; pixel < p.pixels; pixel += gridDim.x * warps) {
      const std::int64_t start = (sample * p.pixels + pixel) * vectors;
      float sum = 0;
#pragma unroll 4
      for (std::int64_t v = lane; v < vectors; v += kWarp) sum += sum_of_squares(load<kWidth>(p.y, start + v));
      const float factor = norm_factor(group_sum(sum, kWarp), modulation.inverse_channels, p.eps) * modulation.norm_scale;
      for (std::int64_t v = lane; v < vectors; v += kWarp) store(p.z, start + v, modulation.apply(v, load<kWidth>(p.y, start + v), factor));
    }
  }
}

// Enough blocks to fill the largest GPUs several times. More blocks would compute the modulation's norms more often.
constexpr std::int64_t kBlocks = 4096;

dim3 grid(std::int64_t pixels, std::int64_t rows, std::int64_t samples) {
  const std::int64_t most = ceil_div(kBlocks, samples), needed = ceil_div(pixels, rows);
  return grid_of(needed < most ? needed : most, 1, samples);
}

}  // namespace

template <typename T>
const char* cuda(const Params<T>& p, void* stream) {
  const bool wide = p.channels % kVectorWidth<T> == 0 && p.modulation_stride % kVectorWidth<T> == 0 && aligned(16, p.y, p.modulation, p.z);
  return with_row_shape<T>(p.channels, wide, [&](auto width, auto per_lane) {
    if constexpr (per_lane.value == 0) {
      return launch(long_rows<T, width.value>, grid(p.pixels, kThreads / kWarp, p.samples), kThreads, stream, p);
    } else {
      const int lanes = lanes_per_row(p.channels / width.value, per_lane.value);
      return launch(kernel<T, width.value, per_lane.value>, grid(p.pixels, kThreads / lanes, p.samples), kThreads, stream, p, lanes);
    }
  });
}
SCM_INSTANTIATE_CUDA

}  // namespace scm::norm_modulate_silu
