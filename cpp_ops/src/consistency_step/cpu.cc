#include "common/math.h"
#include "consistency_step/op.h"

namespace scm::consistency_step {

template <typename T>
void SCM_CPU(const Params<T>& p, std::int64_t begin, std::int64_t end) {
  while (begin < end) {  // one sample, or part of one, per iteration
    const std::int64_t sample = begin / p.size, sample_end = (sample + 1) * p.size, stop = end < sample_end ? end : sample_end;
    const double t = p.t[sample], t_next = p.t_next[sample];
    const auto cos = static_cast<float>(__builtin_cos(t)), sin = static_cast<float>(__builtin_sin(t));
    const auto cos_next = static_cast<float>(__builtin_cos(t_next)), sin_next = static_cast<float>(__builtin_sin(t_next));
#pragma omp simd
    for (std::int64_t i = begin; i < stop; ++i) {
      const float denoised = cos * p.x[i] - sin * p.sigma_data * to_float(p.F[i]);
      p.x_next[i] = cos_next * denoised + sin_next * p.sigma_data * p.noise[i];
    }
    begin = stop;
  }
}
SCM_INSTANTIATE_CPU

}  // namespace scm::consistency_step
