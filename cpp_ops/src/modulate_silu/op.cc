#include "modulate_silu/op.h"

#include "ops.h"

namespace scm {
namespace {

struct ModulateSiLU {
  static constexpr const char* kName = "ModulateSiLU";
  static constexpr std::array kInputs{Argument{"y"}, Argument{"scale"}};
  static constexpr std::array kOutputs{Argument{"z"}};
  static constexpr std::array kInplace{Inplace{0, 0}};

  explicit ModulateSiLU(const Attributes&) {}

  Shapes infer(const Shapes& inputs) const {
    const Shape &y = inputs[0], &scale = inputs[1];
    check_rank_at_least("y", y, 2);
    check_rank("scale", scale, 2);
    if (y.ranked) {
      check_dim("scale", scale, 0, y[0], "the samples of y");
      check_dim("scale", scale, 1, y.back(), "the channels of y");
    }
    return {y};
  }

  template <typename T>
  modulate_silu::Params<T> params(Context& run) const {
    const Input y = run.input(0), scale = run.input(1);
    infer({y.shape, scale.shape});
    const std::int64_t pixels = elements(y.shape, 1, y.shape.rank() - 1);
    return {y.as<T>(), scale.as<T>(), run.output<T>(0, y.shape), y.shape[0].value, pixels, y.shape.back().value};
  }

  template <typename T>
  void cpu(Context& run) const {
    const auto p = params<T>(run);
    run_on_cpu(run, p, modulate_silu::cpu_kernel<T>(), p.samples * p.pixels, grain_in_rows(p.channels));
  }

  template <typename T>
  void cuda(Context& run) const {
    const auto p = params<T>(run);
    if (p.samples * p.pixels * p.channels > 0) check_launch(modulate_silu::cuda(p, run.cuda_stream()));
  }
};

}  // namespace

void add_modulate_silu(CustomOps& ops, const OrtApi& api) { add_all<ModulateSiLU, float, float16, bfloat16>(ops, api); }

}  // namespace scm
