#include "common/moments.h"
#include "layer_norm/op.h"

namespace scm::layer_norm {
namespace {

// Loads all lanes, or the first `count` of them.
template <bool kPart, typename T>
inline Vector load_lanes(const T* x, std::int64_t count) {
  return kPart ? load_part(x, count) : load(x);
}

// Scale and shift of a sample's rows. They stay in the L1 cache.
template <typename T>
struct Affine {
  const float *scale, *bias;
  const T *modulation_scale, *modulation_shift;

  template <bool kPart>
  inline Vector apply(Vector x, std::int64_t c, std::int64_t count) const {
    if (scale) x = x * load_lanes<kPart>(scale + c, count);
    if (bias) x = x + load_lanes<kPart>(bias + c, count);
    if (modulation_scale) x = x * (1.0f + load_lanes<kPart>(modulation_scale + c, count)) + load_lanes<kPart>(modulation_shift + c, count);
    return x;
  }
};

}  // namespace

template <typename T>
void SCM_CPU(const Params<T>& p, std::int64_t begin, std::int64_t end) {
  const std::int64_t channels = p.channels;
  for (std::int64_t row = begin; row < end; ++row) {
    const std::int64_t sample = row / p.rows * channels;
    const Affine<T> affine{p.scale, p.bias, p.modulation_scale ? p.modulation_scale + sample : nullptr, p.modulation_scale ? p.modulation_shift + sample : nullptr};
    const T* x = p.x + row * channels;
    T* y = p.y + row * channels;
    float mean = 0, variance = 0;
    if (p.subtracts_mean) {
      const Moments moments = moments_of(x, channels);
      mean = moments.mean;
      variance = moments.variance();
    } else {
      variance = sum_over(x, channels, [](Vector v) { return v * v; }) / static_cast<float>(channels);
    }
    const float inverse = 1 / __builtin_sqrtf(variance + p.eps);
    std::int64_t c = 0;
    for (; c + kLanes <= channels; c += kLanes) store(y + c, affine.template apply<false>((load(x + c) - mean) * inverse, c, kLanes));
    if (c < channels) store_part(y + c, affine.template apply<true>((load_part(x + c, channels - c) - mean) * inverse, c, channels - c), channels - c);
  }
}
SCM_INSTANTIATE_CPU

}  // namespace scm::layer_norm
