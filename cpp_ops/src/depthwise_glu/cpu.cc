// A unit of work is one channel of the output of one sample. Three activated rows of both input channels are kept in a ring, so each input is activated once.
// Wide maps are processed in strips of kStrip columns.
#include "common/math.h"
#include "depthwise_glu/op.h"

namespace scm::depthwise_glu {
namespace {

constexpr int kBlock = 16;            // columns per iteration: whole vectors at every level
constexpr std::int64_t kStrip = 512;  // a multiple of kBlock; the rows of a strip fit into the L1 cache
constexpr std::int64_t kRow = kStrip + 2;

// Activated rows of a strip, with one column to its left and at least one to its right.
struct Strip {
  float rows[2][3][kRow];
  float zeros[kRow];
};

// Computes row = silu(x) for `count` elements, zeros up to a multiple of kBlock, and the neighboring columns. `before` and `after` tell whether the map continues.
template <typename T>
inline void activate_row(const T* x, std::int64_t count, std::int64_t padded, bool before, bool after, float* row) {
#pragma omp simd
  for (std::int64_t i = 0; i < count; ++i) row[i + 1] = silu(to_float(x[i]));
  for (std::int64_t i = count; i <= padded; ++i) row[i + 1] = 0;
  row[0] = before ? silu(to_float(x[-1])) : 0;
  if (after) row[count + 1] = silu(to_float(x[count]));
}

struct Filter {
  float taps[9], bias;
};

template <typename T>
inline Filter filter_of(const Params<T>& p, std::int64_t channel) {
  Filter filter;
  for (int i = 0; i < 9; ++i) filter.taps[i] = to_float(p.w[channel * 9 + i]);
  filter.bias = to_float(p.b[channel]);
  return filter;
}

// Computes kBlock columns of a convolution. The rows start one column to the left of the first.
inline void convolve(const Filter& filter, const float* above, const float* row, const float* below, float* y) {
#pragma omp simd
  for (int i = 0; i < kBlock; ++i) {
    const float* const w = filter.taps;
    const float top = w[0] * above[i] + w[1] * above[i + 1] + w[2] * above[i + 2], middle = w[3] * row[i] + w[4] * row[i + 1] + w[5] * row[i + 2];
    y[i] = top + middle + (w[6] * below[i] + w[7] * below[i + 1] + w[8] * below[i + 2] + filter.bias);
  }
}

}  // namespace

template <typename T>
void SCM_CPU(const Params<T>& p, std::int64_t begin, std::int64_t end) {
  Strip strip;
  for (float& zero : strip.zeros) zero = 0;
  const std::int64_t plane = p.height * p.width;
  for (std::int64_t unit = begin; unit < end; ++unit) {
    const std::int64_t sample = unit / p.channels, channel = unit % p.channels;
    const T* const x[2] = {p.x + (2 * sample * p.channels + channel) * plane, p.x + ((2 * sample + 1) * p.channels + channel) * plane};
    const Filter filters[2] = {filter_of(p, channel), filter_of(p, p.channels + channel)};
    for (std::int64_t first = 0; first < p.width; first += kStrip) {
      const std::int64_t count = p.width - first < kStrip ? p.width - first : kStrip, padded = (count + kBlock - 1) / kBlock * kBlock;
      const auto activate = [&](std::int64_t y) {
        for (int half = 0; half < 2; ++half) {
          activate_row(x[half] + y * p.width + first, count, padded, first > 0, first + count < p.width, strip.rows[half][y % 3]);
        }
      };
      activate(0);
      for (std::int64_t y = 0; y < p.height; ++y) {
        if (y + 1 < p.height) activate(y + 1);
        const float* rows[2][3];
        for (int half = 0; half < 2; ++half) {
          rows[half][0] = y > 0 ? strip.rows[half][(y - 1) % 3] : strip.zeros;
          rows[half][1] = strip.rows[half][y % 3];
          rows[half][2] = y + 1 < p.height ? strip.rows[half][(y + 1) % 3] : strip.zeros;
        }
        T* const out = p.y + unit * plane + y * p.width + first;
        for (std::int64_t i = 0; i < padded; i += kBlock) {
          float a[kBlock], g[kBlock];
          T gated[kBlock];
          convolve(filters[0], rows[0][0] + i, rows[0][1] + i, rows[0][2] + i, a);
          convolve(filters[1], rows[1][0] + i, rows[1][1] + i, rows[1][2] + i, g);
#pragma omp simd
          for (int j = 0; j < kBlock; ++j) gated[j] = from_float<T>(a[j] * silu(g[j]));
          if (i + kBlock <= count) {
            __builtin_memcpy(out + i, gated, sizeof gated);
          } else {
            for (std::int64_t j = i; j < count; ++j) out[j] = gated[j - i];
          }
        }
      }
    }
  }
}
SCM_INSTANTIATE_CPU

}  // namespace scm::depthwise_glu
