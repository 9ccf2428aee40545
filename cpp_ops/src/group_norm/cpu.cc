#include "common/moments.h"
#include "group_norm/op.h"

namespace scm::group_norm {
namespace {

// Computes y = (x - mean) * factor + shift for the pixels of a channel, and silu of that.
template <bool kSiLU, typename T>
void normalize(const T* x, T* y, std::int64_t pixels, float mean, float factor, float shift) {
  const auto apply = [=](Vector v) {
    const Vector normalized = (v - mean) * factor + shift;
    return kSiLU ? silu(normalized) : normalized;
  };
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
      float factor = inverse * p.scale[first + c], shift = p.bias[first + c];
      if (p.modulation) {
        const T* modulation = p.modulation + sample * 2 * p.channels + first + c;
        const float scale = 1 + to_float(modulation[0]);
        factor *= scale;
        shift = shift * scale + to_float(modulation[p.channels]);
      }
      const std::int64_t channel = start + c * p.pixels;
      (p.silu ? normalize<true, T> : normalize<false, T>)(p.x + channel, p.y + channel, p.pixels, moments.mean, factor, shift);
    }
  }
}
SCM_INSTANTIATE_CPU

}  // namespace scm::group_norm
