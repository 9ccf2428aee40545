#include "pixel_norm/op.h"

#include <cmath>
#include <limits>

#include "support.h"

namespace scm::testing {
namespace {

constexpr float kEps = 1e-4f;
const Attributes kAttributes{{"eps", kEps}};

template <typename T>
struct PixelNormTest : ::testing::Test {};
TYPED_TEST_SUITE(PixelNormTest, Elements, ElementNames);

TYPED_TEST(PixelNormTest, DividesEachPixelByItsNorm) {
  for (const std::int64_t channels : kChannels) {
    std::vector<Sizes> shapes = feature_maps(channels);
    shapes.push_back({channels});
    for (const Sizes& shape : shapes) {
      const Tensor x = random(kType<TypeParam>, shape);
      const Outcome outcome = fake_ort::run("PixelNorm", {x}, kAttributes);
      ASSERT_EQ(outcome.error, "");
      expect_close(outcome.outputs.at(0), shape, pixel_norm(values(x), channels, kEps));
    }
  }
}

TYPED_TEST(PixelNormTest, ActivatesTheRoundedNormIfAsked) {
  for (const std::int64_t channels : kChannels) {
    const Sizes shape{3, 5, channels};
    const Tensor x = random(kType<TypeParam>, shape);
    const Outcome alone = fake_ort::run("PixelNorm", {x}, kAttributes);
    const Outcome unnamed = fake_ort::run("PixelNorm", {x}, kAttributes, with_outputs({true, false}));
    const Outcome both = fake_ort::run("PixelNorm", {x}, kAttributes, with_outputs({true, true}));
    ASSERT_EQ(alone.error + unnamed.error + both.error, "");
    expect_same_bits(both.outputs.at(0), alone.outputs.at(0));
    expect_same_bits(unnamed.outputs.at(0), alone.outputs.at(0));
    expect_close(both.outputs.at(1), shape, mp_silu(values(both.outputs.at(0))));
  }
}

TYPED_TEST(PixelNormTest, KeepsNaNAndInfinityInTheirPixel) {
  const double nan = std::numeric_limits<double>::quiet_NaN(), infinity = std::numeric_limits<double>::infinity();
  const Sizes shape{5, 3};
  const Tensor x = tensor(kType<TypeParam>, shape, {1, 2, 3, 1, nan, 3, 0, 0, 0, infinity, 1, -1, 4, 5, 6});
  const Outcome outcome = fake_ort::run("PixelNorm", {x}, kAttributes);
  ASSERT_EQ(outcome.error, "");
  expect_close(outcome.outputs.at(0), shape, pixel_norm(values(x), 3, kEps));
  const Values y = values(outcome.outputs.at(0));
  EXPECT_TRUE(std::isnan(y[3]) && std::isnan(y[4]) && std::isnan(y[5]));
  EXPECT_TRUE(y[6] == 0 && y[7] == 0 && y[8] == 0);
}

TYPED_TEST(PixelNormTest, IsReproducibleInPlaceOnManyThreadsAndInAnyBatch) { expect_reproducible("PixelNorm", {random(kType<TypeParam>, {3, 999, 65})}, kAttributes, 2); }

TYPED_TEST(PixelNormTest, DoesNotDependOnNeighboringRowsAtAnyLevel) {
  using T = TypeParam;
  const auto apply = [](CpuKernel<pixel_norm::Params<T>> kernel, const Tensor& x, const Cuts& cuts) {
    Tensor y = empty_like(x.type, x.shape), activated = y;
    run_in_pieces(kernel, {data<T>(x), data<T>(y), data<T>(activated), x.shape[0], x.shape[1], kEps}, cuts);
    return std::vector<Tensor>{y, activated};
  };
  for (const auto& [level, kernel] : SCM_LEVELS(pixel_norm, T)) {
    SCOPED_TRACE(level);
    for (const std::int64_t channels : kChannels) {
      const Tensor x = random(kType<T>, {9, channels});
      const auto whole = apply(kernel, x, {0, 9}), cut = apply(kernel, x, {0, 1, 5, 7, 9});
      expect_close(whole[0], x.shape, pixel_norm(values(x), channels, kEps));
      expect_close(whole[1], x.shape, mp_silu(values(whole[0])));
      for (std::size_t i = 0; i < 2; ++i) {
        expect_same_bits(cut[i], whole[i]);
        for (std::int64_t row = 0; row < 9; ++row) expect_same_bits(apply(kernel, slice(x, row, row + 1), {0, 1})[i], slice(whole[i], row, row + 1));
      }
    }
  }
}

TYPED_TEST(PixelNormTest, InfersTheShapeOfItsInput) {
  for (const char* shape : {"[N, H, W, 64]", "[2, 8, 8, 64]", "[N, C]", "[3]", "[0, 4]", "?"}) {
    EXPECT_EQ(inferred("PixelNorm", {{kType<TypeParam>, shape}}, kAttributes), std::vector<std::string>{shape});
    EXPECT_EQ(inferred("PixelNorm", {{kType<TypeParam>, shape}}, kAttributes, 2), (std::vector<std::string>{shape, shape}));
  }
  EXPECT_EQ(inferred("PixelNorm", {{kType<TypeParam>, "[N, ?, 64]"}}, kAttributes), std::vector<std::string>{"?"});
}

TYPED_TEST(PixelNormTest, RejectsInvalidInputs) {
  const auto zeros = [](const Sizes& shape) { return random(kType<TypeParam>, shape); };
  expect_scalar_rejected("PixelNorm", {zeros({})}, kAttributes, {"x must have at least 1 axis", "[]"});
  expect_rejected("PixelNorm", {zeros({3, 0})}, kAttributes, {"x must have at least 1 channel", "[3, 0]"});
  expect_rejected("PixelNorm", {zeros({3, 4})}, {}, {"eps"});
  expect_rejected("PixelNorm", {zeros({3, 4})}, {{"eps", std::int64_t{1}}}, {""});
}

}  // namespace
}  // namespace scm::testing
