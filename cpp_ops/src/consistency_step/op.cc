#include "consistency_step/op.h"

#include "ops.h"

namespace scm {
namespace {

struct ConsistencyStep {
  static constexpr const char* kName = "ConsistencyStep";
  static constexpr std::array kInputs{Argument{"x", Type::float32}, Argument{"F"}, Argument{"noise", Type::float32}, Argument{"t", Type::float32}, Argument{"t_next", Type::float32}};
  static constexpr std::array kOutputs{Argument{"x_next", Type::float32}};
  static constexpr std::array kInplace{Inplace{0, 0}, Inplace{2, 0}};

  float sigma_data;

  explicit ConsistencyStep(const Attributes& attributes) : sigma_data(attributes.real("sigma_data")) {}

  Shapes infer(const Shapes& inputs) const {
    const Shape &x = inputs[0], &t = inputs[3], &t_next = inputs[4];
    check_rank_at_least("x", x, 1);
    check_same("x", x, "F", inputs[1]);
    check_same("x", x, "noise", inputs[2]);
    check_rank("t", t, 1);
    check_rank("t_next", t_next, 1);
    if (x.ranked) {
      check_dim("t", t, 0, x[0], "the samples of x");
      check_dim("t_next", t_next, 0, x[0], "the samples of x");
    }
    return {x};
  }

  template <typename T>
  consistency_step::Params<T> params(Context& run) const {
    const Input x = run.input(0), F = run.input(1), noise = run.input(2), t = run.input(3), t_next = run.input(4);
    infer({x.shape, F.shape, noise.shape, t.shape, t_next.shape});
    float* x_next = run.output<float>(0, x.shape);
    return {x.as<float>(), F.as<T>(), noise.as<float>(), t.as<float>(), t_next.as<float>(), x_next, x.shape[0].value, elements(x.shape, 1, x.shape.rank()), sigma_data};
  }

  template <typename T>
  void cpu(Context& run) const {
    const auto p = params<T>(run);
    run_on_cpu(run, p, consistency_step::cpu_kernel<T>(), p.samples * p.size, kGrain);
  }

  template <typename T>
  void cuda(Context& run) const {
    const auto p = params<T>(run);
    if (p.samples * p.size > 0) check_launch(consistency_step::cuda(p, run.cuda_stream()));
  }
};

}  // namespace

void add_consistency_step(CustomOps& ops, const OrtApi& api) { add_all<ConsistencyStep, float, float16, bfloat16>(ops, api); }

}  // namespace scm
