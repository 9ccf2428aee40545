#include "common/math.h"
#include "to_image/op.h"

namespace scm::to_image {

template <typename T>
void SCM_CPU(const Params<T>& p, std::int64_t begin, std::int64_t end) {
  while (begin < end) {  // pixels of one sample at a time
    const std::int64_t sample = begin / p.pixels, sample_end = (sample + 1) * p.pixels, stop = end < sample_end ? end : sample_end;
    const std::int64_t first = begin - sample * p.pixels, count = stop - begin;
    for (std::int64_t c = 0; c < p.channels; ++c) {
      const T* x = p.x + (sample * p.channels + c) * p.pixels + first;
      std::uint8_t* image = p.image + begin * p.channels + c;
#pragma omp simd
      for (std::int64_t i = 0; i < count; ++i) image[i * p.channels] = to_level(to_float(x[i]) * p.scale + p.offset);
    }
    begin = stop;
  }
}
SCM_INSTANTIATE_CPU

}  // namespace scm::to_image
