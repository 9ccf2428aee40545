// The operators of scm.channels_last and scm.fused for CUDA: their shapes, attributes, weights, workspace and errors, with the kernels run by simulator.h and on
// the fake ONNX Runtime. convolution_test.cc has the kernels' arithmetic.
#include <cmath>
#include <cstdlib>

#include "ops.h"
#include "simulator.h"
#include "support.h"

namespace scm::testing {
namespace {

constexpr float kClip = 0.5f, kBalance = 0.3f, kEps = 1e-4f;
const Attributes kBlend{{"t", kBalance}, {"clip", kClip}};

Attributes columns(std::int64_t begin, std::int64_t end) { return {{"begin", std::vector<std::int64_t>{begin}}, {"end", std::vector<std::int64_t>{end}}}; }

const CustomOps& registered() {
  static const CustomOps ops = [] {
    CustomOps all;
    add_convolution(all, fake_ort::api());
    add_fused(all, fake_ort::api());
    return all;
  }();
  return ops;
}

const OrtCustomOp& op_of(const std::string& name) {
  for (const auto& op : registered()) {
    if (op->GetName(op.get()) == name && op->GetInputType(op.get(), 0) == kHalf) return *op;
  }
  throw std::out_of_range(name);
}

Options constant_weight(int inplace_input = -1) {
  Options options;
  options.constant = 1;
  options.inplace_input = inplace_input;
  return options;
}

// The sums of a layer, unrounded. w is [out, in, 3, 3] for four axes, [in, out] for two.
Values sums(const Tensor& x_tensor, const Tensor& w_tensor) {
  const Values x = values(x_tensor), w = values(w_tensor);
  const bool conv = w_tensor.shape.size() == 4;
  const std::int64_t in = x_tensor.shape.back(), out = w_tensor.shape[conv ? 0 : 1];
  const std::int64_t height = conv ? x_tensor.shape[1] : 1, width = conv ? x_tensor.shape[2] : 1, reach = conv ? 1 : 0;
  const std::int64_t rows = elements(x_tensor.shape) / in;
  Values y;
  for (std::int64_t row = 0; row < rows; ++row) {
    const std::int64_t j = row % width, i = row / width % height;
    for (std::int64_t o = 0; o < out; ++o) {
      double sum = 0;
      for (std::int64_t di = -reach; di <= reach; ++di) {
        for (std::int64_t dj = -reach; dj <= reach; ++dj) {
          if (i + di < 0 || i + di >= height || j + dj < 0 || j + dj >= width) continue;
          for (std::int64_t c = 0; c < in; ++c) {
            const std::int64_t weight = conv ? ((o * in + c) * 3 + di + 1) * 3 + dj + 1 : c * out + o;
            sum += x[static_cast<std::size_t>((row + di * width + dj) * in + c)] * w[static_cast<std::size_t>(weight)];
          }
        }
      }
      y.push_back(sum);
    }
  }
  return y;
}

Values blended(const Values& skip, const Values& y) {
  const double scale = 1 / std::hypot(1 - static_cast<double>(kBalance), static_cast<double>(kBalance));
  Values blend;
  for (std::size_t i = 0; i < y.size(); ++i) {
    const double sum = ((1 - static_cast<double>(kBalance)) * skip[i] + static_cast<double>(kBalance) * y[i]) * scale;
    blend.push_back(std::min(std::max(sum, -static_cast<double>(kClip)), static_cast<double>(kClip)));
  }
  return blend;
}

// Runs with constant weights, and expects the same bits from weights that are not constant.
Tensor run(const std::string& name, const std::vector<Tensor>& inputs, const Attributes& attributes, int inplace_input = -1) {
  const Outcome outcome = fake_ort::run(op_of(name), inputs, attributes, constant_weight(inplace_input));
  EXPECT_EQ(outcome.error, "");
  if (outcome.outputs.empty()) return {};
  Options not_constant;
  not_constant.inplace_input = inplace_input;
  const Outcome other = fake_ort::run(op_of(name), inputs, attributes, not_constant);
  EXPECT_EQ(other.error, "");
  expect_same_bits(other.outputs.at(0), outcome.outputs.at(0));
  return outcome.outputs[0];
}

TEST(ConvolutionOpTest, AllAreRegisteredForBothCudaProvidersInBothHalfPrecisions) {
  std::map<std::string, int> variants;
  for (const auto& op : registered()) {
    ++variants[op->GetName(op.get())];
    EXPECT_NE(std::string(op->GetExecutionProviderType(op.get())), "CPUExecutionProvider");
    EXPECT_NE(op->GetInputType(op.get(), 0), kFloat);
  }
  const std::map<std::string, int> expected{{"Conv3x3", 4}, {"Conv3x3ModulateSiLU", 4}, {"Conv3x3MPSum", 4}, {"MatMulMPSum", 4}, {"NormModulateSiLU", 4}};
  EXPECT_EQ(variants, expected);
}

TEST(ConvolutionOpTest, Conv3x3FollowsItsFormula) {
  for (const Sizes& x_shape : {Sizes{2, 5, 3, 8}, Sizes{1, 8, 8, 40}, Sizes{3, 1, 1, 5}, Sizes{0, 4, 4, 8}}) {
    SCOPED_TRACE(text(x_shape));
    const Tensor x = random(kHalf, x_shape), w = random(kHalf, {12, x_shape[3], 3, 3}, 0.1, 1);
    expect_close(run("Conv3x3", {x, w}, {}), {x_shape[0], x_shape[1], x_shape[2], 12}, sums(x, w), 1e-5);
  }
}

TEST(ConvolutionOpTest, SplitSumsAreReproducible) {
  const Tensor x = random(kHalf, {1, 4, 4, 512}), w = random(kHalf, {16, 512, 3, 3}, 0.01, 1);  // few tiles, long sums
  const Tensor y = run("Conv3x3", {x, w}, {});
  expect_close(y, {1, 4, 4, 16}, sums(x, w), 1e-5);
  Options several = constant_weight();
  several.earlier_runs = 2;  // which leave the kernel's counters at zero
  const Outcome last = fake_ort::run(op_of("Conv3x3"), {x, w}, {}, several);
  EXPECT_EQ(last.error, "");
  expect_same_bits(last.outputs.at(0), y);
}

TEST(ConvolutionOpTest, TheEnvironmentReplacesTheChosenTile) {
  const Tensor x = random(kHalf, {1, 4, 4, 64}), w = random(kHalf, {16, 64, 3, 3}, 0.1, 1);
  const auto with_tile = [&](const char* value) {
    ::setenv("SCM_CONVOLUTION_TILE", value, 1);
    const Outcome outcome = fake_ort::run(op_of("Conv3x3"), {x, w}, {}, constant_weight());
    ::unsetenv("SCM_CONVOLUTION_TILE");
    return outcome;
  };
  for (const char* value : {"0,1", "2,4", "3,9"}) {
    SCOPED_TRACE(value);
    const Outcome outcome = with_tile(value);
    ASSERT_EQ(outcome.error, "");
    expect_close(outcome.outputs.at(0), {1, 4, 4, 16}, sums(x, w), 1e-5);
  }
  for (const char* value : {"", "2", "2,0", "2,17", "-1,1", "99,1", "2,4,1", "large"}) {
    EXPECT_NE(with_tile(value).error.find("SCM_CONVOLUTION_TILE must be the number of a tile"), std::string::npos) << value;
  }
}

TEST(ConvolutionOpTest, Conv3x3ModulateSiLUTakesItsColumnsOfTheScales) {
  const Tensor x = random(kHalf, {2, 3, 4, 8}), w = random(kHalf, {10, 8, 3, 3}, 0.1, 1), scales = random(kHalf, {2, 37}, 1, 2);
  for (const std::int64_t begin : {0, 8, 27}) {
    SCOPED_TRACE(begin);
    Values expected = sums(x, w);
    for (std::size_t i = 0; i < expected.size(); ++i) expected[i] *= values(scales)[i / (3 * 4 * 10) * 37 + static_cast<std::size_t>(begin) + i % 10];
    expect_close(run("Conv3x3ModulateSiLU", {x, w, scales}, columns(begin, begin + 10)), {2, 3, 4, 10}, mp_silu(expected), 1e-5);
  }
}

TEST(ConvolutionOpTest, Conv3x3MPSumAddsTheSkipConnectionAlsoInPlace) {
  const Tensor x = random(kHalf, {2, 3, 4, 8}), w = random(kHalf, {10, 8, 3, 3}, 0.1, 1), skip = random(kHalf, {2, 3, 4, 10}, 1, 2);
  const Tensor y = run("Conv3x3MPSum", {x, w, skip}, kBlend);
  expect_close(y, {2, 3, 4, 10}, blended(values(skip), sums(x, w)), 1e-5);
  const Outcome in_place = fake_ort::run(op_of("Conv3x3MPSum"), {x, w, skip}, kBlend, constant_weight(2));
  EXPECT_EQ(in_place.error, "");
  expect_same_bits(in_place.outputs.at(0), y);
}

TEST(ConvolutionOpTest, MatMulMPSumTakesRowsOfAnyRank) {
  for (const Sizes& rows : {Sizes{}, Sizes{3}, Sizes{2, 5}, Sizes{2, 3, 4}, Sizes{0, 5}}) {
    Sizes x_shape = rows, y_shape = rows;
    x_shape.push_back(24);
    y_shape.push_back(10);
    SCOPED_TRACE(text(x_shape));
    const Tensor x = random(kHalf, x_shape), w = random(kHalf, {24, 10}, 0.2, 1), skip = random(kHalf, y_shape, 1, 2);
    expect_close(run("MatMulMPSum", {x, w, skip}, kBlend), y_shape, blended(values(skip), sums(x, w)), 1e-5);
  }
}

TEST(ConvolutionOpTest, NormModulateSiLUTakesItsColumnsOfTheModulation) {
  const Tensor y = random(kHalf, {2, 3, 5}), modulation = random(kHalf, {2, 25}, 1, 1);
  Attributes attributes = columns(7, 17);
  attributes["eps"] = kEps;
  const Outcome outcome = fake_ort::run(op_of("NormModulateSiLU"), {y, modulation}, attributes);
  EXPECT_EQ(outcome.error, "");
  Values used;
  for (std::size_t sample = 0; sample < 2; ++sample) {
    for (std::size_t column = 7; column < 17; ++column) used.push_back(values(modulation)[sample * 25 + column]);
  }
  const Values normed = pixel_norm(used, 5, kEps);
  Values expected = pixel_norm(values(y), 5, kEps);
  for (std::size_t i = 0; i < expected.size(); ++i) expected[i] = expected[i] * normed[i / 15 * 10 + i % 5] + normed[i / 15 * 10 + 5 + i % 5];
  expect_close(outcome.outputs.at(0), {2, 3, 5}, mp_silu(expected), 1e-4);
}

TEST(ConvolutionOpTest, InfersShapes) {
  const auto inferred = [](const std::string& name, const std::vector<Spec>& inputs, const Attributes& attributes) {
    const fake_ort::Inference inference = fake_ort::infer(op_of(name), inputs, attributes);
    return inference.error.empty() ? inference.outputs.at(0).shape : inference.error;
  };
  const Spec x{kHalf, "[batch, 8, H, 16]"}, w{kHalf, "[4, 16, 3, 3]"};
  EXPECT_EQ(inferred("Conv3x3", {x, w}, {}), "[batch, 8, H, 4]");
  EXPECT_EQ(inferred("Conv3x3", {{kHalf, "?"}, w}, {}), "?");
  EXPECT_EQ(inferred("Conv3x3ModulateSiLU", {x, w, {kHalf, "[batch, 100]"}}, columns(8, 12)), "[batch, 8, H, 4]");
  EXPECT_EQ(inferred("Conv3x3MPSum", {x, w, {kHalf, "[batch, 8, H, 4]"}}, kBlend), "[batch, 8, H, 4]");
  EXPECT_EQ(inferred("MatMulMPSum", {{kHalf, "[batch, 16]"}, {kHalf, "[16, 4]"}, {kHalf, "[batch, 4]"}}, kBlend), "[batch, 4]");
}

TEST(ConvolutionOpTest, RejectsShapesAndAttributesThatDoNotFit) {
  const Tensor x = random(kHalf, {2, 3, 4, 8}), w = random(kHalf, {10, 8, 3, 3}), scales = random(kHalf, {2, 30}), skip = random(kHalf, {2, 3, 4, 10});
  struct Case {
    std::string op;
    std::vector<Tensor> inputs;
    Attributes attributes;
    std::string error;
  };
  const std::vector<std::int64_t> two{0, 1};
  for (const auto& [name, inputs, attributes, error] : std::vector<Case>{
           {"Conv3x3", {x, random(kHalf, {10, 7, 3, 3})}, {}, "w must have 8 (the channels of x) on axis 1, got the shape [10, 7, 3, 3]"},
           {"Conv3x3", {random(kHalf, {2, 3, 4, 0}), random(kHalf, {10, 0, 3, 3})}, {}, "x must have at least 1 channel, got the shape [2, 3, 4, 0]"},
           {"Conv3x3", {random(kHalf, {3, 4, 8}), w}, {}, "x must have 4 axes, got the shape [3, 4, 8]"},
           {"Conv3x3", {x, random(kHalf, {10, 8, 1, 3})}, {}, "w must have 3 (the kernel height) on axis 2"},
           {"Conv3x3ModulateSiLU", {x, w, scales}, columns(21, 31), "scales must have at least end = 31 columns, got the shape [2, 30]"},
           {"Conv3x3ModulateSiLU", {x, w, scales}, columns(0, 9), "end - begin must be 10 (the outputs of w), got 9"},
           {"Conv3x3ModulateSiLU", {x, w, scales}, columns(9, 3), "begin and end must be columns, got 9 and 3"},
           {"Conv3x3ModulateSiLU", {x, w, scales}, {{"begin", two}, {"end", two}}, "begin must have 1 element, got 2"},
           {"Conv3x3ModulateSiLU", {x, w, random(kHalf, {3, 30})}, columns(0, 10), "scales must have 2 (the samples) on axis 0, got the shape [3, 30]"},
           {"Conv3x3MPSum", {x, w, scales}, kBlend, "skip must have the shape of the product, [2, 3, 4, 10], got the shape [2, 30]"},
           {"Conv3x3MPSum", {x, w, skip}, {{"t", kBalance}, {"clip", -1.0f}}, "clip must be at least 0, got -1"},
           {"MatMulMPSum", {x, random(kHalf, {9, 10}), skip}, kBlend, "w must have 8 (the channels of x) on axis 0, got the shape [9, 10]"},
       }) {
    SCOPED_TRACE(error);
    const Outcome outcome = fake_ort::run(op_of(name), inputs, attributes, constant_weight());
    EXPECT_NE(outcome.error.find("scm::" + name + ": " + error), std::string::npos) << outcome.error;
    std::vector<Spec> specs;
    for (const Tensor& input : inputs) specs.push_back(fake_ort::spec(input));
    EXPECT_NE(fake_ort::infer(op_of(name), specs, attributes).error.find(error), std::string::npos);
  }
}

TEST(ConvolutionOpTest, ReportsARefusedLaunchAndAnOldGpu) {
  const std::vector<Tensor> inputs{random(kHalf, {1, 2, 2, 8}), random(kHalf, {4, 8, 3, 3})};
  simulator::options.refuse_launches = true;
  EXPECT_NE(fake_ort::run(op_of("Conv3x3"), inputs, {}, {}).error.find("CUDA: unspecified launch failure with input shapes [1, 2, 2, 8], [4, 8, 3, 3]"), std::string::npos);
  simulator::options = {};
  simulator::options.major_capability = 7;
  EXPECT_NE(fake_ort::run(op_of("Conv3x3"), inputs, {}, {}).error.find("compute capability 8.0 or newer, got 7.0"), std::string::npos);
  simulator::options = {};
}

// fake_ort::run expects that nothing leaks and no exception escapes.
TEST(ConvolutionOpTest, EveryCallOfTheApiMayFail) {
  const std::vector<Tensor> inputs{random(kHalf, {1, 4, 4, 512}), random(kHalf, {16, 512, 3, 3}, 0.01), random(kHalf, {1, 16})};
  for (const int constant : {-1, 1}) {
    int failures = 0;
    for (std::string error = "none";; ++failures) {
      Options options;
      options.constant = constant;
      options.failing_call = failures;
      error = fake_ort::run(op_of("Conv3x3ModulateSiLU"), inputs, columns(0, 16), options).error;
      if (error.empty()) break;
      EXPECT_NE(error.find("injected failure"), std::string::npos) << error;
    }
    EXPECT_GT(failures, 20);
  }
}

}  // namespace
}  // namespace scm::testing
