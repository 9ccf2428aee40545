// Conv3x3 and MatMul of the domain scm.channels_last, and Conv of scm.channels_first, with the kernels that the library registers on this processor: with
// bfloat16 instructions, or in float32. SCM_OPS_MAX_ISA selects others.
#include <cmath>

#include "support.h"

namespace scm::testing {
namespace {

// Reference convolution of channels-last x. w is [outputs, inputs, kernel_size, kernel_size]. kernel_size 0 means a matrix product with w [inputs, outputs].
Values convolution(const Values& x, const Sizes& map, const Values& w, std::int64_t outputs, std::int64_t kernel_size) {
  const bool is_matmul = kernel_size == 0;
  if (is_matmul) kernel_size = 1;
  const std::int64_t height = map[1], width = map[2], inputs = map[3], pad = kernel_size / 2;
  Values y;
  for (std::int64_t n = 0; n < map[0]; ++n) {
    for (std::int64_t h = 0; h < height; ++h) {
      for (std::int64_t v = 0; v < width; ++v) {
        for (std::int64_t o = 0; o < outputs; ++o) {
          double sum = 0;
          for (std::int64_t tap = 0; tap < kernel_size * kernel_size; ++tap) {
            const std::int64_t row = h + tap / kernel_size - pad, column = v + tap % kernel_size - pad;
            if (row < 0 || row >= height || column < 0 || column >= width) continue;
            for (std::int64_t c = 0; c < inputs; ++c) {
              sum += x[static_cast<std::size_t>(((n * height + row) * width + column) * inputs + c)] * w[static_cast<std::size_t>(is_matmul ? c * outputs + o : (o * inputs + c) * kernel_size * kernel_size + tap)];
            }
          }
          y.push_back(sum);
        }
      }
    }
  }
  return y;
}

// Transposes [N, C, P] to [N, P, C].
Values transposed(const Values& from, std::int64_t samples, std::int64_t channels, std::int64_t pixels) {
  Values to;
  for (std::int64_t n = 0; n < samples; ++n) {
    for (std::int64_t p = 0; p < pixels; ++p) {
      for (std::int64_t c = 0; c < channels; ++c) to.push_back(from[static_cast<std::size_t>((n * channels + c) * pixels + p)]);
    }
  }
  return to;
}

struct Case {
  std::string op;
  Sizes x, w;

  bool channels_first() const { return op == "Conv"; }
  std::int64_t outputs() const { return w.size() == 2 ? w.back() : w.front(); }

  std::vector<Tensor> inputs(ONNXTensorElementDataType type) const {
    std::vector<Tensor> tensors{random(type, x), random(type, w)};
    if (channels_first()) tensors.push_back(random(type, {outputs()}));
    return tensors;
  }

  fake_ort::Attributes attributes() const {
    if (!channels_first()) return {};
    return {{"pads", std::vector<std::int64_t>(4, w[2] / 2)}};
  }

  Values expected(const std::vector<Tensor>& in) const {
    if (!channels_first()) {
      const bool is_matmul = w.size() == 2;
      const Sizes shape = is_matmul ? Sizes{1, 1, elements(x) / x.back(), x.back()} : x;
      return convolution(values(in[0]), shape, values(in[1]), outputs(), is_matmul ? 0 : 3);
    }
    const std::int64_t pixels = x[2] * x[3];
    Values y = convolution(transposed(values(in[0]), x[0], x[1], pixels), {x[0], x[2], x[3], x[1]}, values(in[1]), outputs(), w[2]);
    const Values bias = values(in[2]);
    for (std::size_t i = 0; i < y.size(); ++i) y[i] += bias[i % bias.size()];
    return transposed(y, x[0], pixels, outputs());
  }

