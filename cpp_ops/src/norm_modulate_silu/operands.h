// What the operators NormModulateSiLU of the domains scm and scm.fused share.
#pragma once

#include "common/custom_op.h"
#include "norm_modulate_silu/op.h"

namespace scm::norm_modulate_silu {

struct Operands {
  static constexpr const char* kName = "NormModulateSiLU";
  static constexpr std::array kInputs{Argument{"y"}, Argument{"modulation"}};
  static constexpr std::array kOutputs{Argument{"z"}};
  static constexpr std::array kInplace{Inplace{0, 0}};

  float eps;

  explicit Operands(const Attributes& attributes) : eps(attributes.real("eps")) {}

  static void check(const Shape& y) {
    check_rank_at_least("y", y, 2);
    check_has_channels("y", y);
  }

  // Returns the arguments of the kernel for inputs that have been checked. `begin` is the first column of the modulation that is used.
  template <typename T>
  Params<T> params(Context& run, const Input& y, const Input& modulation, std::int64_t begin) const {
    const std::int64_t samples = y.shape[0].value, pixels = elements(y.shape, 1, y.shape.rank() - 1), channels = y.shape.back().value;
    return {y.as<T>(), modulation.as<T>() + begin, run.output<T>(0, y.shape), samples, pixels, channels, modulation.shape[1].value, eps};
  }
};

}  // namespace scm::norm_modulate_silu
