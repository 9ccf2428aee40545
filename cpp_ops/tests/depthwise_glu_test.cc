#include "depthwise_glu/op.h"

#include <cmath>
#include <limits>
#include <random>

#include "support.h"

namespace scm::testing {
namespace {

double silu(double x) { return x / (1 + std::exp(-x)); }

// x [samples, 2, channels, height, width], w [2, channels, 3, 3], b [2, channels]
Values reference(const Tensor& x, const Values& w, const Values& b) {
  const std::int64_t channels = x.shape[1], height = x.shape[2], width = x.shape[3];
  Values activated = values(x), y;
  for (double& value : activated) value = silu(value);
  const auto convolved = [&](std::int64_t sample, std::int64_t channel, std::int64_t row, std::int64_t column) {
    double sum = b[static_cast<std::size_t>(channel)];
    for (std::int64_t i = 0; i < 9; ++i) {
      const std::int64_t from = row + i / 3 - 1, at = column + i % 3 - 1;
      if (from < 0 || from >= height || at < 0 || at >= width) continue;
      sum += w[static_cast<std::size_t>(channel * 9 + i)] * activated[static_cast<std::size_t>(((sample * channels + channel) * height + from) * width + at)];
    }
    return sum;
  };
  for (std::int64_t i = 0; i < x.shape[0] * channels / 2 * height * width; ++i) {
    const std::int64_t plane = height * width, sample = i / (channels / 2 * plane), channel = i / plane % (channels / 2), row = i / width % height;
    y.push_back(convolved(sample, channel, row, i % width) * silu(convolved(sample, channel + channels / 2, row, i % width)));
  }
  return y;
}

struct Inputs {
  Tensor x, w, b;
};

Inputs inputs(ONNXTensorElementDataType type, const Sizes& shape) {
  return {random(type, shape), random(type, {shape[1], 1, 3, 3}, 0.3, 1), random(type, {shape[1]}, 1, 2)};
}

Sizes halved(Sizes shape) {
  shape[1] /= 2;
  return shape;
}

// Widths at boundaries of a block of 16 columns and of a strip of 512.
const std::vector<Sizes> kMaps{{1, 2, 1, 1},  {3, 6, 2, 5},   {1, 4, 1, 15},  {2, 2, 3, 16},   {1, 2, 2, 17},   {1, 130, 8, 8},
                               {2, 4, 17, 1}, {1, 10, 32, 32}, {1, 2, 3, 512}, {1, 2, 2, 513}, {1, 2, 2, 1100}, {0, 4, 3, 3}, {1, 4, 0, 3}, {1, 4, 3, 0}};

template <typename T>
struct DepthwiseGLUTest : ::testing::Test {};
TYPED_TEST_SUITE(DepthwiseGLUTest, Elements, ElementNames);

TYPED_TEST(DepthwiseGLUTest, FollowsItsFormula) {
  for (const Sizes& shape : kMaps) {
    const auto [x, w, b] = inputs(kType<TypeParam>, shape);
    const Outcome outcome = fake_ort::run("DepthwiseGLU", {x, w, b});
    ASSERT_EQ(outcome.error, "");
    expect_close(outcome.outputs.at(0), halved(shape), reference(x, values(w), values(b)), 2e-6);
  }
}

TYPED_TEST(DepthwiseGLUTest, KeepsNaNAndInfinityNearTheirPlace) {
  for (const double special : {std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity(), -std::numeric_limits<double>::infinity()}) {
    for (const std::size_t at : {0u, 8u, 31u, 50u}) {
      Values points = values(random(kFloat, {1, 2, 4, 8}));
      points[at] = special;
      const Tensor x = tensor(kType<TypeParam>, {1, 2, 4, 8}, points), w = random(kType<TypeParam>, {2, 1, 3, 3}, 1, 1), b = random(kType<TypeParam>, {2}, 1, 2);
      const Outcome outcome = fake_ort::run("DepthwiseGLU", {x, w, b});
      ASSERT_EQ(outcome.error, "");
      expect_close(outcome.outputs.at(0), {1, 1, 4, 8}, reference(x, values(w), values(b)), 2e-6);
    }
  }
}

TYPED_TEST(DepthwiseGLUTest, IsTheSameOnManyThreads) {
  const auto [x, w, b] = inputs(kType<TypeParam>, {2, 140, 32, 32});
  const Outcome expected = fake_ort::run("DepthwiseGLU", {x, w, b});
  ASSERT_EQ(expected.error, "");
  EXPECT_GT(expected.pieces, 1u);
  for (const Threads threads : {Threads::one_reversed, Threads::many}) {
    Options options;
    options.threads = threads;
    expect_same_bits(fake_ort::run("DepthwiseGLU", {x, w, b}, {}, options).outputs.at(0), expected.outputs.at(0));
  }
}

TYPED_TEST(DepthwiseGLUTest, DoesNotDependOnTheBatchAtAnyLevel) {
  using T = TypeParam;
  for (const auto& [level, kernel] : SCM_LEVELS(depthwise_glu, T)) {
    SCOPED_TRACE(level);
    for (const Sizes& shape : {Sizes{2, 6, 2, 5}, Sizes{3, 4, 9, 33}, Sizes{2, 2, 3, 530}}) {
      const auto [x, w, b] = inputs(kType<T>, shape);
      const std::int64_t channels = shape[1] / 2;
      const auto apply = [&, run = kernel, w = &w, b = &b](const Tensor& input, const Cuts& cuts) {
        Tensor y = empty_like(input.type, halved(input.shape));
        run_in_pieces(run, {data<T>(input), data<T>(*w), data<T>(*b), data<T>(y), input.shape[0], channels, shape[2], shape[3]}, cuts);
        return y;
      };
      const Tensor whole = apply(x, {0, shape[0] * channels});
      expect_close(whole, halved(shape), reference(x, values(w), values(b)), 2e-6);
      expect_same_bits(apply(x, {0, 1, shape[0] * channels}), whole);
      for (std::int64_t i = 0; i < shape[0]; ++i) expect_same_bits(apply(slice(x, i, i + 1), {0, channels}), slice(whole, i, i + 1));
    }
  }
}

TYPED_TEST(DepthwiseGLUTest, FollowsItsFormulaForRandomShapesAtEveryLevel) {
  using T = TypeParam;
  std::mt19937 generator(0);
  const auto up_to = [&](std::int64_t most) { return static_cast<std::int64_t>(generator() % static_cast<std::uint64_t>(most)) + 1; };
  for (int i = 0; i < 60; ++i) {
    const std::int64_t side = i % 2 ? 70 : 8, height = up_to(side), width = up_to(side), channels = up_to(i % 2 ? 4 : 100);
    const Sizes shape{up_to(6) - 1, 2 * channels, height, width};
    auto [x, w, b] = inputs(kType<T>, shape);
    if (i % 3 == 0 && shape[0] > 0) {
      Values points = values(x);
      points[static_cast<std::size_t>(up_to(elements(shape)) - 1)] = std::numeric_limits<double>::quiet_NaN();
      x = tensor(kType<T>, shape, points);
    }
    const Values expected = reference(x, values(w), values(b));
    for (const auto& [level, kernel] : SCM_LEVELS(depthwise_glu, T)) {
      SCOPED_TRACE(level);
      Tensor y = empty_like(x.type, halved(shape));
      kernel({data<T>(std::as_const(x)), data<T>(std::as_const(w)), data<T>(std::as_const(b)), data<T>(y), shape[0], channels, height, width}, 0, shape[0] * channels);
      expect_close(y, halved(shape), expected, 2e-6);
    }
  }
}

TYPED_TEST(DepthwiseGLUTest, InfersHalfOfTheChannels) {
  const auto type = kType<TypeParam>;
  const auto shapes = [&](const char* x) { return inferred("DepthwiseGLU", {{type, x}, {type, "[128, 1, 3, 3]"}, {type, "[128]"}}, {}); };
  EXPECT_EQ(shapes("[N, 128, H, 8]"), std::vector<std::string>{"[N, 64, H, 8]"});
  EXPECT_EQ(shapes("[2, C, 8, 8]"), std::vector<std::string>{"?"});
  EXPECT_EQ(shapes("?"), std::vector<std::string>{"?"});
}

TYPED_TEST(DepthwiseGLUTest, RejectsInvalidInputs) {
  const auto zeros = [](const Sizes& shape) { return random(kType<TypeParam>, shape); };
  const auto rejected = [&](const Sizes& x, const Sizes& w, const Sizes& b, const std::vector<std::string>& fragments) {
    expect_rejected("DepthwiseGLU", {zeros(x), zeros(w), zeros(b)}, {}, fragments);
  };
  rejected({4, 3, 3}, {4, 1, 3, 3}, {4}, {"x must have 4 axes", "[4, 3, 3]"});
  rejected({1, 4, 3, 3}, {4, 3, 3}, {4}, {"w must have 4 axes", "[4, 3, 3]"});
  rejected({1, 5, 3, 3}, {5, 1, 3, 3}, {5}, {"x must have an even number of channels", "[1, 5, 3, 3]"});
  rejected({1, 0, 3, 3}, {0, 1, 3, 3}, {0}, {"x must have an even number of channels, at least 2", "[1, 0, 3, 3]"});
  rejected({1, 4, 3, 3}, {2, 1, 3, 3}, {4}, {"w must have 4 (the channels of x) on axis 0", "[2, 1, 3, 3]"});
  rejected({1, 4, 3, 3}, {4, 4, 3, 3}, {4}, {"w must have 1 (the channels of a group) on axis 1", "[4, 4, 3, 3]"});
  rejected({1, 4, 3, 3}, {4, 1, 5, 3}, {4}, {"w must have 3 (the kernel height)", "[4, 1, 5, 3]"});
  rejected({1, 4, 3, 3}, {4, 1, 3, 5}, {4}, {"w must have 3 (the kernel width)", "[4, 1, 3, 5]"});
  rejected({1, 4, 3, 3}, {4, 1, 3, 3}, {1}, {"b must have 4 (the channels of x)", "[1]"});
}

}  // namespace
}  // namespace scm::testing
