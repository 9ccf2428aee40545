#include "common/math.h"
#include "mp_cat/op.h"

namespace scm::mp_cat {
namespace {

template <typename T>
void copy(const T* x, T* y, T* activated, std::int64_t channels, float scale) {
#pragma omp simd
  for (std::int64_t c = 0; c < channels; ++c) y[c] = from_float<T>(to_float(x[c]) * scale);
  if (!activated) return;
#pragma omp simd
  for (std::int64_t c = 0; c < channels; ++c) activated[c] = from_float<T>(activate(to_float(y[c])));
}

}  // namespace

template <typename T>
void SCM_CPU(const Params<T>& p, std::int64_t begin, std::int64_t end) {
  for (std::int64_t row = begin; row < end; ++row) {
    const std::int64_t offset = row * (p.channels_a + p.channels_b);
    T* activated = p.activated ? p.activated + offset : nullptr;
    copy(p.a + row * p.channels_a, p.y + offset, activated, p.channels_a, p.scale_a);
    copy(p.b + row * p.channels_b, p.y + offset + p.channels_a, activated ? activated + p.channels_a : nullptr, p.channels_b, p.scale_b);
  }
}
SCM_INSTANTIATE_CPU

}  // namespace scm::mp_cat