  Sizes y() const {
    Sizes shape = x;
    shape[channels_first() ? 1 : shape.size() - 1] = outputs();
    return shape;
  }
};

const std::vector<Case> kCases{
    {"Conv3x3", {1, 1, 1, 1}, {1, 1, 3, 3}},     {"Conv3x3", {2, 3, 5, 33}, {17, 33, 3, 3}},  {"Conv3x3", {1, 4, 4, 64}, {48, 64, 3, 3}},
    {"Conv3x3", {3, 4, 4, 32}, {32, 32, 3, 3}},  {"Conv3x3", {1, 24, 24, 40}, {65, 40, 3, 3}}, {"Conv3x3", {2, 1, 70, 5}, {4, 5, 3, 3}},
    {"MatMul", {1, 1}, {1, 1}},                  {"MatMul", {3, 5, 7, 65}, {65, 33}},          {"MatMul", {1100, 32}, {32, 16}},
    {"Conv", {1, 1, 1, 1}, {1, 1, 3, 3}},        {"Conv", {2, 33, 3, 5}, {17, 33, 3, 3}},     {"Conv", {40, 3, 1, 1}, {33, 3, 3, 3}},
    {"Conv", {3, 64, 4, 4}, {48, 64, 3, 3}},     {"Conv", {1, 40, 24, 24}, {65, 40, 3, 3}},   {"Conv", {2, 5, 1, 70}, {4, 5, 3, 3}},
    {"Conv", {40, 20, 1, 1}, {36, 20, 1, 1}},    {"Conv", {2, 65, 7, 19}, {33, 65, 1, 1}},    {"Conv", {1, 32, 33, 33}, {16, 32, 1, 1}},
    {"Conv", {2, 130, 5, 7}, {96, 130, 1, 1}},
};

// Skipped if the library has no such kernels for the processor.
template <typename T>
class DenseTest : public ::testing::Test {
 protected:
  void SetUp() override {
    if (fake_ort::library().dense_ops.empty()) GTEST_SKIP() << "the processor has neither AVX2 with FMA nor NEON";
  }
};
TYPED_TEST_SUITE(DenseTest, Elements, ElementNames);

// Returns the precisions that this processor has kernels for.
std::vector<std::string> precisions() {
  std::vector<std::string> found;
  for (const auto& product : fake_ort::library().dense_ops) found.push_back(product.first);
  return found;
}

// Without bfloat16 instructions, MatMul is ONNX Runtime's.
bool exists(const std::string& op, ONNXTensorElementDataType type, const std::string& precision) {
  return fake_ort::find(op, std::vector<ONNXTensorElementDataType>(op == "Conv" ? 3 : 2, type), precision) != nullptr;
}

Options with(const std::string& precision, int constant = -1) {
  Options options;
  options.precision = precision;
  options.constant = constant;
  return options;
}

// Factors have 16 or 8 bits, so the error of a sum is proportional to the size of its terms, not to the sum.
double tolerance(const Case& one, const Tensor& x, const Tensor& w, double relative) {
  const Values terms = values(w);
  double weight = 0, map = 0;
  for (const double value : terms) weight = std::max(weight, std::fabs(value));
  for (const double value : values(x)) map = std::max(map, std::fabs(value));
  return relative * std::sqrt(static_cast<double>(elements(one.w)) / static_cast<double>(one.outputs())) * weight * map;
}

TYPED_TEST(DenseTest, HasTheRequestedPrecision) {
  for (const Case& one : kCases) {
    const std::vector<Tensor> inputs = one.inputs(kType<TypeParam>);
    const Values expected = one.expected(inputs);
    for (const std::string& precision : precisions()) {
      if (!exists(one.op, kType<TypeParam>, precision)) continue;
      SCOPED_TRACE(one.op + " " + text(one.x) + " by " + text(one.w) + ", " + precision);
      const Outcome outcome = fake_ort::run(one.op, inputs, one.attributes(), with(precision));
      ASSERT_EQ(outcome.error, "");
      expect_close(outcome.outputs.at(0), one.y(), expected, tolerance(one, inputs[0], inputs[1], precision == "high" ? 0x1p-15 : 0x1p-7));
    }
  }
}

TYPED_TEST(DenseTest, GivesTheSameForConstantWeights) {
  for (const Case& one : kCases) {
    const std::vector<Tensor> inputs = one.inputs(kType<TypeParam>);
    for (const std::string& precision : precisions()) {
      if (!exists(one.op, kType<TypeParam>, precision)) continue;
      const Outcome packed_at_creation = fake_ort::run(one.op, inputs, one.attributes(), with(precision, 1));
      const Outcome packed_at_run = fake_ort::run(one.op, inputs, one.attributes(), with(precision));
      ASSERT_EQ(packed_at_creation.error + packed_at_run.error, "");
      expect_same_bits(packed_at_creation.outputs.at(0), packed_at_run.outputs.at(0));
    }
  }
}

TYPED_TEST(DenseTest, DoesNotDependOnThreadsOrTheRestOfTheBatch) {
  for (const Case& one : {Case{"Conv3x3", {3, 9, 11, 40}, {70, 40, 3, 3}}, Case{"Conv", {3, 40, 9, 11}, {70, 40, 3, 3}}}) {
    std::vector<Tensor> inputs = one.inputs(kType<TypeParam>);
    Options options = with(precisions().front());
    const Outcome expected = fake_ort::run(one.op, inputs, one.attributes(), options);
    ASSERT_EQ(expected.error, "");
    for (const Threads threads : {Threads::one_reversed, Threads::many}) {
      options.threads = threads;
      expect_same_bits(fake_ort::run(one.op, inputs, one.attributes(), options).outputs.at(0), expected.outputs.at(0));
    }
    const auto batch = inputs[0].bytes;
    const auto in = static_cast<std::ptrdiff_t>(batch.size() / 3), out = static_cast<std::ptrdiff_t>(expected.outputs.at(0).bytes.size() / 3);
    inputs[0].shape[0] = 1;
    for (std::ptrdiff_t sample = 0; sample < 3; ++sample) {
      inputs[0].bytes.assign(batch.begin() + sample * in, batch.begin() + (sample + 1) * in);
      const Outcome outcome = fake_ort::run(one.op, inputs, one.attributes(), with(precisions().front()));
      ASSERT_EQ(outcome.error, "");
      EXPECT_TRUE(std::equal(outcome.outputs.at(0).bytes.begin(), outcome.outputs.at(0).bytes.end(), expected.outputs.at(0).bytes.begin() + sample * out));
    }
  }
}

TYPED_TEST(DenseTest, PropagatesNaNOnlyWithinTheKernelWindow) {
  Tensor x = random(kType<TypeParam>, {1, 5, 5, 3});
  Values with_nan = values(x);
  with_nan[(2 * 5 + 2) * 3] = std::nan("");
  const Outcome outcome = fake_ort::run("Conv3x3", {tensor(x.type, x.shape, with_nan), random(x.type, {2, 3, 3, 3})}, {}, with(precisions().front()));
  const Values y = values(outcome.outputs.at(0));
  for (std::int64_t h = 0; h < 5; ++h) {
    for (std::int64_t v = 0; v < 5; ++v) {
      const bool reached = h >= 1 && h <= 3 && v >= 1 && v <= 3;
      EXPECT_EQ(std::isnan(y[static_cast<std::size_t>((h * 5 + v) * 2)]), reached) << h << ", " << v;
    }
  }
}

TYPED_TEST(DenseTest, AcceptsEmptyInputs) {
  for (const Sizes& shape : {Sizes{0, 4, 4, 3}, Sizes{2, 0, 4, 3}, Sizes{2, 4, 0, 3}}) {
    const Outcome outcome = fake_ort::run("Conv3x3", {random(kType<TypeParam>, shape), random(kType<TypeParam>, {2, 3, 3, 3})}, {}, with(precisions().front()));
    ASSERT_EQ(outcome.error, "");
    EXPECT_TRUE(outcome.outputs.at(0).bytes.empty());
  }
}

TYPED_TEST(DenseTest, RejectsInvalidShapes) {
  const auto error = [](const char* op, const Sizes& x, const Sizes& w) {
    return fake_ort::run(op, {random(kType<TypeParam>, x), random(kType<TypeParam>, w)}, {}, with(precisions().front())).error;
  };
  EXPECT_NE(error("Conv3x3", {1, 4, 4, 3}, {2, 3, 5, 3}).find("the kernel height"), std::string::npos);
  EXPECT_NE(error("Conv3x3", {1, 4, 4, 3}, {2, 4, 3, 3}).find("the channels of x"), std::string::npos);
  EXPECT_NE(error("Conv3x3", {1, 4, 4, 0}, {2, 0, 3, 3}).find("at least 1 channel"), std::string::npos);
  if (exists("MatMul", kType<TypeParam>, precisions().front())) {
    EXPECT_NE(error("MatMul", {4, 3}, {4, 2}).find("the channels of x"), std::string::npos);
    EXPECT_NE(error("MatMul", {4, 0}, {0, 2}).find("at least 1 channel"), std::string::npos);
  }
  const auto conv_error = [](const Sizes& w, const Sizes& b, const std::vector<std::int64_t>& pads) {
    const std::vector<Tensor> inputs{random(kType<TypeParam>, {1, 3, 4, 4}), random(kType<TypeParam>, w), random(kType<TypeParam>, b)};
    return fake_ort::run("Conv", inputs, {{"pads", pads}}, with(precisions().front())).error;
  };
  EXPECT_NE(conv_error({2, 3, 5, 3}, {2}, {1, 1, 1, 1}).find("the kernel height"), std::string::npos);
  EXPECT_NE(conv_error({2, 3, 1, 3}, {2}, {0, 0, 0, 0}).find("the kernel width"), std::string::npos);
  EXPECT_NE(conv_error({2, 4, 3, 3}, {2}, {1, 1, 1, 1}).find("the channels of x"), std::string::npos);
  EXPECT_NE(conv_error({2, 3, 3, 3}, {3}, {1, 1, 1, 1}).find("the outputs"), std::string::npos);
  EXPECT_NE(conv_error({2, 3, 3, 3}, {2}, {1, 0, 1, 0}).find("pads must be [0, 0, 0, 0] or [1, 1, 1, 1], got [1, 0, 1, 0]"), std::string::npos);
}

TYPED_TEST(DenseTest, TurnsFailuresOfOnnxRuntimeIntoStatuses) {
  const Tensor x = random(kType<TypeParam>, {1, 24, 24, 40}), w = random(kType<TypeParam>, {70, 40, 3, 3});
  Options options = with(precisions().front(), 1);
  for (options.failing_call = 0;; ++options.failing_call) {
    const std::string error = fake_ort::run("Conv3x3", {x, w}, {}, options).error;
    if (error.empty()) break;
    EXPECT_EQ(error, "scm::Conv3x3: injected failure") << "call " << options.failing_call;
    ASSERT_LT(options.failing_call, 100);
  }
  EXPECT_GT(options.failing_call, 15);
}

TEST(DenseRegistrationTest, AcceptsOnlyTorchsPrecisionNames) {
  const auto [error, domains] = fake_ort::register_with(18, "1.18.0", "low");
  EXPECT_EQ(error, "scm::RegisterCustomOps: scm.float32_matmul_precision must be highest, high or medium, got low");
  EXPECT_EQ(fake_ort::register_with(18, "1.18.0", "highest").second, std::vector<std::string>{"scm"});
  for (const auto& [precision, ops] : fake_ort::library().dense_ops) {
    std::vector<std::string> expected{"scm", "scm.channels_last", "scm.channels_first"};
    if (!exists("MatMul", kFloat, precision)) expected.push_back("scm.fused");  // float32: three operators alone, or two of them and two fused ones
    EXPECT_EQ(ops.size(), expected.size() == 3 ? 6u : 8u);
    EXPECT_EQ(fake_ort::register_with(18, "1.18.0", precision).second, expected);
  }
}

}  // namespace
}  // namespace scm::testing
