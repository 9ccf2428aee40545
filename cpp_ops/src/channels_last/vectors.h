// What the kernels share, for each to compile with its own options: everything here has internal linkage.
#pragma once

#include <immintrin.h>

#include "channels_last/product.h"

namespace scm::channels_last {
namespace {

[[maybe_unused]] __mmask16 first(std::int64_t count) { return count >= 16 ? 0xffff : count <= 0 ? 0 : static_cast<__mmask16>((1u << count) - 1); }

[[maybe_unused]] void store(float* to, __mmask16 mask, __m512 value) { _mm512_mask_storeu_ps(to, mask, value); }
[[maybe_unused]] void store(float16* to, __mmask16 mask, __m512 value) {
  _mm256_mask_storeu_epi16(to, mask, _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

// Where a step begins: 32 inputs at one place of the window, in elements after those of a position.
[[maybe_unused]] std::int64_t step_offset(const Sizes& s, std::int64_t step) {
  const std::int64_t blocks = s.padded_inputs() / 32, place = step / blocks, input = step % blocks * 32;
  return (place / s.side * s.row() + place % s.side) * s.padded_inputs() + input;
}

// Writes the sums of the positions that are pixels, and leaves those between the rows. `sums(i, half)` are the 16 of position begin + i, aligned to 64 bytes.
template <typename T, typename SumsOf>
void write(const Params<T>& p, std::int64_t block, std::int64_t begin, std::int64_t end, SumsOf sums) {
  const Sizes& s = p.sizes;
  const std::int64_t outputs = s.outputs - block * kBlock;
  const __mmask16 masks[2] = {first(outputs), first(outputs - 16)};
  std::int64_t n = begin / s.sample(), h = begin % s.sample() / s.row(), w = begin % s.row();
  for (std::int64_t position = begin; position < end; ++position) {
    if (w < s.width && h < s.height) {
      T* y = p.y + ((n * s.height + h) * s.width + w) * s.outputs + block * kBlock;
      store(y, masks[0], _mm512_load_ps(sums(position - begin, 0)));
      if (masks[1]) store(y + 16, masks[1], _mm512_load_ps(sums(position - begin, 1)));
    }
    if (++w == s.row()) {
      w = 0;
      if (++h == s.height + s.pad()) {
        h = 0;
        ++n;
      }
    }
  }
}

}  // namespace
}  // namespace scm::channels_last
