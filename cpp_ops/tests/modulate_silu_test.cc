#include "modulate_silu/op.h"

#include <limits>

#include "support.h"

namespace scm::testing {
namespace {

// y [samples * pixels, channels], scale [samples, channels]
Values reference(const Values& y, const Values& scale, std::int64_t pixels, std::int64_t channels) {
  Values z(y.size());
  for (std::size_t i = 0; i < y.size(); ++i) {
    const std::size_t c = i % static_cast<std::size_t>(channels), sample = i / static_cast<std::size_t>(channels * pixels);
    z[i] = mp_silu(y[i] * scale[sample * static_cast<std::size_t>(channels) + c]);
  }
  return z;
}

template <typename T>
struct ModulateSiLUTest : ::testing::Test {};
TYPED_TEST_SUITE(ModulateSiLUTest, Elements, ElementNames);

TYPED_TEST(ModulateSiLUTest, FollowsItsFormula) {
  std::vector<std::int64_t> widths = kChannels;
  widths.push_back(0);  // 0 channels are valid: there is no norm to compute
  for (const std::int64_t channels : widths) {
    for (const Sizes& shape : feature_maps(channels)) {
      const Tensor y = random(kType<TypeParam>, shape), scale = random(kType<TypeParam>, {shape[0], channels}, 1, 1);
      const Outcome outcome = fake_ort::run("ModulateSiLU", {y, scale});
      ASSERT_EQ(outcome.error, "");
      const std::int64_t pixels = elements({shape.begin() + 1, shape.end() - 1});
      expect_close(outcome.outputs.at(0), shape, reference(values(y), values(scale), pixels, channels));
    }
  }
}

TYPED_TEST(ModulateSiLUTest, KeepsNaNAndInfinityInTheirPlace) {
  const double nan = std::numeric_limits<double>::quiet_NaN(), infinity = std::numeric_limits<double>::infinity();
  const Tensor y = tensor(kType<TypeParam>, {2, 2, 2}, {nan, 1, infinity, 1, 1, 1, 1, 2}), scale = tensor(kType<TypeParam>, {2, 2}, {-1, 1, nan, infinity});
  const Outcome outcome = fake_ort::run("ModulateSiLU", {y, scale});
  ASSERT_EQ(outcome.error, "");
  expect_close(outcome.outputs.at(0), y.shape, reference(values(y), values(scale), 2, 2));
}

TYPED_TEST(ModulateSiLUTest, IsReproducibleInPlaceOnManyThreadsAndInAnyBatch) {
  expect_reproducible("ModulateSiLU", {random(kType<TypeParam>, {3, 999, 65}), random(kType<TypeParam>, {3, 65}, 1, 1)}, {});
}

TYPED_TEST(ModulateSiLUTest, DoesNotDependOnTheBatchAtAnyLevel) {
  using T = TypeParam;
  const std::int64_t samples = 3, pixels = 5;
  const auto apply = [](CpuKernel<modulate_silu::Params<T>> kernel, const Tensor& y, const Tensor& scale, const Cuts& cuts) {
    Tensor z = empty_like(y.type, y.shape);
    run_in_pieces(kernel, {data<T>(y), data<T>(scale), data<T>(z), y.shape[0], y.shape[1], y.shape[2]}, cuts);
    return z;
  };
  for (const auto& [level, kernel] : SCM_LEVELS(modulate_silu, T)) {
    SCOPED_TRACE(level);
    for (const std::int64_t channels : kChannels) {
      const Tensor y = random(kType<T>, {samples, pixels, channels}), scale = random(kType<T>, {samples, channels}, 1, 1);
      const Tensor whole = apply(kernel, y, scale, {0, samples * pixels});
      expect_close(whole, y.shape, reference(values(y), values(scale), pixels, channels));
      expect_same_bits(apply(kernel, y, scale, {0, 1, 4, 7, 12, samples * pixels}), whole);
      for (std::int64_t i = 0; i < samples; ++i) {
        expect_same_bits(apply(kernel, slice(y, i, i + 1), slice(scale, i, i + 1), {0, pixels}), slice(whole, i, i + 1));
      }
    }
  }
}

TYPED_TEST(ModulateSiLUTest, InfersTheShapeOfItsFirstInput) {
  const auto type = kType<TypeParam>;
  const auto shapes = [&](const char* y, const char* scale) { return inferred("ModulateSiLU", {{type, y}, {type, scale}}, {}); };
  EXPECT_EQ(shapes("[N, 8, 8, 64]", "[N, 64]"), std::vector<std::string>{"[N, 8, 8, 64]"});
  EXPECT_EQ(shapes("[N, 8, 8, C]", "[2, 64]"), std::vector<std::string>{"[N, 8, 8, C]"});
  EXPECT_EQ(shapes("[3, 64]", "?"), std::vector<std::string>{"[3, 64]"});
  EXPECT_EQ(shapes("?", "[N, 64]"), std::vector<std::string>{"?"});
}

TYPED_TEST(ModulateSiLUTest, RejectsInvalidInputs) {
  const auto zeros = [](const Sizes& shape) { return random(kType<TypeParam>, shape); };
  expect_rejected("ModulateSiLU", {zeros({4}), zeros({1, 4})}, {}, {"y must have at least 2 axes", "[4]"});
  expect_rejected("ModulateSiLU", {zeros({2, 5, 4}), zeros({4})}, {}, {"scale must have 2 axes", "[4]"});
  expect_rejected("ModulateSiLU", {zeros({2, 5, 4}), zeros({2, 5})}, {}, {"scale must have 4", "the channels of y", "[2, 5]"});
  expect_rejected("ModulateSiLU", {zeros({2, 5, 4}), zeros({1, 4})}, {}, {"scale must have 2", "the samples of y", "[1, 4]"});
}

}  // namespace
}  // namespace scm::testing
