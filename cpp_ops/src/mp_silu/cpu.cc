#include "common/math.h"
#include "mp_silu/op.h"

namespace scm::mp_silu {

template <typename T>
void SCM_CPU(const Params<T>& p, std::int64_t begin, std::int64_t end) {
#pragma omp simd
  for (std::int64_t i = begin; i < end; ++i) p.y[i] = from_float<T>(activate(to_float(p.x[i])));
}
SCM_INSTANTIATE_CPU

}  // namespace scm::mp_silu
