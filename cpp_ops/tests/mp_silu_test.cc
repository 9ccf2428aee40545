#include "mp_silu/op.h"

#include <cmath>
#include <limits>

#include "support.h"

namespace scm::testing {
namespace {

template <typename T>
struct MPSiLUTest : ::testing::Test {};
TYPED_TEST_SUITE(MPSiLUTest, Elements, ElementNames);

TYPED_TEST(MPSiLUTest, FollowsItsFormula) {
  std::vector<Sizes> shapes{{}, {1}, {0}, {31}};
  for (const std::int64_t channels : kChannels) {
    for (const Sizes& shape : feature_maps(channels)) shapes.push_back(shape);
  }
  shapes.push_back({2, 0});
  for (const Sizes& shape : shapes) {
    const Tensor x = random(kType<TypeParam>, shape, 3);
    const Outcome outcome = fake_ort::run("MPSiLU", {x});
    ASSERT_EQ(outcome.error, "");
    expect_close(outcome.outputs.at(0), shape, mp_silu(values(x)));
  }
}

TYPED_TEST(MPSiLUTest, IsAccurateFromTheSmallestToTheLargestNumbers) {
  const double largest = sizeof(TypeParam) == 2 ? 65504 : 1e18;
  Values points{0, 1e4, -1e4, largest, -largest, 60, -60, 59.9, -59.9, 60.1, -60.1, 88, -88, 89, -89, 0.5, -0.5, 1e-7, -1e-7, 1e-4, -1e-4};
  for (double x = -30; x < 30; x += 0.037) points.push_back(x);
  const Tensor x = tensor(kType<TypeParam>, {static_cast<std::int64_t>(points.size())}, points);
  const Outcome outcome = fake_ort::run("MPSiLU", {x});
  ASSERT_EQ(outcome.error, "");
  expect_close(outcome.outputs.at(0), x.shape, mp_silu(values(x)), 1e-35);  // below -88 the result is 0
}

TYPED_TEST(MPSiLUTest, KeepsDenormalNumbers) {
  const double spacing = sizeof(TypeParam) == 2 ? 0x1p-24 : 0x1p-149;
  Values points;
  for (const double steps : {1.0, 2.0, 3.0, 100.0, 511.0, 1000.0}) {
    points.push_back(steps * spacing);
    points.push_back(-steps * spacing);
  }
  const Tensor x = tensor(kType<TypeParam>, {static_cast<std::int64_t>(points.size())}, points);
  const Outcome outcome = fake_ort::run("MPSiLU", {x});
  ASSERT_EQ(outcome.error, "");
  expect_close(outcome.outputs.at(0), x.shape, mp_silu(values(x)), 2 * spacing);  // rounded after the division and again after the multiplication
}

TYPED_TEST(MPSiLUTest, KeepsNaNAndInfinity) {
  const double nan = std::numeric_limits<double>::quiet_NaN(), infinity = std::numeric_limits<double>::infinity();
  const Tensor x = tensor(kType<TypeParam>, {37}, [&] {
    Values points(37, 1);
    points[0] = points[20] = points[36] = nan;
    points[3] = points[33] = infinity;
    points[5] = points[34] = -infinity;
    return points;
  }());
  const Outcome outcome = fake_ort::run("MPSiLU", {x});
  ASSERT_EQ(outcome.error, "");
  expect_close(outcome.outputs.at(0), x.shape, mp_silu(values(x)));
}

TYPED_TEST(MPSiLUTest, IsReproducibleInPlaceOnManyThreadsAndInAnyBatch) { expect_reproducible("MPSiLU", {random(kType<TypeParam>, {3, 77777})}, {}); }

TYPED_TEST(MPSiLUTest, DoesNotDependOnNeighboringElementsAtAnyLevel) {
  using T = TypeParam;
  const std::int64_t count = 1003;
  const Tensor x = random(kType<T>, {count}, 3);
  const auto apply = [](CpuKernel<mp_silu::Params<T>> kernel, const Tensor& part, const Cuts& cuts) {
    Tensor y = empty_like(part.type, part.shape);
    run_in_pieces(kernel, {data<T>(part), data<T>(y), part.shape[0]}, cuts);
    return y;
  };
  for (const auto& [level, kernel] : SCM_LEVELS(mp_silu, T)) {
    SCOPED_TRACE(level);
    const Tensor whole = apply(kernel, x, {0, count});
    expect_close(whole, x.shape, mp_silu(values(x)));
    expect_same_bits(apply(kernel, x, {0, 1, 8, 31, 500, 999, count}), whole);
    for (std::int64_t i = 0; i < 100; ++i) expect_same_bits(apply(kernel, slice(x, i, i + 1), {0, 1}), slice(whole, i, i + 1));
  }
}

TYPED_TEST(MPSiLUTest, InfersTheShapeOfItsInput) {
  for (const char* shape : {"[N, H, W, 64]", "[2, 0]", "?"}) EXPECT_EQ(inferred("MPSiLU", {{kType<TypeParam>, shape}}, {}), std::vector<std::string>{shape});
}

}  // namespace
}  // namespace scm::testing
