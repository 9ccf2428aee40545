// image = round(clamp(x * scale + offset, 0, 255)), channels first to channels last. blockIdx.y is the sample. For 1 and 3 channels a thread converts four
// neighboring pixels: one load per channel, and stores of whole words. Otherwise it converts one pixel, and the cache merges a warp's byte stores.
#include "common/cuda.h"
#include "to_image/op.h"

namespace scm::to_image {
namespace {

constexpr int kPixels = 4;

template <typename T, int kChannels>
__global__ void __launch_bounds__(kThreads) four_pixels(const Params<T> p) {
  struct Levels {
    Vector<T, kPixels> channels[kChannels];
  };
  for (std::int64_t sample = blockIdx.y; sample < p.samples; sample += gridDim.y) {
    const T* x = p.x + sample * kChannels * p.pixels;
    std::uint8_t* image = p.image + sample * kChannels * p.pixels;
    for_each(
        p.pixels / kPixels,
        [&](std::int64_t i) {
          Levels in;
#pragma unroll
          for (int c = 0; c < kChannels; ++c) in.channels[c] = load<kPixels>(x + c * p.pixels, i);
          return in;
        },
        [&](std::int64_t i, const Levels& in) {
#pragma unroll
          for (int word = 0; word < kChannels; ++word) {
            std::uint32_t bytes = 0;
#pragma unroll
            for (int byte = 0; byte < 4; ++byte) {
              const int index = word * 4 + byte;  // among the bytes of the four pixels
              bytes |= std::uint32_t{to_uint8(rounded_product(in.channels[index % kChannels][index / kChannels], p.scale) + p.offset)} << (8 * byte);
            }
            reinterpret_cast<std::uint32_t*>(image)[i * kChannels + word] = bytes;
          }
        });
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) one_pixel(const Params<T> p) {
  for (std::int64_t sample = blockIdx.y; sample < p.samples; sample += gridDim.y) {
    const T* x = p.x + sample * p.channels * p.pixels;
    std::uint8_t* image = p.image + sample * p.channels * p.pixels;
    for (std::int64_t pixel = std::int64_t{blockIdx.x} * kThreads + threadIdx.x; pixel < p.pixels; pixel += std::int64_t{gridDim.x} * kThreads) {
      for (std::int64_t c = 0; c < p.channels; ++c) image[pixel * p.channels + c] = to_uint8(rounded_product(to_float(x[c * p.pixels + pixel]), p.scale) + p.offset);
    }
  }
}

}  // namespace

template <typename T>
const char* cuda(const Params<T>& p, void* stream) {
  if ((p.channels == 1 || p.channels == 3) && p.pixels % kPixels == 0 && aligned(kPixels * sizeof(T), p.x) && aligned(4, p.image)) {
    return launch(p.channels == 1 ? four_pixels<T, 1> : four_pixels<T, 3>, grid_of(p.pixels / kPixels, kElementsPerBlock, p.samples), kThreads, stream, p);
  }
  return launch(one_pixel<T>, grid_of(p.pixels, kThreads, p.samples), kThreads, stream, p);
}
SCM_INSTANTIATE_CUDA

}  // namespace scm::to_image
