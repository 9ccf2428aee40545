#include "philox_normal/op.h"
#include "philox_normal/philox.h"

namespace scm::philox_normal {

template <typename T>
void SCM_CPU(const Params<T>& p, std::int64_t begin, std::int64_t end) {
  const auto draw = static_cast<std::uint32_t>(*p.draw);
  const float scale = *p.scale;
  while (begin < end) {  // one sample, or part of one, per iteration
    const std::int64_t sample = begin / p.size, sample_end = (sample + 1) * p.size, stop = end < sample_end ? end : sample_end;
    const auto seed = static_cast<std::uint64_t>(p.seeds[sample]);
    const std::int64_t first = sample * p.size;
#pragma omp simd
    for (std::int64_t i = begin; i < stop; ++i) p.noise[i] = standard_normal(seed, draw, static_cast<std::uint64_t>(i - first)) * scale;
    begin = stop;
  }
}
template void SCM_CPU<float>(const Params<float>&, std::int64_t, std::int64_t);

}  // namespace scm::philox_normal
