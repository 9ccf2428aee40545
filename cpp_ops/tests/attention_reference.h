// Attention in double, for the tests of the CPU and CUDA kernels.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <ostream>
#include <vector>

namespace scm::testing {

struct AttentionCase {
  std::int64_t samples, queries, keys, heads, key_heads, size, value_size;

  std::vector<std::int64_t> q() const { return {samples, queries, heads, size}; }
  std::vector<std::int64_t> k() const { return {samples, keys, key_heads, size}; }
  std::vector<std::int64_t> v() const { return {samples, keys, key_heads, value_size}; }
  std::vector<std::int64_t> y() const { return {samples, queries, heads, value_size}; }
  float scale() const { return 1 / std::sqrt(static_cast<float>(size)); }
};

inline std::ostream& operator<<(std::ostream& out, const AttentionCase& c) {
  return out << c.samples << " samples, " << c.queries << " queries, " << c.keys << " keys, " << c.heads << " heads on " << c.key_heads << ", of " << c.size << " and "
             << c.value_size << " channels";
}

// The axes of a mask: [samples or 1, heads or 1, queries or 1, keys]. No axes: no mask.
using MaskShape = std::vector<std::int64_t>;

inline std::vector<std::int64_t> mask_strides(const MaskShape& shape) {
  std::vector<std::int64_t> strides(3, 0);
  std::int64_t stride = shape[3];
  for (std::size_t axis = 3; axis-- > 0; stride *= shape[axis]) {
    if (shape[axis] > 1) strides[axis] = stride;
  }
  return strides;
}

inline std::vector<double> attention(const AttentionCase& c, const std::vector<double>& q, const std::vector<double>& k, const std::vector<double>& v,
                                     const std::vector<double>& mask = {}, const MaskShape& mask_shape = {}) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  std::vector<double> y(static_cast<std::size_t>(c.samples * c.queries * c.heads * c.value_size)), weights(static_cast<std::size_t>(c.keys));
  const std::vector<std::int64_t> strides = mask.empty() ? std::vector<std::int64_t>(3) : mask_strides(mask_shape);
  for (std::int64_t unit = 0; unit < c.samples * c.queries * c.heads; ++unit) {
    const std::int64_t sample = unit / c.heads / c.queries, query = unit / c.heads % c.queries, head = unit % c.heads, key_head = head / (c.heads / c.key_heads);
    double largest = -kInfinity, sum = 0;
    bool hidden = true;
    for (std::int64_t key = 0; key < c.keys; ++key) {
      double score = 0;
      for (std::int64_t i = 0; i < c.size; ++i) score += q[unit * c.size + i] * k[((sample * c.keys + key) * c.key_heads + key_head) * c.size + i];
      const double bias = mask.empty() ? 0 : mask[sample * strides[0] + head * strides[1] + query * strides[2] + key];
      hidden = hidden && bias == -kInfinity;
      weights[key] = score * static_cast<double>(c.scale()) + bias;
      largest = std::max(largest, weights[key]);
    }
    for (double& weight : weights) sum += weight = std::exp(weight - largest);
    for (std::int64_t i = 0; i < c.value_size; ++i) {
      double& out = y[unit * c.value_size + i];
      for (std::int64_t key = 0; key < c.keys; ++key) out += weights[key] / sum * v[((sample * c.keys + key) * c.key_heads + key_head) * c.value_size + i];
      if (hidden) out = 0;
    }
  }
  return y;
}

// Hides every third key from all queries and adds a bias to the others.
inline std::vector<double> some_mask(const MaskShape& shape) {
  std::vector<double> mask;
  for (std::int64_t i = 0; i < shape[0] * shape[1] * shape[2] * shape[3]; ++i) {
    mask.push_back(i % shape[3] % 3 == 1 ? -std::numeric_limits<double>::infinity() : static_cast<double>(i % 7) / 4 - 1);
  }
  return mask;
}

}  // namespace scm::testing
