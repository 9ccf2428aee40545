// Convolutions and matrix products on CUDA, alone and with the operation that follows: Conv3x3 of the domain scm.channels_last, and the domain scm.fused.
#include "common/columns.h"
#include "convolution/layer.h"
#include "mp_sum/blend.h"
#include "norm_modulate_silu/operands.h"
#include "ops.h"

namespace scm {
namespace {

using convolution::Epilogue;

struct Conv3x3 {
  static constexpr const char* kName = "Conv3x3";
  static constexpr std::array kInputs{Argument{"x"}, Argument{"w"}};
  static constexpr std::array kOutputs{Argument{"y"}};
  static constexpr std::array<Inplace, 0> kInplace{};

  ConvolutionLayer layer;

  explicit Conv3x3(const Attributes& attributes) : layer(attributes, 9) {}

  Shapes infer(const Shapes& inputs) const {
    layer.check(inputs[0], inputs[1]);
    return {layer.output(inputs[0], inputs[1])};
  }

  template <typename T>
  void cuda(Context& run) const {
    const Input x = run.input(0), w = run.input(1);
    Memory weight;
    auto p = layer.params<T>(run, x, w, weight);
    p.y = run.output<T>(0, infer({x.shape, w.shape})[0]);
    layer.run(run, p);
  }
};

struct Conv3x3ModulateSiLU {
  static constexpr const char* kName = "Conv3x3ModulateSiLU";
  static constexpr std::array kInputs{Argument{"x"}, Argument{"w"}, Argument{"scales"}};
  static constexpr std::array kOutputs{Argument{"z"}};
  static constexpr std::array<Inplace, 0> kInplace{};

  ConvolutionLayer layer;
  Columns columns;

  explicit Conv3x3ModulateSiLU(const Attributes& attributes) : layer(attributes, 9), columns(attributes) {}

  Shapes infer(const Shapes& inputs) const {
    const Shape &x = inputs[0], &w = inputs[1];
    layer.check(x, w);
    columns.check("scales", inputs[2], x.ranked ? x[0] : Dim{}, w.ranked ? w[0] : Dim{}, "the outputs of w");
    return {layer.output(x, w)};
  }

  template <typename T>
  void cuda(Context& run) const {
    const Input x = run.input(0), w = run.input(1), scales = run.input(2);
    const Shape y = infer({x.shape, w.shape, scales.shape})[0];
    Memory weight;
    auto p = layer.params<T>(run, x, w, weight);
    p.y = run.output<T>(0, y);
    p.epilogue = Epilogue::modulate_silu;
    p.scales = scales.as<T>() + columns.begin;
    p.scales_stride = scales.shape[1].value;
    layer.run(run, p);
  }
};

// Base of the layers whose result is added to a skip connection.
template <int kTaps>
struct LayerMPSum {
  static constexpr std::array kInputs{Argument{"x"}, Argument{"w"}, Argument{"skip"}};
  static constexpr std::array kOutputs{Argument{"z"}};
  static constexpr std::array kInplace{Inplace{2, 0}};

  ConvolutionLayer layer;
  Blend blend;

  explicit LayerMPSum(const Attributes& attributes) : layer(attributes, kTaps), blend(attributes) {}

  Shapes infer(const Shapes& inputs) const {
    layer.check(inputs[0], inputs[1]);
    const Shape y = layer.output(inputs[0], inputs[1]);
    check_same("the product", y, "skip", inputs[2]);
    return {y};
  }

  template <typename T>
  void cuda(Context& run) const {
    const Input x = run.input(0), w = run.input(1), skip = run.input(2);
    const Shape y = infer({x.shape, w.shape, skip.shape})[0];
    Memory weight;
    auto p = layer.params<T>(run, x, w, weight);
    p.y = run.output<T>(0, y);
    p.epilogue = Epilogue::mp_sum;
    p.skip = skip.as<T>();
    p.weight_skip = blend.weight_a;
    p.weight_sum = blend.weight_b;
    p.clip = blend.clip;
    layer.run(run, p);
  }
};

struct Conv3x3MPSum : LayerMPSum<9> {
  static constexpr const char* kName = "Conv3x3MPSum";
  using LayerMPSum::LayerMPSum;
};

struct MatMulMPSum : LayerMPSum<1> {
  static constexpr const char* kName = "MatMulMPSum";
  using LayerMPSum::LayerMPSum;
};

struct NormModulateSiLU : norm_modulate_silu::Operands {
  Columns columns;

  explicit NormModulateSiLU(const Attributes& attributes) : Operands(attributes), columns(attributes) {}

  Shapes infer(const Shapes& inputs) const {
    const Shape& y = inputs[0];
    check(y);
    columns.check("modulation", inputs[1], y.ranked ? y[0] : Dim{}, y.ranked ? sum(y.back(), y.back()) : Dim{}, "twice the channels of y");
    return {y};
  }

  template <typename T>
  void cuda(Context& run) const {
    const Input y = run.input(0), modulation = run.input(1);
    infer({y.shape, modulation.shape});
    const auto p = params<T>(run, y, modulation, columns.begin);
    if (p.samples * p.pixels > 0) check_launch(norm_modulate_silu::cuda(p, run.cuda_stream()));
  }
};

template <class Op>
void add_on_cuda(CustomOps& ops, const OrtApi& api) {
  add<Op, float16, Device::cuda>(ops, api, kCudaProviders);
  add<Op, bfloat16, Device::cuda>(ops, api, kCudaProviders);
}

}  // namespace

void add_convolution(CustomOps& ops, const OrtApi& api) { add_on_cuda<Conv3x3>(ops, api); }

void add_fused(CustomOps& ops, const OrtApi& api) {
  add_on_cuda<Conv3x3ModulateSiLU>(ops, api);
  add_on_cuda<Conv3x3MPSum>(ops, api);
  add_on_cuda<MatMulMPSum>(ops, api);
  add_on_cuda<NormModulateSiLU>(ops, api);
}

}  // namespace scm
