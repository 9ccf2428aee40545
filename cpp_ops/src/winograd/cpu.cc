// The two phases of winograd.h. This file is compiled once for each level of x86-64: it must not use templates of the standard library (common/kernel.h).
#include "winograd/winograd.h"

#include "winograd/input.h"
#include "winograd/output.h"
#include "winograd/points.h"
#include "winograd/transforms.h"
#include "winograd/weights.h"

namespace scm::winograd {
namespace {

template <typename T>
void transform(const Params<T>& p, std::int64_t begin, std::int64_t end, float* scratch) {
  if (is_pixel(p.sizes)) {
    copy_pixels(p, begin, end);
  } else if (p.channels_first) {
    transform_channels_first(p, begin, end, scratch);
  } else {
    transform_channels_last(p, begin, end);
  }
}

// The six elements of a row of U = G' w G'^T, from a row of G' w.
inline void transform_weight_row(Vector a, Vector b, Vector c, std::int64_t stride, float* to) {
  const Vector near = a + c, far = a + 4.0f * c;
  store(to, a);
  store(to + stride, near + b);
  store(to + 2 * stride, near - b);
  store(to + 3 * stride, far + 2.0f * b);
  store(to + 4 * stride, far - 2.0f * b);
  store(to + 5 * stride, c);
}

// U for `inputs` input channels of a chunk. Point e of (input, output) goes to to[e * stride + input * width + output].
template <typename T>
void transform_weights(const float* chunk, std::int64_t inputs, std::int64_t width, std::int64_t stride, const NextChunk<T>& next, float* to) {
  for (std::int64_t input = 0; input < inputs; ++input, chunk += kTaps * width) {
    for (std::int64_t o = 0; o < width; o += kLanes, to += kLanes) {
      next.prefetch(input, o);
      const float* const w = chunk + o;
      const auto at = [&](int tap) { return load(w + tap * width); };
      transform_weight_row(at(0), at(1), at(2), stride, to);
      transform_weight_row(at(6), at(7), at(8), stride, to + 30 * stride);
      {
        const Vector a = at(0) + at(6), b = at(1) + at(7), c = at(2) + at(8);
        const Vector d = at(3), e = at(4), f = at(5);
        transform_weight_row(a + d, b + e, c + f, stride, to + 6 * stride);
        transform_weight_row(a - d, b - e, c - f, stride, to + 12 * stride);
      }
      {
        const Vector a = at(0) + 4.0f * at(6), b = at(1) + 4.0f * at(7), c = at(2) + 4.0f * at(8);
        const Vector d = 2.0f * at(3), e = 2.0f * at(4), f = 2.0f * at(5);
        transform_weight_row(a + d, b + e, c + f, stride, to + 18 * stride);
        transform_weight_row(a - d, b - e, c - f, stride, to + 24 * stride);
      }
    }
  }
}

// The chunk after that of `input`: of the same outputs, or of those that follow.
template <typename T>
NextChunk<T> next_chunk(const Params<T>& p, const Outputs& outputs, std::int64_t input) {
  const std::int64_t row = p.sizes.in * kTaps, end = outputs.begin + outputs.count;
  if (input + kStep < p.sizes.in) return {p.weight + outputs.begin * row + (input + kStep) * kTaps, row};
  return {end < p.sizes.out ? p.weight + end * row : nullptr, row};
}

// M = the sums over the input channels for tiles [first, first + tiles) of the group. Point e of (tile, output) goes to
// m[e * m_stride + tile * width + output].
template <typename T>
void multiply_all(const Params<T>& p, const Outputs& outputs, std::int64_t first, std::int64_t tiles, float* u, float* m, std::int64_t m_stride,
                  float* chunk) {
  const Sizes& s = p.sizes;
  const std::int64_t width = outputs.width, depth = p.plan.depth, v_stride = p.plan.group * kStep + kPad, v_step = kPoints * v_stride;
  const float* v = p.v + first * kStep;
  const auto next = [&](std::int64_t input) { return next_chunk(p, outputs, input); };
  if (is_pixel(s)) {
    for (std::int64_t input = 0; input < s.in; input += kStep, v += v_step) {
      read_weights(p.weight, s, input, outputs.begin, width, chunk);
      for (std::int64_t c = 0; c < kStep; ++c) {
        for (std::int64_t o = 0; o < width; o += kLanes) store(chunk + c * width + o, load(chunk + (c * kTaps + kTaps / 2) * width + o));
      }
      multiply_matrix({v, v_step, chunk, m, width, min(kStep, s.in - input), input == 0}, tiles, width / kLanes);
    }
    return;
  }
  if (depth == 0) {
    for (std::int64_t input = 0; input < s.in; input += kStep, v += v_step) {
      read_weights(p.weight, s, input, outputs.begin, width, chunk);
      multiply_few(chunk, min(kStep, s.in - input), tiles, v, v_stride, m, m_stride, width, input == 0, next(input));
    }
    return;
  }
  const std::int64_t u_stride = depth * width + kPad;
  for (std::int64_t input = 0; input < s.in; input += depth, v += depth / kStep * v_step) {
    const std::int64_t inputs = min(depth, s.in - input);
    for (std::int64_t step = 0; step < inputs; step += kStep) {
      read_weights(p.weight, s, input + step, outputs.begin, width, chunk);
      transform_weights(chunk, min(kStep, inputs - step), width, u_stride, next(input + step), u + step * width);
    }
    for (std::int64_t e = 0; e < kPoints; ++e) {
      multiply_matrix({v + e * v_stride, v_step, u + e * u_stride, m + e * m_stride, width, inputs, input == 0}, tiles, width / kLanes);
    }
  }
}

template <typename T>
void multiply(const Params<T>& p, std::int64_t piece, float* scratch) {
  const Sizes& s = p.sizes;
  const Plan& plan = p.plan;
  const std::int64_t begin = piece % blocks(s, plan) * plan.block, count = min(plan.block, s.out - begin);
  const Outputs outputs{begin, count, round_up(count, kLanes)};
  const std::int64_t first = piece / blocks(s, plan) * plan.chunk, tiles = min(plan.chunk, p.count - first), m_stride = plan.chunk * outputs.width + kPad;
  float *const u = scratch, *const m = u + u_size(plan), *const chunk = m + m_size(plan), *const results = chunk + kChunkSize;
  multiply_all(p, outputs, first, tiles, u, m, m_stride, chunk);
  for (std::int64_t tile = 0, run; tile < tiles; tile += run) {
    const Place at = place_of(s, p.first + first + tile);
    run = p.channels_first ? min(kTilesOfVector, min(tiles - tile, tiles_across(s) - at.column / kTile)) : 1;  // tiles of one row
    for (std::int64_t k = 0; k < run; ++k) {
      float* const y = results + k * kTile * kTile * outputs.width;
      if (is_pixel(s)) {
        for (std::int64_t o = 0; o < outputs.width; o += kLanes) store(y + o, load(m + tile * outputs.width + o));
        continue;
      }
      for (std::int64_t o = 0; o < outputs.width; o += kDecided) {
        const Outputs decided{outputs.begin + o, min(kDecided, outputs.count - o), min(kDecided, outputs.width - o)};
        if (transform_results(m + (tile + k) * outputs.width, m_stride, o, o + decided.width, outputs.width, y)) continue;
        convolve_directly(p, {at.sample, at.row, at.column + k * kTile}, decided, chunk, y + o, outputs.width);
      }
    }
    if (p.bias) add_bias(p.bias, outputs, run, results);
    if (p.channels_first) {
      write_channels_first(p, at, run, outputs, results);
    } else {
      write_channels_last(p, at, outputs, results);
    }
  }
}

}  // namespace

template <typename T>
Kernels<T> SCM_PASTE(kernels_, SCM_ISA)() {
  return {transform<T>, multiply<T>};
}
template Kernels<float> SCM_PASTE(kernels_, SCM_ISA)<float>();
template Kernels<float16> SCM_PASTE(kernels_, SCM_ISA)<float16>();

}  // namespace scm::winograd
