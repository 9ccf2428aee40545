#include "depthwise_glu/op.h"

#include "ops.h"

namespace scm {
namespace {

struct DepthwiseGLU {
  static constexpr const char* kName = "DepthwiseGLU";
  static constexpr std::array kInputs{Argument{"x"}, Argument{"w"}, Argument{"b"}};
  static constexpr std::array kOutputs{Argument{"y"}};
  static constexpr std::array<Inplace, 0> kInplace{};

  explicit DepthwiseGLU(const Attributes&) {}

  Shapes infer(const Shapes& inputs) const {
    const Shape &x = inputs[0], &w = inputs[1], &b = inputs[2];
    check_rank("x", x, 4);
    check_rank("w", w, 4);
    check_rank("b", b, 1);
    if (!x.ranked) return {x};
    const Dim channels = x[1];
    if (channels.known() && (channels.value < 2 || channels.value % 2 != 0)) fail("x", x, "an even number of channels, at least 2");
    check_dim("w", w, 0, channels, "the channels of x");
    check_dim("w", w, 1, Dim{1}, "the channels of a group");
    check_dim("w", w, 2, Dim{3}, "the kernel height");
    check_dim("w", w, 3, Dim{3}, "the kernel width");
    check_dim("b", b, 0, channels, "the channels of x");
    return {Shape{{x[0], channels.known() ? Dim{channels.value / 2} : Dim{}, x[2], x[3]}, true}};
  }

  template <typename T>
  depthwise_glu::Params<T> params(Context& run) const {
    const Input x = run.input(0), w = run.input(1), b = run.input(2);
    const Shape y = infer({x.shape, w.shape, b.shape})[0];
    return {x.as<T>(), w.as<T>(), b.as<T>(), run.output<T>(0, y), y[0].value, y[1].value, y[2].value, y[3].value};
  }

  template <typename T>
  void cpu(Context& run) const {
    const auto p = params<T>(run);
    if (p.height * p.width == 0) return;
    run_on_cpu(run, p, depthwise_glu::cpu_kernel<T>(), p.samples * p.channels, grain_in_rows(p.height * p.width));
  }

  template <typename T>
  void cuda(Context& run) const {
    const auto p = params<T>(run);
    if (p.samples * p.height * p.width > 0) check_launch(depthwise_glu::cuda(p, run.cuda_stream()));
  }
};

}  // namespace

void add_depthwise_glu(CustomOps& ops, const OrtApi& api) { add_all<DepthwiseGLU, float, float16, bfloat16>(ops, api); }

}  // namespace scm
