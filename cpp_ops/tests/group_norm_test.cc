#include "group_norm/op.h"

#include <cmath>
#include <limits>
#include <random>

#include "support.h"

namespace scm::testing {
namespace {

constexpr float kEps = 1e-5f;

Attributes with_groups(std::int64_t groups) { return {{"groups", groups}, {"eps", kEps}}; }

// [N, C, ...] and the number of groups: odd sizes, groups of one channel, one group, more than one block of moments, empty maps.
struct Case {
  Sizes shape;
  std::int64_t groups;
};
const std::vector<Case> kCases{{{3, 4, 5, 7}, 2}, {{1, 64, 8, 8}, 32}, {{2, 6, 65}, 1}, {{2, 65, 3, 3}, 65}, {{1, 8, 33, 64}, 4},
                               {{3, 4}, 2},       {{1, 3, 41, 70}, 1}, {{0, 4, 8}, 2},  {{2, 4, 0}, 2}};

double silu(double x) { return x / (1 + std::exp(-x)); }

// The reference in double. `modulation` is empty or has two rows of channels per sample.
Values group_norm(const Tensor& x, std::int64_t groups, const Values& scale, const Values& bias, const Values& modulation, bool activates) {
  const std::int64_t samples = x.shape[0], channels = x.shape[1], pixels = elements(x.shape) / std::max<std::int64_t>(samples * channels, 1);
  const std::int64_t size = channels / groups * pixels;
  Values y = values(x);
  for (std::int64_t group = 0; size > 0 && group < samples * groups; ++group) {
    double mean = 0, squares = 0;
    for (std::int64_t i = 0; i < size; ++i) mean += y[group * size + i] / static_cast<double>(size);
    for (std::int64_t i = 0; i < size; ++i) squares += std::pow(y[group * size + i] - mean, 2);
    const double inverse = 1 / std::sqrt(squares / static_cast<double>(size) + double{kEps});
    for (std::int64_t i = 0; i < size; ++i) {
      const std::int64_t index = group * size + i, channel = index / pixels % channels, sample = index / pixels / channels;
      double& value = y[index];
      value = (value - mean) * inverse * scale[channel] + bias[channel];
      if (!modulation.empty()) value = value * (1 + modulation[2 * sample * channels + channel]) + modulation[(2 * sample + 1) * channels + channel];
      if (activates) value = silu(value);
    }
  }
  return y;
}

template <typename T>
struct GroupNormTest : ::testing::Test {};
TYPED_TEST_SUITE(GroupNormTest, Elements, ElementNames);

struct Inputs {
  Tensor x, scale, bias, modulation;

  Inputs(ONNXTensorElementDataType type, const Sizes& shape)
      : x(random(type, shape)), scale(random(kFloat, {shape[1]}, 1, 1)), bias(random(kFloat, {shape[1]}, 1, 2)), modulation(random(type, {shape[0], 2 * shape[1]}, 0.5, 3)) {}

