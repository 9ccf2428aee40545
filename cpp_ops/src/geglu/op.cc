#include "geglu/op.h"

#include "ops.h"

namespace scm {
namespace {

struct Geglu {
  static constexpr const char* kName = "GEGLU";
  static constexpr std::array kInputs{Argument{"x"}, Argument{"b"}};
  static constexpr std::array kOutputs{Argument{"y"}};
  static constexpr std::array<Inplace, 0> kInplace{};

  explicit Geglu(const Attributes&) {}

  Shapes infer(const Shapes& inputs) const {
    const Shape &x = inputs[0], &b = inputs[1];
    check_rank_at_least("x", x, 2);
    check_rank("b", b, 1);
    if (!x.ranked) return {x};
    check_dim("b", b, 0, x.back(), "the channels of x");
    Shape y = x;
    if (x.back().known()) {
      if (x.back().value % 2 != 0) fail("x", x, "an even number of channels");
      y.dims.back() = {x.back().value / 2};
    } else {
      y.dims.back() = {};
    }
    return {y};
  }

  template <typename T>
  geglu::Params<T> params(Context& run) const {
    const Input x = run.input(0), b = run.input(1);
    const Shape y = infer({x.shape, b.shape})[0];
    return {x.as<T>(), b.as<T>(), run.output<T>(0, y), elements(y, 0, y.rank() - 1), y.back().value};
  }

  template <typename T>
  void cpu(Context& run) const {
    const auto p = params<T>(run);
    run_on_cpu(run, p, geglu::cpu_kernel<T>(), p.rows, grain_in_rows(p.channels));
  }

  template <typename T>
  void cuda(Context& run) const {
    const auto p = params<T>(run);
    if (p.rows * p.channels > 0) check_launch(geglu::cuda(p, run.cuda_stream()));
  }
};

}  // namespace

void add_geglu(CustomOps& ops, const OrtApi& api) { add_all<Geglu, float, float16, bfloat16>(ops, api); }

}  // namespace scm
