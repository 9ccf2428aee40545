#include "norm_modulate_silu/operands.h"
#include "ops.h"

namespace scm {
namespace {

struct NormModulateSiLU : norm_modulate_silu::Operands {
  using Operands::Operands;

  Shapes infer(const Shapes& inputs) const {
    const Shape &y = inputs[0], &modulation = inputs[1];
    check(y);
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
    return Operands::params<T>(run, y, modulation, 0);
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
