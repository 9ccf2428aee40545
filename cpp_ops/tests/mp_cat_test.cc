#include "mp_cat/op.h"

#include <cmath>
#include <limits>

#include "support.h"

namespace scm::testing {
namespace {

Values reference(const Values& a, const Values& b, std::int64_t channels_a, std::int64_t channels_b, double t) {
  const auto A = static_cast<double>(channels_a), B = static_cast<double>(channels_b);
  const double s = std::sqrt((A + B) / ((1 - t) * (1 - t) + t * t));
  Values y;
  for (std::size_t row = 0; row < a.size() / static_cast<std::size_t>(channels_a); ++row) {
    for (std::int64_t c = 0; c < channels_a; ++c) y.push_back(a[row * static_cast<std::size_t>(channels_a) + static_cast<std::size_t>(c)] * s * (1 - t) / std::sqrt(A));
    for (std::int64_t c = 0; c < channels_b; ++c) y.push_back(b[row * static_cast<std::size_t>(channels_b) + static_cast<std::size_t>(c)] * s * t / std::sqrt(B));
  }
  return y;
}

Sizes with_channels(Sizes shape, std::int64_t channels) {
  shape.back() = channels;
  return shape;
}

template <typename T>
struct MPCatTest : ::testing::Test {};
TYPED_TEST_SUITE(MPCatTest, Elements, ElementNames);

TYPED_TEST(MPCatTest, FollowsItsFormula) {
  const std::pair<std::int64_t, std::int64_t> widths[] = {{1, 1}, {3, 7}, {64, 64}, {65, 1}, {7, 448}, {448, 64}};
  for (const auto& [channels_a, channels_b] : widths) {
    std::vector<Sizes> shapes = feature_maps(channels_a);
    shapes.push_back({channels_a});
    for (const Sizes& shape : shapes) {
      const Tensor a = random(kType<TypeParam>, shape), b = random(kType<TypeParam>, with_channels(shape, channels_b), 1, 1);
      const Outcome outcome = fake_ort::run("MPCat", {a, b}, {{"t", 0.3f}});
      ASSERT_EQ(outcome.error, "");
      expect_close(outcome.outputs.at(0), with_channels(shape, channels_a + channels_b), reference(values(a), values(b), channels_a, channels_b, 0.3f));
    }
  }
}

TYPED_TEST(MPCatTest, AcceptsAnyWeightAndActivatesTheRoundedOutputIfAsked) {
  const Tensor a = random(kType<TypeParam>, {3, 5, 65}), b = random(kType<TypeParam>, {3, 5, 7}, 1, 1);
  for (const float t : {0.0f, 0.3f, 0.5f, 1.0f, -0.25f}) {
    const Outcome alone = fake_ort::run("MPCat", {a, b}, {{"t", t}}), unnamed = fake_ort::run("MPCat", {a, b}, {{"t", t}}, with_outputs({true, false}));
    const Outcome both = fake_ort::run("MPCat", {a, b}, {{"t", t}}, with_outputs({true, true}));
    ASSERT_EQ(alone.error + unnamed.error + both.error, "");
    expect_close(alone.outputs.at(0), {3, 5, 72}, reference(values(a), values(b), 65, 7, t));
    expect_same_bits(both.outputs.at(0), alone.outputs.at(0));
    expect_same_bits(unnamed.outputs.at(0), alone.outputs.at(0));
    expect_close(both.outputs.at(1), {3, 5, 72}, mp_silu(values(both.outputs.at(0))));
  }
}

TYPED_TEST(MPCatTest, KeepsNaNAndInfinity) {
  const double nan = std::numeric_limits<double>::quiet_NaN(), infinity = std::numeric_limits<double>::infinity();
  const Tensor a = tensor(kType<TypeParam>, {2, 2}, {nan, 1, 2, -infinity}), b = tensor(kType<TypeParam>, {2, 1}, {infinity, 0});
  const Outcome outcome = fake_ort::run("MPCat", {a, b}, {{"t", 0.5f}}, with_outputs({true, true}));
  ASSERT_EQ(outcome.error, "");
  expect_close(outcome.outputs.at(0), {2, 3}, reference(values(a), values(b), 2, 1, 0.5));
  expect_close(outcome.outputs.at(1), {2, 3}, mp_silu(values(outcome.outputs.at(0))));
}

TYPED_TEST(MPCatTest, IsReproducibleOnManyThreadsAndInAnyBatch) {
  expect_reproducible("MPCat", {random(kType<TypeParam>, {3, 999, 65}), random(kType<TypeParam>, {3, 999, 7}, 1, 1)}, {{"t", 0.3f}}, 2);
}

TYPED_TEST(MPCatTest, DoesNotDependOnNeighboringRowsAtAnyLevel) {
  using T = TypeParam;
  const auto apply = [](CpuKernel<mp_cat::Params<T>> kernel, const Tensor& a, const Tensor& b, const Cuts& cuts) {
    Tensor y = empty_like(a.type, {a.shape[0], a.shape[1] + b.shape[1]}), activated = y;
    run_in_pieces(kernel, {data<T>(a), data<T>(b), data<T>(y), data<T>(activated), a.shape[0], a.shape[1], b.shape[1], 1.25f, 0.7f}, cuts);
    return std::vector<Tensor>{y, activated};
  };
  for (const auto& [level, kernel] : SCM_LEVELS(mp_cat, T)) {
    SCOPED_TRACE(level);
    for (const std::int64_t channels : kChannels) {
      const Tensor a = random(kType<T>, {9, channels}), b = random(kType<T>, {9, 7}, 1, 1);
      const auto whole = apply(kernel, a, b, {0, 9}), cut = apply(kernel, a, b, {0, 1, 5, 7, 9});
      Values expected;
      const Values from_a = values(a), from_b = values(b);
      for (std::size_t row = 0; row < 9; ++row) {
        for (std::size_t c = 0; c < static_cast<std::size_t>(channels); ++c) expected.push_back(from_a[row * static_cast<std::size_t>(channels) + c] * 1.25f);
        for (std::size_t c = 0; c < 7; ++c) expected.push_back(from_b[row * 7 + c] * 0.7f);
      }
      expect_close(whole[0], {9, channels + 7}, expected);
      expect_close(whole[1], {9, channels + 7}, mp_silu(values(whole[0])));
      for (std::size_t i = 0; i < 2; ++i) {
        expect_same_bits(cut[i], whole[i]);
        for (std::int64_t row = 0; row < 9; ++row) {
          expect_same_bits(apply(kernel, slice(a, row, row + 1), slice(b, row, row + 1), {0, 1})[i], slice(whole[i], row, row + 1));
        }
      }
    }
  }
}

TYPED_TEST(MPCatTest, InfersTheSumOfTheChannels) {
  const auto type = kType<TypeParam>;
  const auto shapes = [&](const char* a, const char* b) { return inferred("MPCat", {{type, a}, {type, b}}, {{"t", 0.5f}}, 2); };
  EXPECT_EQ(shapes("[N, 8, 64]", "[N, 8, 32]"), (std::vector<std::string>{"[N, 8, 96]", "[N, 8, 96]"}));
  EXPECT_EQ(shapes("[2, H, 64]", "[N, H, 1]"), (std::vector<std::string>{"[2, H, 65]", "[2, H, 65]"}));
  EXPECT_EQ(shapes("[2, 64]", "[2, C]"), (std::vector<std::string>{"?", "?"}));
  EXPECT_EQ(shapes("[2, 64]", "?"), (std::vector<std::string>{"?", "?"}));
  EXPECT_EQ(shapes("?", "[2, 64]"), (std::vector<std::string>{"?", "?"}));
}

TYPED_TEST(MPCatTest, RejectsInvalidInputs) {
  const auto zeros = [](const Sizes& shape) { return random(kType<TypeParam>, shape); };
  const Attributes attributes{{"t", 0.5f}};
  expect_scalar_rejected("MPCat", {zeros({}), zeros({})}, attributes, {"a must have at least 1 axis", "[]"});
  expect_rejected("MPCat", {zeros({2, 3}), zeros({3})}, attributes, {"b must have 2 axes", "[3]"});
  expect_rejected("MPCat", {zeros({2, 5, 3}), zeros({2, 4, 3})}, attributes, {"b must have 5", "axis 1", "[2, 4, 3]"});
  expect_rejected("MPCat", {zeros({2, 0}), zeros({2, 3})}, attributes, {"a must have at least 1 channel", "[2, 0]"});
  expect_rejected("MPCat", {zeros({2, 3}), zeros({2, 0})}, attributes, {"b must have at least 1 channel", "[2, 0]"});
  expect_rejected("MPCat", {zeros({2, 3}), zeros({2, 3})}, {}, {"t"});
}

}  // namespace
}  // namespace scm::testing
