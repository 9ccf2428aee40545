// Conv3x3 and MatMul of the domain scm.channels_last, where the processor multiplies bfloat16.
#include <cmath>

#include "support.h"

namespace scm::testing {
namespace {

Values convolution(const Values& x, const Sizes& map, const Values& w, std::int64_t outputs, std::int64_t side) {
  const std::int64_t height = map[1], width = map[2], inputs = map[3], pad = side / 2;
  Values y;
  for (std::int64_t n = 0; n < map[0]; ++n) {
    for (std::int64_t h = 0; h < height; ++h) {
      for (std::int64_t v = 0; v < width; ++v) {
        for (std::int64_t o = 0; o < outputs; ++o) {
          double sum = 0;
          for (std::int64_t place = 0; place < side * side; ++place) {
            const std::int64_t row = h + place / side - pad, column = v + place % side - pad;
            if (row < 0 || row >= height || column < 0 || column >= width) continue;
            for (std::int64_t c = 0; c < inputs; ++c) {
              sum += x[static_cast<std::size_t>(((n * height + row) * width + column) * inputs + c)] * w[static_cast<std::size_t>(side == 1 ? c * outputs + o : (o * inputs + c) * 9 + place)];
            }
          }
          y.push_back(sum);
        }
      }
    }
  }
  return y;
}

struct Case {
  const char* op;
  Sizes x, w;

  std::int64_t outputs() const { return w.size() == 2 ? w.back() : w.front(); }

  Values expected(const Tensor& map, const Tensor& weight) const {
    const bool is_product = w.size() == 2;
    const Sizes shape = is_product ? Sizes{1, 1, elements(x) / x.back(), x.back()} : x;
    return convolution(values(map), shape, values(weight), outputs(), is_product ? 1 : 3);
  }

