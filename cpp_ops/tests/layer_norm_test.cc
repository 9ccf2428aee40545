#include "layer_norm/op.h"

#include <cmath>
#include <limits>
#include <random>

#include "support.h"

namespace scm::testing {
namespace {

constexpr float kEps = 1e-5f;
const Attributes kAttributes{{"eps", kEps}};
constexpr double kAbsolute = 4e-6;

// Normalizes rows of `channels` values, in double.
Values normalized(Values y, std::int64_t channels, bool subtracts_mean) {
  for (std::size_t row = 0; row < y.size(); row += static_cast<std::size_t>(channels)) {
    double mean = 0, squares = 0;
    for (std::int64_t c = 0; subtracts_mean && c < channels; ++c) mean += y[row + c] / static_cast<double>(channels);
    for (std::int64_t c = 0; c < channels; ++c) squares += std::pow(y[row + c] - mean, 2);
    const double root = std::sqrt(squares / static_cast<double>(channels) + double{kEps});
    for (std::int64_t c = 0; c < channels; ++c) y[row + c] = (y[row + c] - mean) / root;
  }
  return y;
}

// y * scale + bias, where each row has the values of its channel; an empty bias is 0.
Values affine(Values y, const Values& scale, const Values& bias) {
  for (std::size_t i = 0; i < y.size(); ++i) y[i] = y[i] * scale[i % scale.size()] + (bias.empty() ? 0 : bias[i % bias.size()]);
  return y;
}

Values modulated(Values y, const Values& scale, const Values& shift, std::int64_t channels, std::int64_t rows) {
  for (std::size_t i = 0; i < y.size(); ++i) {
    const std::size_t c = i % static_cast<std::size_t>(channels), sample = i / static_cast<std::size_t>(channels * rows);
    y[i] = y[i] * (1 + scale[sample * static_cast<std::size_t>(channels) + c]) + shift[sample * static_cast<std::size_t>(channels) + c];
  }
  return y;
}

template <typename T>
struct LayerNormTest : ::testing::Test {};
TYPED_TEST_SUITE(LayerNormTest, Elements, ElementNames);

TYPED_TEST(LayerNormTest, NormalizesEachRow) {
  for (const std::int64_t channels : kChannels) {
    const Tensor scale = random(kFloat, {channels}, 1, 1), bias = random(kFloat, {channels}, 1, 2);
    std::vector<Sizes> shapes = feature_maps(channels);
    shapes.push_back({channels});
    for (const Sizes& shape : shapes) {
      SCOPED_TRACE(text(shape));
      const Tensor x = random(kType<TypeParam>, shape);
      const Outcome layer = fake_ort::run("LayerNorm", {x, scale, bias}, kAttributes), rms = fake_ort::run("RMSNorm", {x, scale}, kAttributes);
      ASSERT_EQ(layer.error + rms.error, "");
      expect_close(layer.outputs.at(0), shape, affine(normalized(values(x), channels, true), values(scale), values(bias)), kAbsolute);
      expect_close(rms.outputs.at(0), shape, affine(normalized(values(x), channels, false), values(scale), {}), kAbsolute);
    }
  }
}

TYPED_TEST(LayerNormTest, ModulatesTheRowsOfEachSample) {
  for (const std::int64_t channels : kChannels) {
    for (const auto& [samples, rows] : {std::pair{std::int64_t{3}, std::int64_t{5}}, {1, 1}, {0, 2}, {2, 0}}) {
      const Sizes shape{samples, rows, channels};
      SCOPED_TRACE(text(shape));
      const Tensor x = random(kType<TypeParam>, shape), scale = random(kType<TypeParam>, {samples, 1, channels}, 1, 1);
      const Tensor shift = random(kType<TypeParam>, {samples, 1, channels}, 1, 2);
      const Outcome outcome = fake_ort::run("LayerNormModulate", {x, scale, shift}, kAttributes);
      ASSERT_EQ(outcome.error, "");
      expect_close(outcome.outputs.at(0), shape, modulated(normalized(values(x), channels, true), values(scale), values(shift), channels, rows), kAbsolute);
    }
  }
}

TEST(LayerNormAccuracyTest, IsAccurateForALargeMean) {
  const Sizes shape{2, 300};
  Values given = values(random(kFloat, shape));
  for (double& value : given) value += 1000;
  const Tensor x = tensor(kFloat, shape, given), ones = tensor(kFloat, {300}, Values(300, 1)), zeros = tensor(kFloat, {300}, Values(300, 0));
  const Outcome outcome = fake_ort::run("LayerNorm", {x, ones, zeros}, kAttributes);
  ASSERT_EQ(outcome.error, "");
  expect_close(outcome.outputs.at(0), shape, normalized(values(x), 300, true), 1e-4);  // half of the last place of 1000 is 3e-5
}

TYPED_TEST(LayerNormTest, KeepsNaNAndInfinityInTheirRow) {
  const double nan = std::numeric_limits<double>::quiet_NaN(), infinity = std::numeric_limits<double>::infinity();
  const Tensor x = tensor(kType<TypeParam>, {3, 3}, {1, 2, 3, nan, 2, 3, infinity, 1, 2}), scale = random(kFloat, {3}), bias = random(kFloat, {3});
  const Outcome layer = fake_ort::run("LayerNorm", {x, scale, bias}, kAttributes), rms = fake_ort::run("RMSNorm", {x, scale}, kAttributes);
  ASSERT_EQ(layer.error + rms.error, "");
  const Values y = values(layer.outputs.at(0)), z = values(rms.outputs.at(0));
  for (int i = 0; i < 9; ++i) EXPECT_EQ(std::isnan(y[i]), i >= 3) << i;
  for (int i = 0; i < 6; ++i) EXPECT_EQ(std::isnan(z[i]), i >= 3) << i;
  EXPECT_TRUE(std::isnan(z[6]) && z[7] == 0 && z[8] == 0);  // x / infinity
}

TYPED_TEST(LayerNormTest, FollowsItsFormulaForRandomShapesAndAnyNumbersAtEveryLevel) {
  using T = TypeParam;
  std::mt19937 generator(0);
  const auto up_to = [&](std::size_t most) { return static_cast<std::int64_t>(generator() % most) + 1; };
  constexpr double kInfinity = std::numeric_limits<double>::infinity(), kSpecial[] = {std::numeric_limits<double>::quiet_NaN(), kInfinity, -kInfinity};
  for (int i = 0; i < 60; ++i) {
    const std::int64_t samples = up_to(6) - 1, rows = up_to(70), channels = up_to(200);
    const Sizes shape{samples, rows, channels}, row{samples, 1, channels};
    Tensor x = random(kType<T>, shape), scale = random(kFloat, {channels}, 1, 1), bias = random(kFloat, {channels}, 1, 2);
    Tensor factors = random(kType<T>, row, 1, 3), shifts = random(kType<T>, row, 1, 4);
    Tensor* const inputs[] = {&x, &scale, &bias, &factors, &shifts};
    Tensor& changed = *inputs[i % 5];
    Values given = values(changed);
    if (!given.empty()) given[static_cast<std::size_t>(up_to(given.size()) - 1)] = kSpecial[i / 5 % 3];
    changed = tensor(changed.type, changed.shape, given);
    for (const auto& [level, kernel] : SCM_LEVELS(layer_norm, T)) {
      SCOPED_TRACE(::testing::Message() << level << ", " << text(shape) << ", special number in input " << i % 5);
      Tensor layer = empty_like(kType<T>, shape), modulation = layer, rms = layer;
      kernel({data<T>(x), data<float>(scale), data<float>(bias), nullptr, nullptr, data<T>(layer), samples, rows, channels, kEps, true}, 0, samples * rows);
      kernel({data<T>(x), nullptr, nullptr, data<T>(factors), data<T>(shifts), data<T>(modulation), samples, rows, channels, kEps, true}, 0, samples * rows);
      kernel({data<T>(x), data<float>(scale), nullptr, nullptr, nullptr, data<T>(rms), samples, rows, channels, kEps, false}, 0, samples * rows);
      expect_close(layer, shape, affine(normalized(values(x), channels, true), values(scale), values(bias)), 1e-5);
      expect_close(modulation, shape, modulated(normalized(values(x), channels, true), values(factors), values(shifts), channels, rows), 1e-5);
      expect_close(rms, shape, affine(normalized(values(x), channels, false), values(scale), {}), 1e-5);
    }
  }
}

TYPED_TEST(LayerNormTest, IsReproducibleInPlaceOnManyThreadsAndInAnyBatch) {
  expect_reproducible("LayerNormModulate", {random(kType<TypeParam>, {3, 999, 65}), random(kType<TypeParam>, {3, 1, 65}), random(kType<TypeParam>, {3, 1, 65})}, kAttributes);
}

TYPED_TEST(LayerNormTest, DoesNotDependOnNeighboringRowsAtAnyLevel) {
  using T = TypeParam;
  for (const auto& [level, kernel] : SCM_LEVELS(layer_norm, T)) {
    for (const std::int64_t channels : kChannels) {
      for (const bool subtracts_mean : {false, true}) {
        SCOPED_TRACE(level + std::to_string(channels));
        const Tensor x = random(kType<T>, {9, channels}), scale = random(kFloat, {channels}, 1, 1);
        const auto apply = [&, kernel = kernel](const Cuts& cuts) {
          Tensor y = empty_like(kType<T>, x.shape);
          run_in_pieces(kernel, {data<T>(x), data<float>(scale), nullptr, nullptr, nullptr, data<T>(y), 3, 3, channels, kEps, subtracts_mean}, cuts);
          return y;
        };
        const Tensor whole = apply({0, 9});
        expect_close(whole, x.shape, affine(normalized(values(x), channels, subtracts_mean), values(scale), {}), kAbsolute);
        expect_same_bits(apply({0, 1, 5, 7, 9}), whole);
      }
    }
  }
}

TYPED_TEST(LayerNormTest, RejectsInvalidInputs) {
  constexpr auto type = kType<TypeParam>;
  const auto zeros = [](const Sizes& shape) { return random(type, shape); };
  const Tensor four = random(kFloat, {4}), five = random(kFloat, {5});
  expect_scalar_rejected("RMSNorm", {zeros({}), four}, kAttributes, {"x must have at least 1 axis", "[]"});
  expect_rejected("LayerNorm", {zeros({3, 0}), four, four}, kAttributes, {"x must have at least 1 channel", "[3, 0]"});
  expect_rejected("LayerNorm", {zeros({3, 4}), five, four}, kAttributes, {"scale must have 4 (the channels of x)", "[5]"});
  expect_rejected("LayerNorm", {zeros({3, 4}), four, five}, kAttributes, {"bias must have 4 (the channels of x)", "[5]"});
  expect_rejected("RMSNorm", {zeros({3, 4}), four}, {}, {"eps"});
  expect_rejected("LayerNormModulate", {zeros({3, 4}), zeros({3, 1, 4}), zeros({3, 1, 4})}, kAttributes, {"x must have 3 axes", "[3, 4]"});
  expect_rejected("LayerNormModulate", {zeros({3, 2, 4}), zeros({2, 1, 4}), zeros({3, 1, 4})}, kAttributes, {"scale must have 3 (the samples of x)"});
  expect_rejected("LayerNormModulate", {zeros({3, 2, 4}), zeros({3, 1, 4}), zeros({3, 2, 4})}, kAttributes, {"shift must have 1 (one row per sample)"});
  expect_rejected("LayerNormModulate", {zeros({3, 2, 4}), zeros({3, 1, 4}), zeros({3, 1, 5})}, kAttributes, {"shift must have 4 (the channels of x)"});
}

}  // namespace
}  // namespace scm::testing
