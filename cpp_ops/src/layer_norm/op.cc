#include "layer_norm/op.h"

#include "common/custom_op.h"
#include "ops.h"

namespace scm {
namespace {

// What the three operators share.
class RowNorm {
 public:
  static constexpr std::array kOutputs{Argument{"y"}};
  static constexpr std::array kInplace{Inplace{0, 0}};

  explicit RowNorm(const Attributes& attributes) : eps_(attributes.real("eps")) {}

 protected:
  static void check(const Shape& x) {
    check_rank_at_least("x", x, 1);
    check_has_channels("x", x);
  }

  static void check_vector(const char* name, const Shape& vector, const Shape& x) {
    check_rank(name, vector, 1);
    if (x.ranked) check_dim(name, vector, 0, x.back(), "the channels of x");
  }

  static std::int64_t samples(const Shape& x) { return x.rank() > 1 ? x[0].value : 1; }

  template <typename T>
  layer_norm::Params<T> params(Context& run, const Input& x, bool subtracts_mean) const {
    const Shape& shape = x.shape;
    const std::int64_t rows = shape.rank() > 1 ? elements(shape, 1, shape.rank() - 1) : 1;
    return {x.as<T>(), nullptr, nullptr, nullptr, nullptr, run.output<T>(0, shape), samples(shape), rows, shape.back().value, eps_, subtracts_mean};
  }

 private:
  float eps_;
};

// Runs the kernels of an operator that has `template <typename T> layer_norm::Params<T> params(Context&) const`.
template <class Op>
struct RunsKernels : RowNorm {
  using RowNorm::RowNorm;

  template <typename T>
  void cpu(Context& run) const {
    const auto p = static_cast<const Op&>(*this).template params<T>(run);
    run_on_cpu(run, p, layer_norm::cpu_kernel<T>(), p.samples * p.rows, grain_in_rows(p.channels));
  }

  template <typename T>
  void cuda(Context& run) const {
    const auto p = static_cast<const Op&>(*this).template params<T>(run);
    if (p.samples * p.rows > 0) check_launch(layer_norm::cuda(p, run.cuda_stream()));
  }
};

struct LayerNorm : RunsKernels<LayerNorm> {
  static constexpr const char* kName = "LayerNorm";
  static constexpr std::array kInputs{Argument{"x"}, Argument{"scale", Type::float32}, Argument{"bias", Type::float32}};

  using RunsKernels::RunsKernels;

  Shapes infer(const Shapes& inputs) const {
    check(inputs[0]);
    check_vector("scale", inputs[1], inputs[0]);
    check_vector("bias", inputs[2], inputs[0]);
    return {inputs[0]};
  }

  template <typename T>
  layer_norm::Params<T> params(Context& run) const {
    const Input x = run.input(0), scale = run.input(1), bias = run.input(2);
    infer({x.shape, scale.shape, bias.shape});
    auto p = RowNorm::params<T>(run, x, true);
    p.scale = scale.as<float>();
    p.bias = bias.as<float>();
    return p;
  }
};

struct LayerNormModulate : RunsKernels<LayerNormModulate> {
  static constexpr const char* kName = "LayerNormModulate";
  static constexpr std::array kInputs{Argument{"x"}, Argument{"scale"}, Argument{"shift"}};

  using RunsKernels::RunsKernels;

  Shapes infer(const Shapes& inputs) const {
    const Shape& x = inputs[0];
    check(x);
    check_rank("x", x, 3);
    for (const auto& [name, shape] : {std::pair{"scale", inputs[1]}, std::pair{"shift", inputs[2]}}) {
      check_rank(name, shape, 3);
      if (x.ranked) check_dim(name, shape, 0, x[0], "the samples of x");
      check_dim(name, shape, 1, Dim{1}, "one row per sample");
      if (x.ranked) check_dim(name, shape, 2, x.back(), "the channels of x");
    }
    return {x};
  }

  template <typename T>
  layer_norm::Params<T> params(Context& run) const {
    const Input x = run.input(0), scale = run.input(1), shift = run.input(2);
    infer({x.shape, scale.shape, shift.shape});
    auto p = RowNorm::params<T>(run, x, true);
    p.modulation_scale = scale.as<T>();
    p.modulation_shift = shift.as<T>();
    return p;
  }
};

struct RMSNorm : RunsKernels<RMSNorm> {
  static constexpr const char* kName = "RMSNorm";
  static constexpr std::array kInputs{Argument{"x"}, Argument{"scale", Type::float32}};

  using RunsKernels::RunsKernels;

  Shapes infer(const Shapes& inputs) const {
    check(inputs[0]);
    check_vector("scale", inputs[1], inputs[0]);
    return {inputs[0]};
  }

  template <typename T>
  layer_norm::Params<T> params(Context& run) const {
    const Input x = run.input(0), scale = run.input(1);
    infer({x.shape, scale.shape});
    auto p = RowNorm::params<T>(run, x, false);
    p.scale = scale.as<float>();
    return p;
  }
};

}  // namespace

void add_layer_norm(CustomOps& ops, const OrtApi& api) {
  add_all<LayerNorm, float, float16, bfloat16>(ops, api);
  add_all<LayerNormModulate, float, float16, bfloat16>(ops, api);
  add_all<RMSNorm, float, float16, bfloat16>(ops, api);
}

}  // namespace scm
