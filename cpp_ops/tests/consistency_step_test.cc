#include "consistency_step/op.h"

#include <cmath>
#include <limits>

#include "support.h"

namespace scm::testing {
namespace {

constexpr float kSigma = 0.5f;
const Attributes kAttributes{{"sigma_data", kSigma}};

struct Inputs {
  Tensor x, F, noise, t, t_next;

  Inputs(ONNXTensorElementDataType type, const Sizes& shape)
      : x(random(kFloat, shape)), F(random(type, shape, 1, 1)), noise(random(kFloat, shape, 1, 2)), t(random(kFloat, {shape[0]}, 1, 3)), t_next(random(kFloat, {shape[0]}, 1, 4)) {}

  std::vector<Tensor> all() const { return {x, F, noise, t, t_next}; }
};

Values reference(const Inputs& inputs) {
  const Values x = values(inputs.x), F = values(inputs.F), noise = values(inputs.noise), t = values(inputs.t), t_next = values(inputs.t_next);
  Values x_next(x.size());
  for (std::size_t i = 0; i < x.size(); ++i) {
    const std::size_t sample = i / (x.size() / t.size());
    const double denoised = std::cos(t[sample]) * x[i] - std::sin(t[sample]) * kSigma * F[i];
    x_next[i] = std::cos(t_next[sample]) * denoised + std::sin(t_next[sample]) * kSigma * noise[i];
  }
  return x_next;
}

template <typename T>
struct ConsistencyStepTest : ::testing::Test {};
TYPED_TEST_SUITE(ConsistencyStepTest, Elements, ElementNames);

TYPED_TEST(ConsistencyStepTest, FollowsItsFormula) {
  std::vector<Sizes> shapes{{0}, {1}, {3}, {3, 4, 64, 64}};
  for (const std::int64_t channels : kChannels) {
    for (const Sizes& shape : feature_maps(channels)) shapes.push_back(shape);
  }
  for (const Sizes& shape : shapes) {
    const Inputs inputs(kType<TypeParam>, shape);
    const Outcome outcome = fake_ort::run("ConsistencyStep", inputs.all(), kAttributes);
    ASSERT_EQ(outcome.error, "");
    expect_close(outcome.outputs.at(0), shape, reference(inputs), 1e-6);
  }
}

TYPED_TEST(ConsistencyStepTest, IsExactAtTheEndsOfTimeAndKeepsNaNInItsSample) {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  Inputs inputs(kType<TypeParam>, {5, 3});
  inputs.t = tensor(kFloat, {5}, {0, 1.5707964, 1.566, nan, 1});
  inputs.t_next = tensor(kFloat, {5}, {0, 0, 1.1, 0.5, 0});
  const Outcome outcome = fake_ort::run("ConsistencyStep", inputs.all(), kAttributes);
  ASSERT_EQ(outcome.error, "");
  expect_close(outcome.outputs.at(0), {5, 3}, reference(inputs), 1e-6);
  expect_same_bits(slice(outcome.outputs.at(0), 0, 1), slice(inputs.x, 0, 1));  // a step from 0 to 0 does not change x
}

TYPED_TEST(ConsistencyStepTest, IsReproducibleInPlaceOnManyThreadsAndInAnyBatch) { expect_reproducible("ConsistencyStep", Inputs(kType<TypeParam>, {3, 4, 111, 65}).all(), kAttributes); }

TYPED_TEST(ConsistencyStepTest, DoesNotDependOnTheBatchAtAnyLevel) {
  using T = TypeParam;
  const auto apply = [](CpuKernel<consistency_step::Params<T>> kernel, const Inputs& inputs, std::int64_t first, std::int64_t last, const Cuts& cuts) {
    const Tensor x = slice(inputs.x, first, last), F = slice(inputs.F, first, last), noise = slice(inputs.noise, first, last);
    const Tensor t = slice(inputs.t, first, last), t_next = slice(inputs.t_next, first, last);
    Tensor x_next = empty_like(kFloat, x.shape);
    run_in_pieces(kernel, {data<float>(x), data<T>(F), data<float>(noise), data<float>(t), data<float>(t_next), data<float>(x_next), last - first, x.shape[1], kSigma}, cuts);
    return x_next;
  };
  for (const auto& [level, kernel] : SCM_LEVELS(consistency_step, T)) {
    SCOPED_TRACE(level);
    for (const std::int64_t size : {1, 3, 64, 77, 448}) {
      const Inputs inputs(kType<T>, {3, size});
      const Tensor whole = apply(kernel, inputs, 0, 3, {0, 3 * size});
      expect_close(whole, {3, size}, reference(inputs), 1e-6);
      expect_same_bits(apply(kernel, inputs, 0, 3, {0, 1, size / 2 + 1, size + 1, 2 * size, 3 * size}), whole);
      for (std::int64_t i = 0; i < 3; ++i) expect_same_bits(apply(kernel, inputs, i, i + 1, {0, size}), slice(whole, i, i + 1));
    }
  }
}

TYPED_TEST(ConsistencyStepTest, InfersTheShapeOfItsFirstInput) {
  const auto shapes = [](const char* x, const char* F, const char* t) {
    return inferred("ConsistencyStep", {{kFloat, x}, {kType<TypeParam>, F}, {kFloat, x}, {kFloat, t}, {kFloat, t}}, kAttributes);
  };
  EXPECT_EQ(shapes("[N, 4, 64, 64]", "[N, 4, 64, 64]", "[N]"), std::vector<std::string>{"[N, 4, 64, 64]"});
  EXPECT_EQ(shapes("[3, 4]", "[N, C]", "?"), std::vector<std::string>{"[3, 4]"});
  EXPECT_EQ(shapes("?", "[N, 4]", "[N]"), std::vector<std::string>{"?"});
  EXPECT_EQ(fake_ort::infer("ConsistencyStep", {{kFloat, "[2]"}, {kType<TypeParam>, "[2]"}, {kFloat, "[2]"}, {kFloat, "[2]"}, {kFloat, "[2]"}}, kAttributes).outputs.at(0).type, kFloat);
}

TYPED_TEST(ConsistencyStepTest, RejectsInvalidInputs) {
  const auto with = [](std::size_t which, const Sizes& shape) {
    std::vector<Tensor> all = Inputs(kType<TypeParam>, {2, 5}).all();
    all[which] = random(all[which].type, shape);
    return all;
  };
  expect_scalar_rejected("ConsistencyStep", with(0, {}), kAttributes, {"x must have at least 1 axis", "[]"});
  expect_rejected("ConsistencyStep", with(1, {2, 4}), kAttributes, {"F must have the shape of x, [2, 5]", "[2, 4]"});
  expect_rejected("ConsistencyStep", with(2, {2, 5, 1}), kAttributes, {"noise must have the shape of x, [2, 5]", "[2, 5, 1]"});
  expect_scalar_rejected("ConsistencyStep", with(3, {}), kAttributes, {"t must have 1 axis", "[]"});
  expect_rejected("ConsistencyStep", with(3, {3}), kAttributes, {"t must have 2", "the samples of x", "[3]"});
  expect_rejected("ConsistencyStep", with(4, {2, 1}), kAttributes, {"t_next must have 1 axis", "[2, 1]"});
  expect_rejected("ConsistencyStep", with(4, {1}), kAttributes, {"t_next must have 2", "the samples of x", "[1]"});
  expect_rejected("ConsistencyStep", with(4, {2}), {}, {"sigma_data"});
}

}  // namespace
}  // namespace scm::testing
