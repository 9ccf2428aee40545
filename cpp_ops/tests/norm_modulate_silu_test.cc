#include "norm_modulate_silu/op.h"

#include <limits>

#include "support.h"

namespace scm::testing {
namespace {

constexpr float kEps = 1e-4f;
const Attributes kAttributes{{"eps", kEps}};

// y [samples * pixels, channels], modulation [samples, 2, channels]
Values reference(const Values& y, const Values& modulation, std::int64_t pixels, std::int64_t channels) {
  const Values normed = pixel_norm(y, channels, kEps), factors = pixel_norm(modulation, channels, kEps);
  const auto width = static_cast<std::size_t>(channels);
  Values z(y.size());
  for (std::size_t i = 0; i < y.size(); ++i) {
    const std::size_t c = i % width, sample = i / (width * static_cast<std::size_t>(pixels));
    z[i] = mp_silu(normed[i] * factors[sample * 2 * width + c] + factors[(sample * 2 + 1) * width + c]);
  }
  return z;
}

template <typename T>
struct NormModulateSiLUTest : ::testing::Test {};
TYPED_TEST_SUITE(NormModulateSiLUTest, Elements, ElementNames);

TYPED_TEST(NormModulateSiLUTest, FollowsItsFormula) {
  for (const std::int64_t channels : kChannels) {
    for (const Sizes& shape : feature_maps(channels)) {
      const Tensor y = random(kType<TypeParam>, shape), modulation = random(kType<TypeParam>, {shape[0], 2 * channels}, 1, 1);
      const Outcome outcome = fake_ort::run("NormModulateSiLU", {y, modulation}, kAttributes);
      ASSERT_EQ(outcome.error, "");
      const std::int64_t pixels = elements({shape.begin() + 1, shape.end() - 1});
      expect_close(outcome.outputs.at(0), shape, reference(values(y), values(modulation), pixels, channels), 2e-6);
    }
  }
}

TYPED_TEST(NormModulateSiLUTest, KeepsNaNAndInfinityInTheirPixel) {
  const double nan = std::numeric_limits<double>::quiet_NaN(), infinity = std::numeric_limits<double>::infinity();
  const Tensor y = tensor(kType<TypeParam>, {3, 2, 2}, {nan, 1, 2, 1, infinity, 1, 0, 0, 1, 1, 2, 1});
  const Tensor modulation = tensor(kType<TypeParam>, {3, 4}, {1, 2, 3, 4, 1, 2, 3, 4, 1, 2, nan, 4});
  const Outcome outcome = fake_ort::run("NormModulateSiLU", {y, modulation}, kAttributes);
  ASSERT_EQ(outcome.error, "");
  expect_close(outcome.outputs.at(0), y.shape, reference(values(y), values(modulation), 2, 2), 2e-6);
}

TYPED_TEST(NormModulateSiLUTest, IsReproducibleInPlaceOnManyThreadsAndInAnyBatch) {
  expect_reproducible("NormModulateSiLU", {random(kType<TypeParam>, {3, 999, 65}), random(kType<TypeParam>, {3, 130}, 1, 1)}, kAttributes);
}

TYPED_TEST(NormModulateSiLUTest, DoesNotDependOnTheBatchAtAnyLevel) {
  using T = TypeParam;
  const std::int64_t samples = 3, pixels = 5;
  const auto apply = [](CpuKernel<norm_modulate_silu::Params<T>> kernel, const Tensor& y, const Tensor& modulation, const Cuts& cuts) {
    Tensor z = empty_like(y.type, y.shape);
    run_in_pieces(kernel, {data<T>(y), data<T>(modulation), data<T>(z), y.shape[0], y.shape[1], y.shape[2], 2 * y.shape[2], kEps}, cuts);
    return z;
  };
  for (const auto& [level, kernel] : SCM_LEVELS(norm_modulate_silu, T)) {
    SCOPED_TRACE(level);
    for (const std::int64_t channels : kChannels) {
      const Tensor y = random(kType<T>, {samples, pixels, channels}), modulation = random(kType<T>, {samples, 2 * channels}, 1, 1);
      const Tensor whole = apply(kernel, y, modulation, {0, samples * pixels});
      expect_close(whole, y.shape, reference(values(y), values(modulation), pixels, channels), 2e-6);
      expect_same_bits(apply(kernel, y, modulation, {0, 1, 4, 7, 12, samples * pixels}), whole);
      for (std::int64_t i = 0; i < samples; ++i) {
        expect_same_bits(apply(kernel, slice(y, i, i + 1), slice(modulation, i, i + 1), {0, pixels}), slice(whole, i, i + 1));
      }
    }
  }
}

TYPED_TEST(NormModulateSiLUTest, InfersTheShapeOfItsFirstInput) {
  const auto type = kType<TypeParam>;
  const auto shapes = [&](const char* y, const char* modulation) { return inferred("NormModulateSiLU", {{type, y}, {type, modulation}}, kAttributes); };
  EXPECT_EQ(shapes("[N, 8, 8, 64]", "[N, 128]"), std::vector<std::string>{"[N, 8, 8, 64]"});
  EXPECT_EQ(shapes("[N, 8, 8, C]", "[2, 128]"), std::vector<std::string>{"[N, 8, 8, C]"});
  EXPECT_EQ(shapes("[3, 64]", "?"), std::vector<std::string>{"[3, 64]"});
  EXPECT_EQ(shapes("?", "[N, 64]"), std::vector<std::string>{"?"});
}

TYPED_TEST(NormModulateSiLUTest, RejectsInvalidInputs) {
  const auto zeros = [](const Sizes& shape) { return random(kType<TypeParam>, shape); };
  expect_rejected("NormModulateSiLU", {zeros({4}), zeros({1, 8})}, kAttributes, {"y must have at least 2 axes", "[4]"});
  expect_rejected("NormModulateSiLU", {zeros({2, 0}), zeros({2, 0})}, kAttributes, {"y must have at least 1 channel", "[2, 0]"});
  expect_rejected("NormModulateSiLU", {zeros({2, 5, 4}), zeros({2, 2, 4})}, kAttributes, {"modulation must have 2 axes", "[2, 2, 4]"});
  expect_rejected("NormModulateSiLU", {zeros({2, 5, 4}), zeros({2, 4})}, kAttributes, {"modulation must have 8", "twice the channels of y", "[2, 4]"});
  expect_rejected("NormModulateSiLU", {zeros({2, 5, 4}), zeros({3, 8})}, kAttributes, {"modulation must have 2", "the samples of y", "[3, 8]"});
  expect_rejected("NormModulateSiLU", {zeros({2, 5, 4}), zeros({2, 8})}, {}, {"eps"});
}

}  // namespace
}  // namespace scm::testing
