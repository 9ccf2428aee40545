#include "mp_sum/op.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "support.h"

namespace scm::testing {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

Values reference(const Values& a, const Values& b, double t, double clip) {
  Values y(a.size());
  for (std::size_t i = 0; i < y.size(); ++i) {
    const double sum = ((1 - t) * a[i] + t * b[i]) / std::sqrt((1 - t) * (1 - t) + t * t);
    y[i] = std::isnan(sum) ? sum : std::min(std::max(sum, -clip), clip);
  }
  return y;
}

template <typename T>
struct MPSumTest : ::testing::Test {};
TYPED_TEST_SUITE(MPSumTest, Elements, ElementNames);

TYPED_TEST(MPSumTest, FollowsItsFormula) {
  std::vector<Sizes> shapes{{}, {0}, {5}};
  for (const std::int64_t channels : kChannels) {
    for (const Sizes& shape : feature_maps(channels)) shapes.push_back(shape);
  }
  for (const Sizes& shape : shapes) {
    const Tensor a = random(kType<TypeParam>, shape), b = random(kType<TypeParam>, shape, 1, 1);
    const Outcome outcome = fake_ort::run("MPSum", {a, b}, {{"t", 0.3f}, {"clip", 256.0f}});
    ASSERT_EQ(outcome.error, "");
    expect_close(outcome.outputs.at(0), shape, reference(values(a), values(b), 0.3f, 256), 1e-6);
  }
}

TYPED_TEST(MPSumTest, AcceptsAnyWeightAndBound) {
  const Sizes shape{3, 77};
  const Tensor a = random(kType<TypeParam>, shape), b = random(kType<TypeParam>, shape, 1, 1);
  for (const float t : {0.0f, 0.3f, 0.5f, 1.0f, 1.5f, -0.25f}) {
    for (const float clip : {0.0f, 0.5f, 256.0f, kInfinity}) {
      SCOPED_TRACE(::testing::Message() << "t = " << t << ", clip = " << clip);
      const Outcome outcome = fake_ort::run("MPSum", {a, b}, {{"t", t}, {"clip", clip}}, with_outputs({true, true}));
      ASSERT_EQ(outcome.error, "");
      expect_close(outcome.outputs.at(0), shape, reference(values(a), values(b), t, clip), 1e-6);
      expect_close(outcome.outputs.at(1), shape, mp_silu(values(outcome.outputs.at(0))));
    }
  }
}

TYPED_TEST(MPSumTest, ActivatesTheRoundedSumIfAsked) {
  for (const std::int64_t count : {0, 1, 5, 77, 40000}) {
    const Tensor a = random(kType<TypeParam>, {count}, 3), b = random(kType<TypeParam>, {count}, 3, 1);
    const Attributes attributes{{"t", 0.5f}, {"clip", 2.0f}};
    const Outcome alone = fake_ort::run("MPSum", {a, b}, attributes), unnamed = fake_ort::run("MPSum", {a, b}, attributes, with_outputs({true, false}));
    const Outcome both = fake_ort::run("MPSum", {a, b}, attributes, with_outputs({true, true}));
    ASSERT_EQ(alone.error + unnamed.error + both.error, "");
    expect_same_bits(both.outputs.at(0), alone.outputs.at(0));
    expect_same_bits(unnamed.outputs.at(0), alone.outputs.at(0));
    expect_close(both.outputs.at(1), {count}, mp_silu(values(both.outputs.at(0))));
  }
}

TYPED_TEST(MPSumTest, KeepsNaNAndBoundsInfinity) {
  const double nan = std::numeric_limits<double>::quiet_NaN(), infinity = std::numeric_limits<double>::infinity();
  const Tensor a = tensor(kType<TypeParam>, {6}, {nan, infinity, -infinity, infinity, 1, 6e4}), b = tensor(kType<TypeParam>, {6}, {1, 1, 1, -infinity, nan, 6e4});
  for (const float clip : {1.0f, 256.0f, kInfinity}) {
    const Outcome outcome = fake_ort::run("MPSum", {a, b}, {{"t", 0.3f}, {"clip", clip}}, with_outputs({true, true}));
    ASSERT_EQ(outcome.error, "");
    expect_close(outcome.outputs.at(0), {6}, reference(values(a), values(b), 0.3f, clip));
    expect_close(outcome.outputs.at(1), {6}, mp_silu(values(outcome.outputs.at(0))));
  }
}

TYPED_TEST(MPSumTest, IsReproducibleInPlaceOnManyThreadsAndInAnyBatch) {
  const Sizes shape{3, 44444};
  expect_reproducible("MPSum", {random(kType<TypeParam>, shape), random(kType<TypeParam>, shape, 1, 1)}, {{"t", 0.3f}, {"clip", 1.0f}}, 2);
}

TYPED_TEST(MPSumTest, DoesNotDependOnNeighboringElementsAtAnyLevel) {
  using T = TypeParam;
  const std::int64_t count = 1003;
  const Tensor a = random(kType<T>, {count}), b = random(kType<T>, {count}, 1, 1);
  const auto apply = [](CpuKernel<mp_sum::Params<T>> kernel, const Tensor& a, const Tensor& b, const Cuts& cuts) {
    Tensor y = empty_like(a.type, a.shape), activated = y;
    run_in_pieces(kernel, {data<T>(a), data<T>(b), data<T>(y), data<T>(activated), a.shape[0], 0.6f, 0.8f, 1.0f}, cuts);
    return std::vector<Tensor>{y, activated};
  };
  for (const auto& [level, kernel] : SCM_LEVELS(mp_sum, T)) {
    SCOPED_TRACE(level);
    const auto whole = apply(kernel, a, b, {0, count}), cut = apply(kernel, a, b, {0, 1, 8, 31, 500, 999, count});
    expect_close(whole[0], {count}, reference(values(a), values(b), 4.0 / 7, 1), 1e-6);
    expect_close(whole[1], {count}, mp_silu(values(whole[0])));
    for (std::size_t i = 0; i < 2; ++i) {
      expect_same_bits(cut[i], whole[i]);
      for (std::int64_t at = 0; at < 100; ++at) {
        expect_same_bits(apply(kernel, slice(a, at, at + 1), slice(b, at, at + 1), {0, 1})[i], slice(whole[i], at, at + 1));
      }
    }
  }
}

TYPED_TEST(MPSumTest, InfersTheShapeOfItsInputs) {
  const Attributes attributes{{"t", 0.3f}, {"clip", 256.0f}};
  const auto type = kType<TypeParam>;
  EXPECT_EQ(inferred("MPSum", {{type, "[N, 8, 64]"}, {type, "[N, 8, 64]"}}, attributes, 2), (std::vector<std::string>{"[N, 8, 64]", "[N, 8, 64]"}));
  EXPECT_EQ(inferred("MPSum", {{type, "[2, 64]"}, {type, "?"}}, attributes), std::vector<std::string>{"[2, 64]"});
  EXPECT_EQ(inferred("MPSum", {{type, "[2, 64]"}, {type, "[M, 64]"}}, attributes), std::vector<std::string>{"[2, 64]"});
}

TYPED_TEST(MPSumTest, RejectsInvalidInputs) {
  const Tensor a = random(kType<TypeParam>, {2, 3});
  const Attributes attributes{{"t", 0.3f}, {"clip", 256.0f}};
  expect_rejected("MPSum", {a, random(kType<TypeParam>, {3, 2})}, attributes, {"b must have the shape of a, [2, 3]", "got the shape [3, 2]"});
  expect_rejected("MPSum", {a, random(kType<TypeParam>, {3})}, attributes, {"[2, 3]", "[3]"});
  expect_rejected("MPSum", {a, random(kType<TypeParam>, {1, 3})}, attributes, {"[2, 3]", "[1, 3]"});  // nothing is broadcast
  expect_rejected("MPSum", {a, a}, {{"t", 0.3f}}, {"clip"});
  expect_rejected("MPSum", {a, a}, {{"clip", 1.0f}}, {"t"});
  expect_rejected("MPSum", {a, a}, {{"t", 0.3f}, {"clip", -1.0f}}, {"clip must be at least 0", "-1"});
  expect_rejected("MPSum", {a, a}, {{"t", 0.3f}, {"clip", std::nanf("")}}, {"clip must be at least 0", "nan"});
}

}  // namespace
}  // namespace scm::testing
