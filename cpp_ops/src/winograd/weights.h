// Reads weights where they are: kStep input channels of up to kBlock outputs at a time, in float32, transposed to vectors of outputs.
#pragma once

#include "common/simd.h"
#include "winograd/winograd.h"

namespace scm::winograd {
inline namespace SCM_ISA {

// The chunk of weights that will be read next. Its rows are short, so the processor does not prefetch them: whoever multiplies the current chunk does, a few
// cache lines at a time.
template <typename T>
struct NextChunk {
  static constexpr std::int64_t kLine = 64 / sizeof(T), kLines = (kStep * kTaps + kLine - 1) / kLine;
  const T* weight;   // of its first output and input, or null
  std::int64_t row;  // elements from an output to the next

  // Prefetches line `line` of kLanes outputs.
  void prefetch(std::int64_t line, std::int64_t output) const {
    if (!weight || line >= kLines) return;
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) __builtin_prefetch(weight + (output + i) * row + line * kLine);
  }
};

// Reads inputs [input, input + kStep) of outputs [output, output + width); width is a multiple of kLanes. Element (input, tap, output) goes to
// chunk[(input * kTaps + tap) * width + output]. Missing inputs and outputs are zeros.
template <typename T>
void read_weights(const T* weight, const Sizes& s, std::int64_t input, std::int64_t output, std::int64_t width, float* chunk) {
  constexpr std::int64_t kElements = kStep * kTaps;
  const std::int64_t row = s.in * kTaps, available = (s.in - input) * kTaps;
  for (std::int64_t o = 0; o < width; o += kLanes) {
    const T* from = weight + (output + o) * row + input * kTaps;
    const std::int64_t outputs = s.out - output - o;
    for (std::int64_t element = 0; element < kElements; element += kLanes) {
      Vector block[kLanes];
      if (outputs >= kLanes && available - element >= kLanes) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) block[i] = load(from + i * row + element);
      } else {
        const std::int64_t rest = available - element, count = rest < 0 ? 0 : rest < kLanes ? rest : kLanes;
        for (int i = 0; i < kLanes; ++i) block[i] = i < outputs ? load_part(from + i * row + element, count) : Vector{};
      }
      transpose(block);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) store(chunk + (element + i) * width + o, block[i]);
    }
  }
}

}  // namespace SCM_ISA
}  // namespace scm::winograd
