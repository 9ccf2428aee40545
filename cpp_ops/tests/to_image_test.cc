#include "to_image/op.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "support.h"

namespace scm::testing {
namespace {

// Returns the pixel values before rounding, in the image's order.
Values reference(const Values& x, const Sizes& shape, double scale, double offset) {
  const auto channels = static_cast<std::size_t>(shape[1]), pixels = static_cast<std::size_t>(shape[2] * shape[3]);
  Values levels(x.size());
  for (std::size_t i = 0; i < x.size(); ++i) {
    const std::size_t pixel = i % pixels, c = i / pixels % channels, sample = i / (pixels * channels);
    const double level = x[i] * scale + offset;
    levels[(sample * pixels + pixel) * channels + c] = std::isnan(level) ? 0 : std::min(std::max(level, 0.0), 255.0);
  }
  return levels;
}

// Expects rounding to nearest. Near a tie either neighbor is accepted, because float arithmetic may round the product to the tie.
void expect_levels(const Tensor& image, const Sizes& shape, const Values& expected) {
  ASSERT_EQ(image.type, kUint8);
  ASSERT_EQ(text(image.shape), text({shape[0], shape[2], shape[3], shape[1]}));
  const Values got = values(image);
  for (std::size_t i = 0; i < got.size(); ++i) ASSERT_LE(std::fabs(got[i] - expected[i]), 0.5 + 1e-4) << "element " << i << ": " << got[i] << " for " << expected[i];
}

template <typename T>
struct ToImageTest : ::testing::Test {};
TYPED_TEST_SUITE(ToImageTest, Elements, ElementNames);

TYPED_TEST(ToImageTest, FollowsItsFormula) {
  for (const std::int64_t samples : {0, 1, 3}) {
    for (const std::int64_t channels : {0, 1, 3, 4, 7, 65}) {
      for (const Sizes& spatial : {Sizes{1, 1}, {5, 1}, {7, 11}, {16, 16}, {0, 5}, {5, 0}}) {
        const Sizes shape{samples, channels, spatial[0], spatial[1]};
        const Tensor x = random(kType<TypeParam>, shape);
        const Outcome outcome = fake_ort::run("ToImage", {x}, {{"scale", 127.5f}, {"offset", 128.0f}});
        ASSERT_EQ(outcome.error, "");
        expect_levels(outcome.outputs.at(0), shape, reference(values(x), shape, 127.5, 128));
      }
    }
  }
}

TYPED_TEST(ToImageTest, RoundsToEvenAndBounds) {
  Values points, levels;
  for (int twice = -20; twice <= 530; ++twice) {
    points.push_back(twice / 2.0);
    levels.push_back(std::nearbyint(std::min(std::max(twice / 2.0, 0.0), 255.0)));
  }
  const double nan = std::numeric_limits<double>::quiet_NaN(), infinity = std::numeric_limits<double>::infinity();
  for (const auto& [point, level] : std::vector<std::pair<double, double>>{{nan, 0}, {-nan, 0}, {infinity, 255}, {-infinity, 0}, {-0.0, 0}, {6e4, 255}, {-6e4, 0}, {1e-7, 0}}) {
    points.push_back(point);
    levels.push_back(level);
  }
  const auto count = static_cast<std::int64_t>(points.size());
  const Outcome outcome = fake_ort::run("ToImage", {tensor(kType<TypeParam>, {1, 1, 1, count}, points)}, {{"scale", 1.0f}, {"offset", 0.0f}});
  ASSERT_EQ(outcome.error, "");
  EXPECT_EQ(values(outcome.outputs.at(0)), levels);
}

TYPED_TEST(ToImageTest, IsReproducibleOnManyThreadsAndInAnyBatch) { expect_reproducible("ToImage", {random(kType<TypeParam>, {3, 3, 128, 111})}, {{"scale", 127.5f}, {"offset", 128.0f}}); }

TYPED_TEST(ToImageTest, DoesNotDependOnTheBatchAtAnyLevel) {
  using T = TypeParam;
  const auto apply = [](CpuKernel<to_image::Params<T>> kernel, const Tensor& x, const Cuts& cuts) {
    const std::int64_t pixels = x.shape[2] * x.shape[3];
    Tensor image = empty_like(kUint8, {x.shape[0], x.shape[2], x.shape[3], x.shape[1]});
    run_in_pieces(kernel, {data<T>(x), data<std::uint8_t>(image), x.shape[0], x.shape[1], pixels, 127.5f, 128.0f}, cuts);
    return image;
  };
  for (const auto& [level, kernel] : SCM_LEVELS(to_image, T)) {
    SCOPED_TRACE(level);
    for (const std::int64_t channels : {1, 3, 4, 7}) {
      const Sizes shape{3, channels, 7, 11};
      const Tensor x = random(kType<T>, shape);
      const Tensor whole = apply(kernel, x, {0, 3 * 77});
      expect_levels(whole, shape, reference(values(x), shape, 127.5, 128));
      expect_same_bits(apply(kernel, x, {0, 1, 50, 78, 154, 200, 3 * 77}), whole);
      for (std::int64_t i = 0; i < 3; ++i) expect_same_bits(apply(kernel, slice(x, i, i + 1), {0, 77}), slice(whole, i, i + 1));
    }
  }
}

TYPED_TEST(ToImageTest, InfersChannelsLast) {
  const Attributes attributes{{"scale", 127.5f}, {"offset", 128.0f}};
  EXPECT_EQ(inferred("ToImage", {{kType<TypeParam>, "[N, 3, H, 64]"}}, attributes), std::vector<std::string>{"[N, H, 64, 3]"});
  EXPECT_EQ(inferred("ToImage", {{kType<TypeParam>, "?"}}, attributes), std::vector<std::string>{"?"});
  EXPECT_EQ(fake_ort::infer("ToImage", {{kType<TypeParam>, "[1, 3, 2, 2]"}}, attributes).outputs.at(0).type, kUint8);
}

TYPED_TEST(ToImageTest, RejectsInvalidInputs) {
  const Attributes attributes{{"scale", 127.5f}, {"offset", 128.0f}};
  expect_rejected("ToImage", {random(kType<TypeParam>, {3, 8, 8})}, attributes, {"x must have 4 axes", "[3, 8, 8]"});
  expect_rejected("ToImage", {random(kType<TypeParam>, {1, 3, 8, 8})}, {{"scale", 1.0f}}, {"offset"});
  expect_rejected("ToImage", {random(kType<TypeParam>, {1, 3, 8, 8})}, {{"offset", 1.0f}}, {"scale"});
}

}  // namespace
}  // namespace scm::testing
