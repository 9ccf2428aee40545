// noise = standard_normal(...) * scale, with philox.h. blockIdx.y is the sample; a thread computes one element. The kernel is bound by arithmetic, not memory.
#include "common/cuda.h"
#include "philox_normal/op.h"
#include "philox_normal/philox.h"

namespace scm::philox_normal {
namespace {

template <typename T>
__global__ void __launch_bounds__(kThreads) kernel(const Params<T> p) {
  const auto draw = static_cast<std::uint32_t>(*p.draw);
  const float scale = *p.scale;
  for (std::int64_t sample = blockIdx.y; sample < p.samples; sample += gridDim.y) {
    const auto seed = static_cast<std::uint64_t>(p.seeds[sample]);
    T* noise = p.noise + sample * p.size;
    for (std::int64_t e = std::int64_t{blockIdx.x} * kThreads + threadIdx.x; e < p.size; e += std::int64_t{gridDim.x} * kThreads) {
      noise[e] = standard_normal(seed, draw, static_cast<std::uint64_t>(e)) * scale;
    }
  }
}

}  // namespace

template <typename T>
const char* cuda(const Params<T>& p, void* stream) {
  return launch(kernel<T>, grid_of(p.size, kThreads, p.samples), kThreads, stream, p);
}
template const char* cuda<float>(const Params<float>&, void*);

}  // namespace scm::philox_normal
