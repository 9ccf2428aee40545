// x_next = cos t' (cos t x - sin t sigma_data F) + sin t' sigma_data noise. blockIdx.y is the sample. Two threads of
// each block compute the sines and cosines in double. A thread processes two vectors of four elements, or two elements.
#include "common/cuda.h"
#include "consistency_step/op.h"

namespace scm::consistency_step {
namespace {

constexpr int kFour = 4;  // floats in 16 bytes

template <typename T, int kWidth>
struct Inputs {
  Vector<float, kWidth> x, noise;
  Vector<T, kWidth> F;
};

template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads) kernel(const Params<T> p) {
  __shared__ float sines[2], cosines[2];  // of t, t'
  for (std::int64_t sample = blockIdx.y; sample < p.samples; sample += gridDim.y) {
    __syncthreads();  // all threads have finished the previous sample
    if (threadIdx.x < 2) {
      double sine, cosine;
      sincos(static_cast<double>(threadIdx.x == 0 ? p.t[sample] : p.t_next[sample]), &sine, &cosine);
      sines[threadIdx.x] = static_cast<float>(sine);
      cosines[threadIdx.x] = static_cast<float>(cosine);
    }
    __syncthreads();
    const float cos = cosines[0], sin = sines[0] * p.sigma_data, cos_next = cosines[1], sin_next = sines[1] * p.sigma_data;
    const std::int64_t start = sample * p.size;
    for_each(
        p.size / kWidth,
        [&](std::int64_t i) { return Inputs<T, kWidth>{load<kWidth>(p.x + start, i), load<kWidth>(p.noise + start, i), load<kWidth>(p.F + start, i)}; },
        [&](std::int64_t i, const Inputs<T, kWidth>& in) {
          store(p.x_next + start, i, vector_of<float, kWidth>([&](int c) { return cos_next * (cos * in.x[c] - sin * in.F[c]) + sin_next * in.noise[c]; }));
        });
  }
}

}  // namespace

template <typename T>
const char* cuda(const Params<T>& p, void* stream) {
  if (p.size % kFour == 0 && aligned(16, p.x, p.noise, p.x_next) && aligned(kFour * sizeof(T), p.F)) {
    return launch(kernel<T, kFour>, grid_of(p.size / kFour, kElementsPerBlock, p.samples), kThreads, stream, p);
  }
  return launch(kernel<T, 1>, grid_of(p.size, kElementsPerBlock, p.samples), kThreads, stream, p);
}
SCM_INSTANTIATE_CUDA

}  // namespace scm::consistency_step
