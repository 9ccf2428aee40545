#include "pixel_norm/op.h"

#include "ops.h"

namespace scm {
namespace {

struct PixelNorm {
  static constexpr const char* kName = "PixelNorm";
  static constexpr std::array kInputs{Argument{"x"}};
  static constexpr std::array kOutputs{Argument{"y"}, Argument{"activated", Type::element, true}};
  static constexpr std::array kInplace{Inplace{0, 0}};

  float eps;

  explicit PixelNorm(const Attributes& attributes) : eps(attributes.real("eps")) {}

  Shapes infer(const Shapes& inputs) const {
    check_rank_at_least("x", inputs[0], 1);
    check_has_channels("x", inputs[0]);
    return {inputs[0], inputs[0]};
  }

  template <typename T>
  pixel_norm::Params<T> params(Context& run) const {
    const Input x = run.input(0);
    const Shapes outputs = infer({x.shape});
    const std::int64_t channels = x.shape.back().value;
    T* y = run.output<T>(0, outputs[0]);
    T* activated = run.output<T>(1, outputs[1]);
    return {x.as<T>(), y, activated, elements(x.shape) / channels, channels, eps};
  }

  template <typename T>
  void cpu(Context& run) const {
    const auto p = params<T>(run);
    run_on_cpu(run, p, pixel_norm::cpu_kernel<T>(), p.rows, grain_in_rows(p.channels));
  }

  template <typename T>
  void cuda(Context& run) const {
    const auto p = params<T>(run);
    if (p.rows > 0) check_launch(pixel_norm::cuda(p, run.cuda_stream()));
  }
};

}  // namespace

void add_pixel_norm(CustomOps& ops, const OrtApi& api) { add_all<PixelNorm, float, float16, bfloat16>(ops, api); }

}  // namespace scm
