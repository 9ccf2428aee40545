// The convolutions and matrix products of the domains scm.channels_last and scm.channels_first in float32, and the layers of scm.fused with a convolution.
#include "common/columns.h"
#include "dense/layer.h"
#include "mp_sum/blend.h"
#include "ops.h"
#include "product/run.h"
#include "winograd/run.h"

namespace scm {
namespace {

using winograd::Epilogue;

// Returns the parameters of a convolution of channels-last maps, except y and those of the epilogue.
template <typename T>
winograd::Params<T> convolution(const Input& x, const Input& w) {
  const dense::Sizes s = dense::Conv3x3::sizes(x.shape, w.shape);
  winograd::Params<T> p{};
  p.x = x.as<T>();
  p.weight = w.as<T>();
  p.sizes = {s.samples, s.height, s.width, s.in_channels, s.out_channels};
  return p;
}

struct Conv3x3 : dense::Conv3x3 {
  using dense::Conv3x3::Conv3x3;

  template <typename T>
  void cpu(Context& run) const {
    const Input x = run.input(0), w = run.input(1);
    const Shape y = infer({x.shape, w.shape})[0];
    auto p = convolution<T>(x, w);
    p.y = run.output<T>(0, y);
    winograd::run(run, p);
  }
};

struct Conv : dense::Conv {
  using dense::Conv::Conv;

  template <typename T>
  void cpu(Context& run) const {
    const Input x = run.input(0), w = run.input(1), b = run.input(2);
    const Shape shape = infer({x.shape, w.shape, b.shape})[0];
    T* const y = run.output<T>(0, shape);
    const dense::Sizes s = sizes(x.shape, w.shape);
    if (s.kernel_size == 1) {
      product::run(run, product::conv1x1(x.as<T>(), w.as<T>(), b.as<T>(), y, s.samples, s.in_channels, s.out_channels, s.height * s.width));
      return;
    }
    winograd::Params<T> p{};
    p.x = x.as<T>();
    p.weight = w.as<T>();
    p.bias = b.as<T>();
    p.y = y;
    p.sizes = {s.samples, s.height, s.width, s.in_channels, s.out_channels};
    p.channels_first = true;
    winograd::run(run, p);
  }
};

struct Conv3x3ModulateSiLU {
  static constexpr const char* kName = "Conv3x3ModulateSiLU";
  static constexpr std::array kInputs{Argument{"x"}, Argument{"w"}, Argument{"scales"}};
  static constexpr std::array kOutputs{Argument{"z"}};
  static constexpr std::array<Inplace, 0> kInplace{};

  dense::Conv3x3 layer;
  Columns columns;

  explicit Conv3x3ModulateSiLU(const Attributes& attributes) : layer(attributes), columns(attributes) {}

  Shapes infer(const Shapes& inputs) const {
    const Shape &x = inputs[0], &w = inputs[1];
    const Shapes z = layer.infer({x, w});
    columns.check("scales", inputs[2], x.ranked ? x[0] : Dim{}, w.ranked ? w[0] : Dim{}, "the outputs of w");
    return z;
  }

  template <typename T>
  void cpu(Context& run) const {
    const Input x = run.input(0), w = run.input(1), scales = run.input(2);
    const Shape z = infer({x.shape, w.shape, scales.shape})[0];
    auto p = convolution<T>(x, w);
    p.y = run.output<T>(0, z);
    p.epilogue = Epilogue::modulate_silu;
    p.scales = scales.as<T>() + columns.begin;
    p.scales_stride = scales.shape[1].value;
    winograd::run(run, p);
  }
};

struct Conv3x3MPSum {
  static constexpr const char* kName = "Conv3x3MPSum";
  static constexpr std::array kInputs{Argument{"x"}, Argument{"w"}, Argument{"skip"}};
  static constexpr std::array kOutputs{Argument{"z"}};
  static constexpr std::array kInplace{Inplace{2, 0}};

  dense::Conv3x3 layer;
  Blend blend;

  explicit Conv3x3MPSum(const Attributes& attributes) : layer(attributes), blend(attributes) {}

  Shapes infer(const Shapes& inputs) const {
    const Shapes z = layer.infer({inputs[0], inputs[1]});
    check_same("the product", z[0], "skip", inputs[2]);
    return z;
  }

  template <typename T>
  void cpu(Context& run) const {
    const Input x = run.input(0), w = run.input(1), skip = run.input(2);
    const Shape z = infer({x.shape, w.shape, skip.shape})[0];
    auto p = convolution<T>(x, w);
    p.y = run.output<T>(0, z);
    p.epilogue = Epilogue::mp_sum;
    p.skip = skip.as<T>();
    p.weight_skip = blend.weight_a;
    p.weight_sum = blend.weight_b;
    p.clip = blend.clip;
    winograd::run(run, p);
  }
};

template <class Op>
void add_in_float32(CustomOps& ops, const OrtApi& api) {
  add<Op, float, Device::cpu>(ops, api, kCpuProviders);
  add<Op, float16, Device::cpu>(ops, api, kCpuProviders);
}

}  // namespace

bool has_float32_kernels() { return winograd::available(); }

void add_float32_channels_last(CustomOps& ops, const OrtApi& api) { add_in_float32<Conv3x3>(ops, api); }

void add_float32_channels_first(CustomOps& ops, const OrtApi& api) { add_in_float32<Conv>(ops, api); }

void add_float32_fused(CustomOps& ops, const OrtApi& api) {
  add_in_float32<Conv3x3ModulateSiLU>(ops, api);
  add_in_float32<Conv3x3MPSum>(ops, api);
}

}  // namespace scm
