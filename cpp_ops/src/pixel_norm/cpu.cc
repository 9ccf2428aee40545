#include "common/math.h"
#include "pixel_norm/op.h"

namespace scm::pixel_norm {

template <typename T>
void SCM_CPU(const Params<T>& p, std::int64_t begin, std::int64_t end) {
  for (std::int64_t row = begin; row < end; ++row) {
    const T* x = p.x + row * p.channels;
    T* y = p.y + row * p.channels;
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (std::int64_t c = 0; c < p.channels; ++c) sum += to_float(x[c]) * to_float(x[c]);
    const float scale = inverse_norm(sum, static_cast<float>(p.channels), p.eps);
#pragma omp simd
    for (std::int64_t c = 0; c < p.channels; ++c) y[c] = from_float<T>(to_float(x[c]) * scale);
    if (!p.activated) continue;
    T* activated = p.activated + row * p.channels;
#pragma omp simd
    for (std::int64_t c = 0; c < p.channels; ++c) activated[c] = from_float<T>(activate(to_float(y[c])));
  }
}
SCM_INSTANTIATE_CPU

}  // namespace scm::pixel_norm
