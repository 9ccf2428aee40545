#include "geglu/op.h"

#include <cmath>
#include <limits>
#include <random>

#include "support.h"

namespace scm::testing {
namespace {

// x [rows, 2, channels], b [2, channels]
Values reference(const Values& x, const Values& b, std::int64_t channels) {
  Values y;
  const auto width = static_cast<std::size_t>(channels);
  for (std::size_t i = 0; i < x.size() / 2; ++i) {
    const std::size_t c = i % width, at = i / width * 2 * width + c;
    const double gate = x[at + width] + b[width + c];
    y.push_back((x[at] + b[c]) * gate * std::erfc(-gate / std::sqrt(2.0)) / 2);
  }
  return y;
}

template <typename T>
struct GEGLUTest : ::testing::Test {};
TYPED_TEST_SUITE(GEGLUTest, Elements, ElementNames);

TYPED_TEST(GEGLUTest, FollowsItsFormula) {
  for (const std::int64_t channels : kChannels) {
    for (const Sizes& shape : feature_maps(2 * channels)) {
      const Tensor x = random(kType<TypeParam>, shape, 2), b = random(kType<TypeParam>, {2 * channels}, 1, 1);
      const Outcome outcome = fake_ort::run("GEGLU", {x, b});
      ASSERT_EQ(outcome.error, "");
      Sizes expected = shape;
      expected.back() = channels;
      expect_close(outcome.outputs.at(0), expected, reference(values(x), values(b), channels), 1e-6);
    }
  }
}

// gelu(x) approaches x for large x, and 0 for large -x.
TYPED_TEST(GEGLUTest, IsAccurateForAllFiniteNumbers) {
  Values points;
  for (int i = -4000; i <= 4000; ++i) points.insert(points.end(), {1, i / 250.0});
  for (const double large : {1e4, -1e4, 6e4, -6e4}) points.insert(points.end(), {1, large});
  const Tensor x = tensor(kType<TypeParam>, {static_cast<std::int64_t>(points.size()) / 2, 2}, points), b = tensor(kType<TypeParam>, {2}, {0, 0});
  const Outcome outcome = fake_ort::run("GEGLU", {x, b});
  ASSERT_EQ(outcome.error, "");
  expect_close(outcome.outputs.at(0), {x.shape[0], 1}, reference(values(x), values(b), 1), 6e-7);
}

// Arithmetic with denormal numbers takes a hundred cycles each.
TYPED_TEST(GEGLUTest, HasNoDenormalNumbersForLargeGates) {
  using T = TypeParam;
  Values points;
  for (int i = -4000; i <= 4000; ++i) points.insert(points.end(), {1, i / 100.0});
  const auto rows = static_cast<std::int64_t>(points.size() / 2);
  const Tensor x = tensor(kType<T>, {rows, 2}, points), b = tensor(kType<T>, {2}, {0, 0});
  for (const auto& [level, kernel] : SCM_LEVELS(geglu, T)) {
    SCOPED_TRACE(level);
    Tensor y = empty_like(x.type, {rows, 1});
    kernel({data<T>(x), data<T>(b), data<T>(y), rows, 1}, 0, rows);
    const Values found = values(y), gates = values(x);
    for (std::size_t i = 0; i < found.size(); ++i) {
      const double gate = gates[2 * i + 1];
      if (std::fabs(gate) > 13) {
        EXPECT_EQ(found[i], gate > 0 ? gate : 0) << gate;
      } else if (sizeof(T) == sizeof(float)) {
        EXPECT_TRUE(found[i] == 0 || std::fabs(found[i]) > double{std::numeric_limits<float>::min()}) << found[i] << " for " << gate;
      }
    }
  }
}

TYPED_TEST(GEGLUTest, KeepsNaNAndInfinityInTheirPlace) {
  const double nan = std::numeric_limits<double>::quiet_NaN(), infinity = std::numeric_limits<double>::infinity();
  const Tensor x = tensor(kType<TypeParam>, {1, 10}, {nan, 1, 1, 1, infinity, 1, nan, infinity, -infinity, 1}), b = tensor(kType<TypeParam>, {10}, Values(10, 0));
  const Outcome outcome = fake_ort::run("GEGLU", {x, b});
  ASSERT_EQ(outcome.error, "");
  expect_close(outcome.outputs.at(0), {1, 5}, reference(values(x), values(b), 5));
}

TYPED_TEST(GEGLUTest, DoesNotDependOnTheBatchAtAnyLevel) {
  using T = TypeParam;
  const std::int64_t rows = 7;
  for (const auto& [level, kernel] : SCM_LEVELS(geglu, T)) {
    SCOPED_TRACE(level);
    for (const std::int64_t channels : kChannels) {
      const Tensor x = random(kType<T>, {rows, 2 * channels}), b = random(kType<T>, {2 * channels}, 1, 1);
      const auto apply = [&, run = kernel](const Tensor& input, const Cuts& cuts) {
        Tensor y = empty_like(x.type, {input.shape[0], channels});
        run_in_pieces(run, {data<T>(input), data<T>(b), data<T>(y), input.shape[0], channels}, cuts);
        return y;
      };
      const Tensor whole = apply(x, {0, rows});
      expect_close(whole, {rows, channels}, reference(values(x), values(b), channels), 1e-6);
      expect_same_bits(apply(x, {0, 1, 4, rows}), whole);
      for (std::int64_t i = 0; i < rows; ++i) expect_same_bits(apply(slice(x, i, i + 1), {0, 1}), slice(whole, i, i + 1));
    }
  }
}

TYPED_TEST(GEGLUTest, FollowsItsFormulaForRandomShapesAtEveryLevel) {
  using T = TypeParam;
  std::mt19937 generator(0);
  const auto up_to = [&](std::int64_t most) { return static_cast<std::int64_t>(generator() % static_cast<std::uint64_t>(most)) + 1; };
  for (int i = 0; i < 60; ++i) {
    const std::int64_t rows = (up_to(6) - 1) * up_to(70), channels = up_to(200);
    const Tensor x = random(kType<T>, {rows, 2 * channels}, 2), b = random(kType<T>, {2 * channels}, 1, 1);
    Values points = values(x);
    if (i % 3 == 0 && rows > 0) points[static_cast<std::size_t>(up_to(rows * 2 * channels) - 1)] = std::numeric_limits<double>::quiet_NaN();
    const Tensor input = tensor(kType<T>, x.shape, points);
    for (const auto& [level, kernel] : SCM_LEVELS(geglu, T)) {
      SCOPED_TRACE(::testing::Message() << level << ", " << rows << " x " << channels);
      Tensor y = empty_like(x.type, {rows, channels});
      kernel({data<T>(input), data<T>(b), data<T>(y), rows, channels}, 0, rows);
      expect_close(y, {rows, channels}, reference(points, values(b), channels), 1e-6);
    }
  }
}

TYPED_TEST(GEGLUTest, InfersHalfOfTheChannels) {
  const auto type = kType<TypeParam>;
  const auto shapes = [&](const char* x, const char* b) { return inferred("GEGLU", {{type, x}, {type, b}}, {}); };
  EXPECT_EQ(shapes("[N, 8, 128]", "[128]"), std::vector<std::string>{"[N, 8, 64]"});
  EXPECT_EQ(shapes("[N, 8, C]", "[128]"), std::vector<std::string>{"?"});
  EXPECT_EQ(shapes("?", "[128]"), std::vector<std::string>{"?"});
}

TYPED_TEST(GEGLUTest, RejectsInvalidInputs) {
  const auto zeros = [](const Sizes& shape) { return random(kType<TypeParam>, shape); };
  expect_rejected("GEGLU", {zeros({4}), zeros({4})}, {}, {"x must have at least 2 axes", "[4]"});
  expect_rejected("GEGLU", {zeros({2, 4}), zeros({1, 4})}, {}, {"b must have 1 axis", "[1, 4]"});
  expect_rejected("GEGLU", {zeros({2, 5}), zeros({5})}, {}, {"x must have an even number of channels", "[2, 5]"});
  expect_rejected("GEGLU", {zeros({2, 4}), zeros({2})}, {}, {"b must have 4", "the channels of x", "[2]"});
}

}  // namespace
}  // namespace scm::testing
