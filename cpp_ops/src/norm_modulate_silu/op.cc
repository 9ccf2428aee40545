#include "norm_modulate_silu/op.h"

#include "ops.h"

namespace scm {
namespace {

struct NormModulateSiLU {
  static constexpr const char* kName = "NormModulateSiLU";
  static constexpr std::array kInputs{Argument{"y"}, Argument{"modulation"}};
  static constexpr std::array kOutputs{Argument{"z"}};
  static constexpr std::array kInplace{Inplace{0, 0}};

  float eps;

  explicit NormModulateSiLU(const Attributes& attributes) : eps(attributes.real("eps")) {}

  Shapes infer(const Shapes& inputs) const {
    const Shape &y = inputs[0], &modulation = inputs[1];
    check_rank_at_least("y", y, 2);
    check_has_channels("y", y);
    check_rank("modulation", modulation, 2);
    if (y.ranked) {
      check_dim("modulation", modulation, 0, y[0], "the samples of y");
      check_dim("modulation", modulation, 1, sum(y.back(), y.back()), "twice the channels of y");
    }
    return {y};
  }

  template <typename T>
  norm_modulate_silu::Params<T> params(Context& run) const {
    const Input y = run.input(0), modulation = run.input(1);
    infer({y.shape, modulation.shape});
    const std::int64_t pixels = elements(y.shape, 1, y.shape.rank() - 1);
    const std::int64_t channels = y.shape.back().value;
    return {y.as<T>(), modulation.as<T>(), run.output<T>(0, y.shape), y.shape[0].value, pixels, channels, 2 * channels, eps};
  }

  template <typename T>
  void cpu(Context& run) const {
    const auto p = params<T>(run);
    run_on_cpu(run, p, norm_modulate_silu::cpu_kernel<T>(), p.samples * p.pixels, grain_in_rows(p.channels));
  }

  template <typename T>
  void cuda(Context& run) const {
    const auto p = params<T>(run);
    if (p.samples * p.pixels > 0) check_launch(norm_modulate_silu::cuda(p, run.cuda_stream()));
  }
};

}  // namespace

void add_norm_modulate_silu(CustomOps& ops, const OrtApi& api) { add_all<NormModulateSiLU, float, float16, bfloat16>(ops, api); }

}  // namespace scm
