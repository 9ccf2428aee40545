#include "mp_sum/op.h"

#include "mp_sum/blend.h"
#include "ops.h"

namespace scm {
namespace {

struct MPSum {
  static constexpr const char* kName = "MPSum";
  static constexpr std::array kInputs{Argument{"a"}, Argument{"b"}};
  static constexpr std::array kOutputs{Argument{"y"}, Argument{"activated", Type::element, true}};
  static constexpr std::array kInplace{Inplace{0, 0}, Inplace{1, 0}};

  Blend blend;

  explicit MPSum(const Attributes& attributes) : blend(attributes) {}

  Shapes infer(const Shapes& inputs) const {
    check_same("a", inputs[0], "b", inputs[1]);
    return {inputs[0], inputs[0]};
  }

  template <typename T>
  mp_sum::Params<T> params(Context& run) const {
    const Input a = run.input(0), b = run.input(1);
    infer({a.shape, b.shape});
    T* y = run.output<T>(0, a.shape);
    T* activated = run.output<T>(1, a.shape);
    return {a.as<T>(), b.as<T>(), y, activated, elements(a.shape), blend.weight_a, blend.weight_b, blend.clip};
  }

  template <typename T>
  void cpu(Context& run) const {
    const auto p = params<T>(run);
    run_on_cpu(run, p, mp_sum::cpu_kernel<T>(), p.count, kGrain);
  }

  template <typename T>
  void cuda(Context& run) const {
    const auto p = params<T>(run);
    if (p.count > 0) check_launch(mp_sum::cuda(p, run.cuda_stream()));
  }
};

}  // namespace

void add_mp_sum(CustomOps& ops, const OrtApi& api) { add_all<MPSum, float, float16, bfloat16>(ops, api); }

}  // namespace scm
