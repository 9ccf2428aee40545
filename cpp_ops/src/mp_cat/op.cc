#include "mp_cat/op.h"

#include <cmath>

#include "ops.h"

namespace scm {
namespace {

struct MPCat {
  static constexpr const char* kName = "MPCat";
  static constexpr std::array kInputs{Argument{"a"}, Argument{"b"}};
  static constexpr std::array kOutputs{Argument{"y"}, Argument{"activated", Type::element, true}};
  static constexpr std::array<Inplace, 0> kInplace{};

  float t;

  explicit MPCat(const Attributes& attributes) : t(attributes.real("t")) {}

  Shapes infer(const Shapes& inputs) const {
    const Shape &a = inputs[0], &b = inputs[1];
    check_rank_at_least("a", a, 1);
    check_has_channels("a", a);
    check_has_channels("b", b);
    if (!a.ranked || !b.ranked) return {Shape{{}, false}, Shape{{}, false}};
    check_rank("b", b, a.rank());
    for (std::size_t axis = 0; axis + 1 < a.rank(); ++axis) check_dim("b", b, axis, a[axis], "as in a");
    Shape y = a;
    y.dims.back() = sum(a.back(), b.back());
    return {y, y};
  }

  template <typename T>
  mp_cat::Params<T> params(Context& run) const {
    const Input a = run.input(0), b = run.input(1);
    const Shapes outputs = infer({a.shape, b.shape});
    T* y = run.output<T>(0, outputs[0]);
    T* activated = run.output<T>(1, outputs[1]);
    const std::int64_t channels_a = a.shape.back().value, channels_b = b.shape.back().value;
    const double scale = std::sqrt(static_cast<double>(channels_a + channels_b) / ((1.0 - t) * (1.0 - t) + double{t} * t));
    const auto scale_a = static_cast<float>(scale * (1.0 - t) / std::sqrt(static_cast<double>(channels_a)));
    const auto scale_b = static_cast<float>(scale * t / std::sqrt(static_cast<double>(channels_b)));
    return {a.as<T>(), b.as<T>(), y, activated, elements(a.shape) / channels_a, channels_a, channels_b, scale_a, scale_b};
  }

  template <typename T>
  void cpu(Context& run) const {
    const auto p = params<T>(run);
    run_on_cpu(run, p, mp_cat::cpu_kernel<T>(), p.rows, grain_in_rows(p.channels_a + p.channels_b));
  }

  template <typename T>
  void cuda(Context& run) const {
    const auto p = params<T>(run);
    if (p.rows > 0) check_launch(mp_cat::cuda(p, run.cuda_stream()));
  }
};

}  // namespace

void add_mp_cat(CustomOps& ops, const OrtApi& api) { add_all<MPCat, float, float16, bfloat16>(ops, api); }

}  // namespace scm
