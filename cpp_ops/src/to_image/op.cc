#include "to_image/op.h"

#include "ops.h"

namespace scm {
namespace {

struct ToImage {
  static constexpr const char* kName = "ToImage";
  static constexpr std::array kInputs{Argument{"x"}};
  static constexpr std::array kOutputs{Argument{"image", Type::uint8}};
  static constexpr std::array<Inplace, 0> kInplace{};

  float scale, offset;

  explicit ToImage(const Attributes& attributes) : scale(attributes.real("scale")), offset(attributes.real("offset")) {}

  Shapes infer(const Shapes& inputs) const {
    const Shape& x = inputs[0];
    check_rank("x", x, 4);
    if (!x.ranked) return {x};
    return {Shape{{x[0], x[2], x[3], x[1]}}};
  }

  template <typename T>
  to_image::Params<T> params(Context& run) const {
    const Input x = run.input(0);
    auto* image = run.output<std::uint8_t>(0, infer({x.shape})[0]);
    return {x.as<T>(), image, x.shape[0].value, x.shape[1].value, elements(x.shape, 2, 4), scale, offset};
  }

  template <typename T>
  void cpu(Context& run) const {
    const auto p = params<T>(run);
    run_on_cpu(run, p, to_image::cpu_kernel<T>(), p.samples * p.pixels, grain_in_rows(p.channels));
  }

  template <typename T>
  void cuda(Context& run) const {
    const auto p = params<T>(run);
    if (p.samples * p.pixels * p.channels > 0) check_launch(to_image::cuda(p, run.cuda_stream()));
  }
};

}  // namespace

void add_to_image(CustomOps& ops, const OrtApi& api) { add_all<ToImage, float, float16, bfloat16>(ops, api); }

}  // namespace scm
