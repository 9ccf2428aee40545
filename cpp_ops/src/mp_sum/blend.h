// The attributes of the operators that compute mp_sum.
#pragma once

#include <cmath>

#include "common/custom_op.h"

namespace scm {

// mp_sum(a, b; t) = clamp(a * weight_a + b * weight_b, -clip, clip) (EDM2, arXiv 2312.02696, equation 88).
struct Blend {
  float weight_a, weight_b, clip;

  explicit Blend(const Attributes& attributes) : clip(attributes.real("clip")) {
    if (!(clip >= 0)) throw Error{"clip must be at least 0, got " + std::to_string(clip)};
    const double t = attributes.real("t"), scale = 1 / std::hypot(1 - t, t);
    weight_a = static_cast<float>((1 - t) * scale);
    weight_b = static_cast<float>(t * scale);
  }
};

}  // namespace scm
