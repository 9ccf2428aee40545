#include "mp_silu/op.h"

#include "ops.h"

namespace scm {
namespace {

struct MPSiLU {
  static constexpr const char* kName = "MPSiLU";
  static constexpr std::array kInputs{Argument{"x"}};
  static constexpr std::array kOutputs{Argument{"y"}};
  static constexpr std::array kInplace{Inplace{0, 0}};

  explicit MPSiLU(const Attributes&) {}

  Shapes infer(const Shapes& inputs) const {
    return {inputs[0]};
  }

  template <typename T>
  mp_silu::Params<T> params(Context& run) const {
    const Input x = run.input(0);
    return {x.as<T>(), run.output<T>(0, x.shape), elements(x.shape)};
  }

  template <typename T>
  void cpu(Context& run) const {
    const auto p = params<T>(run);
    run_on_cpu(run, p, mp_silu::cpu_kernel<T>(), p.count, kGrain);
  }

  template <typename T>
  void cuda(Context& run) const {
    const auto p = params<T>(run);
    if (p.count > 0) check_launch(mp_silu::cuda(p, run.cuda_stream()));
  }
};

}  // namespace

void add_mp_silu(CustomOps& ops, const OrtApi& api) { add_all<MPSiLU, float, float16, bfloat16>(ops, api); }

}  // namespace scm
