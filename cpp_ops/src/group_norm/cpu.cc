#include "common/moments.h"
#include "group_norm/op.h"

namespace scm::group_norm {
namespace {

// What is applied to the pixels of a channel, in the order of the function body: with factors and summands combined, an infinite factor would make them NaN.
struct Affine {
  float base, offset, inverse, scale, bias, gain, shift;

  inline Vector apply(Vector x) const { return ((x - base - offset) * inverse * scale + bias) * gain + shift; }
};

template <bool kSiLU, typename T>
void normalize(const T* x, T* y, std::int64_t pixels, const Affine& affine) {
  const auto apply = [=](Vector v) { return kSiLU ? silu(affine.apply(v)) : affine.apply(v); };
  std::int64_t i = 0;
  for (; i + kLanes <= pixels; i += kLanes) store(y + i, apply(load(x + i)));
  if (i < pixels) store_part(y + i, apply(load_part(x + i, pixels - i)), pixels - i);
}

}  // namespace

template <typename T>
void SCM_CPU(const Params<T>& p, std::int64_t begin, std::int64_t end) {
  const std::int64_t channels = p.group_channels();
  for (std::int64_t unit = begin; unit < end; ++unit) {
    const std::int64_t sample = unit / p.groups, first = unit % p.groups * channels, start = (sample * p.channels + first) * p.pixels;
    const Moments moments = moments_of(p.x + start, channels * p.pixels);
    const float inverse = 1 / __builtin_sqrtf(moments.variance() + p.eps);
    for (std::int64_t c = 0; c < channels; ++c) {
      Affine affine{moments.base, moments.offset, inverse, p.scale[first + c], p.bias[first + c], 1, 0};
      if (p.modulation) {
        const T* modulation = p.modulation + sample * 2 * p.channels + first + c;
        affine.gain = 1 + to_float(modulation[0]);
        affine.shift = to_float(modulation[p.channels]);
      }
      const std::int64_t channel = start + c * p.pixels;
      (p.silu ? normalize<true, T> : normalize<false, T>)(p.x + channel, p.y + channel, p.pixels, affine);
    }
  }
}
SCM_INSTANTIATE_CPU

}  // namespace scm::group_norm
