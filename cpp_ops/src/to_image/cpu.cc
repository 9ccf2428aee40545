#include "common/math.h"
#include "to_image/op.h"

namespace scm::to_image {

namespace {

constexpr std::int64_t kTile = 256;  // pixels

// Writes one channel of a tile: converts it contiguously, which vectorizes, then interleaves it with the other channels.
template <typename T>
void write_channel(const T* x, std::uint8_t* image, std::int64_t channels, std::int64_t count, float scale, float offset) {
  std::uint8_t levels[kTile];
#pragma omp simd
  for (std::int64_t i = 0; i < count; ++i) levels[i] = to_uint8(rounded_product(to_float(x[i]), scale) + offset);
  for (std::int64_t i = 0; i < count; ++i) image[i * channels] = levels[i];
}

}  // namespace

template <typename T>
void SCM_CPU(const Params<T>& p, std::int64_t begin, std::int64_t end) {
  while (begin < end) {  // pixels of one sample at a time
    const std::int64_t sample = begin / p.pixels, sample_end = (sample + 1) * p.pixels, limit = end < sample_end ? end : sample_end;
    const std::int64_t stop = limit - begin < kTile ? limit : begin + kTile;
    const T* x = p.x + sample * p.channels * p.pixels + (begin - sample * p.pixels);
    for (std::int64_t c = 0; c < p.channels; ++c) write_channel(x + c * p.pixels, p.image + begin * p.channels + c, p.channels, stop - begin, p.scale, p.offset);
    begin = stop;
  }
}
SCM_INSTANTIATE_CPU

}  // namespace scm::to_image