  std::vector<Tensor> plain() const { return {x, scale, bias}; }
  std::vector<Tensor> modulated() const { return {x, scale, bias, modulation}; }
};

// Products of factors near 1 lose a few roundings; near 0 the error is absolute.
constexpr double kAbsolute = 4e-6;

TYPED_TEST(GroupNormTest, NormalizesGroupsOfChannels) {
  for (const auto& [shape, groups] : kCases) {
    SCOPED_TRACE(text(shape));
    const Inputs in(kType<TypeParam>, shape);
    const Values scale = values(in.scale), bias = values(in.bias);
    const Outcome plain = fake_ort::run("GroupNorm", in.plain(), with_groups(groups));
    const Outcome activated = fake_ort::run("GroupNormSiLU", in.plain(), with_groups(groups));
    const Outcome modulated = fake_ort::run("GroupNormModulateSiLU", in.modulated(), with_groups(groups));
    ASSERT_EQ(plain.error + activated.error + modulated.error, "");
    expect_close(plain.outputs.at(0), shape, group_norm(in.x, groups, scale, bias, {}, false), kAbsolute);
    expect_close(activated.outputs.at(0), shape, group_norm(in.x, groups, scale, bias, {}, true), kAbsolute);
    expect_close(modulated.outputs.at(0), shape, group_norm(in.x, groups, scale, bias, values(in.modulation), true), kAbsolute);
  }
}

TEST(GroupNormAccuracyTest, IsAccurateForALargeMean) {
  const Sizes shape{1, 2, 70, 70};
  Values given = values(random(kFloat, shape));
  for (double& value : given) value += 1000;
  const Tensor x = tensor(kFloat, shape, given);
  const Outcome outcome = fake_ort::run("GroupNorm", {x, tensor(kFloat, {2}, {1, 1}), tensor(kFloat, {2}, {0, 0})}, with_groups(2));
  ASSERT_EQ(outcome.error, "");
  expect_close(outcome.outputs.at(0), shape, group_norm(x, 2, {1, 1}, {0, 0}, {}, false), 1e-4);  // half of the last place of 1000 is 3e-5
}

TYPED_TEST(GroupNormTest, KeepsNaNAndInfinityInTheirGroup) {
  const double nan = std::numeric_limits<double>::quiet_NaN(), infinity = std::numeric_limits<double>::infinity();
  for (const double bad : {nan, infinity, -infinity}) {
    Values given = values(random(kType<TypeParam>, {2, 4, 40}));
    given[45] = bad;  // in the first group of the first sample
    for (const char* op : {"GroupNorm", "GroupNormSiLU"}) {
      const Outcome outcome =
          fake_ort::run(op, {tensor(kType<TypeParam>, {2, 4, 40}, given), random(kFloat, {4}), random(kFloat, {4})}, with_groups(2));
      ASSERT_EQ(outcome.error, "");
      const Values y = values(outcome.outputs.at(0));
      for (std::size_t i = 0; i < y.size(); ++i) EXPECT_EQ(std::isnan(y[i]), i < 80) << i;
    }
  }
}

TYPED_TEST(GroupNormTest, FollowsItsFormulaForRandomShapesAndAnyNumbersAtEveryLevel) {
  using T = TypeParam;
  std::mt19937 generator(0);
  const auto up_to = [&](std::size_t most) { return static_cast<std::int64_t>(generator() % most) + 1; };
  constexpr double kInfinity = std::numeric_limits<double>::infinity(), kSpecial[] = {std::numeric_limits<double>::quiet_NaN(), kInfinity, -kInfinity};
  for (int i = 0; i < 60; ++i) {
    const std::int64_t groups = up_to(12), channels = groups * up_to(16), samples = up_to(6) - 1, pixels = up_to(70) * (i % 8 == 0 ? up_to(20) : 1);
    Inputs in(kType<T>, {samples, channels, pixels});
    Tensor* const inputs[] = {&in.x, &in.scale, &in.bias, &in.modulation};
    Tensor& changed = *inputs[i % 4];
    Values given = values(changed);
    if (i % 4 != 2 && i % 8 < 4) in.bias = tensor(kFloat, {channels}, Values(static_cast<std::size_t>(channels), 0));
    if (!given.empty()) given[static_cast<std::size_t>(up_to(given.size()) - 1)] = kSpecial[i / 4 % 3];
    changed = tensor(changed.type, changed.shape, given);
    for (const auto& [level, kernel] : SCM_LEVELS(group_norm, T)) {
      for (const bool modulated : {false, true}) {
        SCOPED_TRACE(::testing::Message() << level << ", " << text(in.x.shape) << ", " << groups << " groups, special number in input " << i % 4);
        Tensor y = empty_like(kType<T>, in.x.shape);
        const T* modulation = modulated ? data<T>(in.modulation) : nullptr;
        kernel({data<T>(in.x), data<float>(in.scale), data<float>(in.bias), modulation, data<T>(y), samples, channels, pixels, groups, kEps, modulated}, 0,
               samples * groups);
        expect_close(y, in.x.shape, group_norm(in.x, groups, values(in.scale), values(in.bias), modulated ? values(in.modulation) : Values{}, modulated), 1e-5);
      }
    }
  }
}

TYPED_TEST(GroupNormTest, IsReproducibleInPlaceOnManyThreadsAndInAnyBatch) {
  const Inputs in(kType<TypeParam>, {3, 64, 33, 35});
  expect_reproducible("GroupNormModulateSiLU", in.modulated(), with_groups(16));
}

TYPED_TEST(GroupNormTest, DoesNotDependOnNeighboringGroupsAtAnyLevel) {
  using T = TypeParam;
  for (const auto& [level, kernel] : SCM_LEVELS(group_norm, T)) {
    for (const auto& [shape, groups] : kCases) {
      SCOPED_TRACE(level + text(shape));
      const Inputs in(kType<T>, shape);
      const std::int64_t samples = shape[0], channels = shape[1], pixels = elements(shape) / std::max<std::int64_t>(samples * channels, 1), count = samples * groups;
      for (const bool silu : {false, true}) {
        const auto apply = [&, kernel = kernel, groups = groups](const Cuts& cuts) {
          Tensor y = empty_like(kType<T>, in.x.shape);
          const T* modulation = silu ? data<T>(in.modulation) : nullptr;
          run_in_pieces(kernel, {data<T>(in.x), data<float>(in.scale), data<float>(in.bias), modulation, data<T>(y), samples, channels, pixels, groups, kEps, silu}, cuts);
          return y;
        };
        const Tensor whole = apply({0, count});
        if (count > 0) expect_close(whole, in.x.shape, group_norm(in.x, groups, values(in.scale), values(in.bias), silu ? values(in.modulation) : Values{}, silu), kAbsolute);
        if (count > 1) expect_same_bits(apply({0, 1, count}), whole);
      }
    }
  }
}

TYPED_TEST(GroupNormTest, InfersTheShapeOfItsInput) {
  const Spec vector{kFloat, "[8]"};
  for (const char* shape : {"[N, 8, H, W]", "[2, 8]", "[N, 8, L]", "?"}) {
    EXPECT_EQ(inferred("GroupNorm", {{kType<TypeParam>, shape}, vector, vector}, with_groups(4)), std::vector<std::string>{shape});
  }
}

TYPED_TEST(GroupNormTest, RejectsInvalidInputs) {
  constexpr auto type = kType<TypeParam>;
  const auto zeros = [](const Sizes& shape) { return random(type, shape); };
  const Tensor four = random(kFloat, {4}), five = random(kFloat, {5});
  expect_rejected("GroupNorm", {zeros({4}), four, four}, with_groups(2), {"x must have at least 2 axes", "[4]"});
  expect_rejected("GroupNorm", {zeros({1, 5, 3}), five, five}, with_groups(2), {"a multiple of groups = 2", "[1, 5, 3]"});
  expect_rejected("GroupNorm", {zeros({1, 0, 3}), four, four}, with_groups(2), {"a multiple of groups = 2", "[1, 0, 3]"});
  expect_rejected("GroupNorm", {zeros({1, 4, 3}), five, four}, with_groups(2), {"scale must have 4 (the channels of x)", "[5]"});
  expect_rejected("GroupNorm", {zeros({1, 4, 3}), four, five}, with_groups(2), {"bias must have 4 (the channels of x)", "[5]"});
  expect_rejected("GroupNorm", {zeros({1, 4, 3}), four, four}, with_groups(0), {"groups must be at least 1, got 0"});
  expect_rejected("GroupNorm", {zeros({1, 4, 3}), four, four}, {{"eps", kEps}}, {"groups"});
  expect_rejected("GroupNormModulateSiLU", {zeros({1, 4, 3}), four, four, zeros({2, 8})}, with_groups(2), {"modulation must have 1 (the samples of x)"});
  expect_rejected("GroupNormModulateSiLU", {zeros({1, 4, 3}), four, four, zeros({1, 4})}, with_groups(2), {"modulation must have 8 (twice the channels of x)"});
}

}  // namespace
}  // namespace scm::testing