  Sizes y() const {
    Sizes shape = x;
    shape.back() = outputs();
    return shape;
  }
};

const std::vector<Case> kCases{
    {"Conv3x3", {1, 1, 1, 1}, {1, 1, 3, 3}},     {"Conv3x3", {2, 3, 5, 33}, {17, 33, 3, 3}},  {"Conv3x3", {1, 4, 4, 64}, {48, 64, 3, 3}},
    {"Conv3x3", {3, 4, 4, 32}, {32, 32, 3, 3}},  {"Conv3x3", {1, 24, 24, 40}, {65, 40, 3, 3}}, {"Conv3x3", {2, 1, 70, 5}, {4, 5, 3, 3}},
    {"MatMul", {1, 1}, {1, 1}},                  {"MatMul", {3, 5, 7, 65}, {65, 33}},          {"MatMul", {1100, 32}, {32, 16}},
};

// Skipped where the processor, or the system, has nothing for bfloat16; the skip says so.
template <typename T>
class ChannelsLastTest : public ::testing::Test {
 protected:
  void SetUp() override {
    if (fake_ort::library().products.empty()) GTEST_SKIP() << "this processor has neither AMX nor AVX512-BF16, or the system does not let the process use them";
  }
};
TYPED_TEST_SUITE(ChannelsLastTest, Elements, ElementNames);

// Those there are kernels for here: "medium" alone where there are no matrix units.
std::vector<std::string> precisions() {
  std::vector<std::string> found;
  for (const auto& product : fake_ort::library().products) found.push_back(product.first);
  return found;
}

Options with(const std::string& precision, int constant = -1) {
  Options options;
  options.precision = precision;
  options.constant = constant;
  return options;
}

// Factors have 16 bits, or 8, and sums have an error in proportion to what is added, not to the sum.
double allowed(const Case& one, const Tensor& x, const Tensor& w, double relative) {
  const Values terms = values(w);
  double weight = 0, map = 0;
  for (const double value : terms) weight = std::max(weight, std::fabs(value));
  for (const double value : values(x)) map = std::max(map, std::fabs(value));
  return relative * std::sqrt(static_cast<double>(elements(one.w)) / static_cast<double>(one.outputs())) * weight * map;
}

TYPED_TEST(ChannelsLastTest, MultipliesToThePrecisionAskedFor) {
  for (const Case& one : kCases) {
    const Tensor x = random(kType<TypeParam>, one.x), w = random(kType<TypeParam>, one.w);
    const Values expected = one.expected(x, w);
    for (const std::string& precision : precisions()) {
      SCOPED_TRACE(std::string(one.op) + " " + text(one.x) + " by " + text(one.w) + ", " + precision);
      const Outcome outcome = fake_ort::run(one.op, {x, w}, {}, with(precision));
      ASSERT_EQ(outcome.error, "");
      expect_close(outcome.outputs.at(0), one.y(), expected, allowed(one, x, w, precision == "high" ? 0x1p-15 : 0x1p-7));
    }
  }
}

TYPED_TEST(ChannelsLastTest, GivesTheSameForWeightsThatAreConstant) {
  for (const Case& one : kCases) {
    const Tensor x = random(kType<TypeParam>, one.x), w = random(kType<TypeParam>, one.w);
    for (const std::string& precision : precisions()) {
      const Outcome packed_at_once = fake_ort::run(one.op, {x, w}, {}, with(precision, 1)), packed_in_the_run = fake_ort::run(one.op, {x, w}, {}, with(precision));
      ASSERT_EQ(packed_at_once.error + packed_in_the_run.error, "");
      expect_same_bits(packed_at_once.outputs.at(0), packed_in_the_run.outputs.at(0));
    }
  }
}

TYPED_TEST(ChannelsLastTest, DoesNotDependOnThreadsOrTheRestOfTheBatch) {
  const Sizes shape{3, 9, 11, 40}, weight{70, 40, 3, 3};
  const Tensor x = random(kType<TypeParam>, shape), w = random(kType<TypeParam>, weight);
  Options options = with(precisions().front());
  const Outcome expected = fake_ort::run("Conv3x3", {x, w}, {}, options);
  ASSERT_EQ(expected.error, "");
  for (const Threads threads : {Threads::one_backwards, Threads::many}) {
    options.threads = threads;
    expect_same_bits(fake_ort::run("Conv3x3", {x, w}, {}, options).outputs.at(0), expected.outputs.at(0));
  }
  const std::size_t in = x.bytes.size() / 3, out = expected.outputs.at(0).bytes.size() / 3;
  for (std::size_t sample = 0; sample < 3; ++sample) {
    Tensor alone{x.type, {1, 9, 11, 40}, {}};
    alone.bytes.assign(x.bytes.begin() + static_cast<std::ptrdiff_t>(sample * in), x.bytes.begin() + static_cast<std::ptrdiff_t>((sample + 1) * in));
    const Outcome outcome = fake_ort::run("Conv3x3", {alone, w}, {}, with(precisions().front()));
    const auto& together = expected.outputs.at(0).bytes;
    EXPECT_TRUE(std::equal(outcome.outputs.at(0).bytes.begin(), outcome.outputs.at(0).bytes.end(), together.begin() + static_cast<std::ptrdiff_t>(sample * out)));
  }
}

TYPED_TEST(ChannelsLastTest, KeepsNaNWhereItReaches) {
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

TYPED_TEST(ChannelsLastTest, GivesNothingForNothing) {
  for (const Sizes& shape : {Sizes{0, 4, 4, 3}, Sizes{2, 0, 4, 3}, Sizes{2, 4, 0, 3}}) {
    const Outcome outcome = fake_ort::run("Conv3x3", {random(kType<TypeParam>, shape), random(kType<TypeParam>, {2, 3, 3, 3})}, {}, with(precisions().front()));
    ASSERT_EQ(outcome.error, "");
    EXPECT_TRUE(outcome.outputs.at(0).bytes.empty());
  }
}

TYPED_TEST(ChannelsLastTest, NamesBadShapes) {
  const auto error = [](const char* op, const Sizes& x, const Sizes& w) {
    return fake_ort::run(op, {random(kType<TypeParam>, x), random(kType<TypeParam>, w)}, {}, with(precisions().front())).error;
  };
  EXPECT_NE(error("Conv3x3", {1, 4, 4, 3}, {2, 3, 5, 3}).find("the height of the window"), std::string::npos);
  EXPECT_NE(error("Conv3x3", {1, 4, 4, 3}, {2, 4, 3, 3}).find("the channels of x"), std::string::npos);
  EXPECT_NE(error("MatMul", {4, 3}, {4, 2}).find("the channels of x"), std::string::npos);
}

TYPED_TEST(ChannelsLastTest, TurnsFailuresOfOnnxRuntimeIntoStatuses) {
  const Tensor x = random(kType<TypeParam>, {1, 24, 24, 40}), w = random(kType<TypeParam>, {70, 40, 3, 3});
  Options options = with(precisions().front(), 1);
  for (options.failing_call = 0;; ++options.failing_call) {
    const std::string error = fake_ort::run("Conv3x3", {x, w}, {}, options).error;
    if (error.empty()) break;
    EXPECT_EQ(error, "scm::Conv3x3: this call was to fail") << "call " << options.failing_call;
    ASSERT_LT(options.failing_call, 100);
  }
  EXPECT_GT(options.failing_call, 20);
}

TEST(ChannelsLastRegistrationTest, TakesTorchsWordsAlone) {
  const auto [error, domains] = fake_ort::register_with(18, "1.18.0", "low");
  EXPECT_EQ(error, "scm::RegisterCustomOps: scm.float32_matmul_precision must be highest, high or medium, got low");
  EXPECT_EQ(fake_ort::register_with(18, "1.18.0", "highest").second, std::vector<std::string>{"scm"});
  for (const auto& [precision, ops] : fake_ort::library().products) {
    EXPECT_EQ(ops.size(), 4u);
    EXPECT_EQ(fake_ort::register_with(18, "1.18.0", precision).second, (std::vector<std::string>{"scm", "scm.channels_last"}));
  }
}

}  // namespace
}  // namespace scm::testing
