#include "common/math.h"
#include "mp_sum/op.h"

namespace scm::mp_sum {

template <typename T>
void SCM_CPU(const Params<T>& p, std::int64_t begin, std::int64_t end) {
  const float weight_a = p.weight_a, weight_b = p.weight_b, clip = p.clip;
#pragma omp simd
  for (std::int64_t i = begin; i < end; ++i) p.y[i] = from_float<T>(clamp(to_float(p.a[i]) * weight_a + to_float(p.b[i]) * weight_b, clip));
  if (!p.activated) return;
#pragma omp simd
  for (std::int64_t i = begin; i < end; ++i) p.activated[i] = from_float<T>(activate(to_float(p.y[i])));
}
SCM_INSTANTIATE_CPU

}  // namespace scm::mp_sum
