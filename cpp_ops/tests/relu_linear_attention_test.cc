#include "relu_linear_attention/op.h"

#include <cmath>
#include <limits>
#include <random>

#include "support.h"

namespace scm::testing {
namespace {

constexpr float kEps = 1e-15f;

Attributes attributes(std::int64_t heads) { return {{"heads", heads}, {"eps", kEps}}; }

double relu(double x) { return x < 0 ? 0 : x; }

struct Case {
  std::int64_t samples, length, heads, size;

  Sizes shape() const { return {samples, length, heads * size}; }
};

Values reference(const Values& q, const Values& k, const Values& v, const Case& sizes) {
  const auto length = static_cast<std::size_t>(sizes.length), heads = static_cast<std::size_t>(sizes.heads), size = static_cast<std::size_t>(sizes.size);
  Values y(q.size());
  for (std::size_t row = 0; row * size < q.size(); ++row) {  // a head of a token
    const std::size_t first = row / (length * heads) * length * heads + row % heads;
    double sum = kEps;
    for (std::size_t at = 0; at < length; ++at) {
      const std::size_t other = (first + at * heads) * size;
      double weight = 0;
      for (std::size_t c = 0; c < size; ++c) weight += relu(q[row * size + c]) * relu(k[other + c]);
      sum += weight;
      for (std::size_t c = 0; c < size; ++c) y[row * size + c] += weight * v[other + c];
    }
    for (std::size_t c = 0; c < size; ++c) y[row * size + c] /= sum;
  }
  return y;
}

template <typename T>
struct ReLULinearAttentionTest : ::testing::Test {
  static std::vector<Tensor> inputs(const Case& sizes) {
    return {random(kType<T>, sizes.shape()), random(kType<T>, sizes.shape(), 1, 1), random(kType<T>, sizes.shape(), 1, 2)};
  }
  static Values expected(const std::vector<Tensor>& in, const Case& sizes) { return reference(values(in[0]), values(in[1]), values(in[2]), sizes); }
};
TYPED_TEST_SUITE(ReLULinearAttentionTest, Elements, ElementNames);

TYPED_TEST(ReLULinearAttentionTest, FollowsItsFormula) {
  std::vector<Case> cases{{1, 300, 2, 32}, {1, 9, 1, 256}, {2, 70, 1, 100}};
  for (const std::int64_t samples : {0, 1, 3}) {
    for (const std::int64_t length : {0, 1, 5, 64, 65, 77}) {
      for (const std::int64_t size : {1, 3, 20, 32, 33, 64}) cases.push_back({samples, length, size % 3 + 1, size});
    }
  }
  for (const Case& sizes : cases) {
    SCOPED_TRACE(::testing::Message() << sizes.heads << " heads of " << sizes.size);
    const std::vector<Tensor> in = this->inputs(sizes);
    const Outcome outcome = fake_ort::run("ReLULinearAttention", in, attributes(sizes.heads));
    ASSERT_EQ(outcome.error, "");
    expect_close(outcome.outputs.at(0), sizes.shape(), this->expected(in, sizes), 1e-5);
  }
}

TYPED_TEST(ReLULinearAttentionTest, IsZeroForAQueryWithoutPositiveChannels) {
  const Case sizes{1, 2, 1, 3};
  const Tensor q = tensor(kType<TypeParam>, sizes.shape(), {-1, -2, -3, 1, 2, 3}), k = tensor(kType<TypeParam>, sizes.shape(), {1, 2, 3, 4, 5, 6});
  const Outcome outcome = fake_ort::run("ReLULinearAttention", {q, k, k}, attributes(1));
  ASSERT_EQ(outcome.error, "");
  const Values found = values(outcome.outputs.at(0));
  EXPECT_EQ(Values(found.begin(), found.begin() + 3), Values(3, 0));
  expect_close(outcome.outputs.at(0), sizes.shape(), reference(values(q), values(k), values(k), sizes));
}

TYPED_TEST(ReLULinearAttentionTest, KeepsNaNAndInfinityWhereTheyCanReach) {
  const Case sizes{2, 70, 2, 3};
  for (const double special : {std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity()}) {
    for (const std::size_t which : {0u, 1u, 2u}) {
      for (const std::size_t at : {0u, 33u, 69u}) {
        SCOPED_TRACE(::testing::Message() << special << " in input " << which << " at " << at);
        std::vector<Tensor> in = this->inputs(sizes);
        Values points = values(in[which]);
        for (double& point : points) point = std::abs(point) + 0.1;  // infinity times 0 would be NaN in one order of the products, and not in another
        points[(70 + at) * 6 + 4] = special;                         // second sample, second head
        in[which] = tensor(kType<TypeParam>, sizes.shape(), points);
        const Outcome outcome = fake_ort::run("ReLULinearAttention", in, attributes(2));
        ASSERT_EQ(outcome.error, "");
        const Values found = values(outcome.outputs.at(0)), expected = this->expected(in, sizes);
        for (std::size_t i = 0; i < found.size(); ++i) EXPECT_EQ(std::isfinite(found[i]), std::isfinite(expected[i])) << i;
      }
    }
  }
}

TYPED_TEST(ReLULinearAttentionTest, IsReproducibleOnManyThreadsAndInAnyBatch) {
  const Case sizes{3, 900, 3, 20};
  expect_reproducible("ReLULinearAttention", this->inputs(sizes), attributes(sizes.heads));
}

TYPED_TEST(ReLULinearAttentionTest, DoesNotDependOnTheBatchAtAnyLevel) {
  using T = TypeParam;
  for (const auto& [level, kernel] : SCM_LEVELS(relu_linear_attention, T)) {
    SCOPED_TRACE(level);
    for (const Case& sizes : {Case{2, 130, 2, 3}, Case{2, 77, 1, 64}, Case{2, 64, 3, 32}, Case{2, 5, 2, 65}, Case{2, 1, 3, 1}}) {
      SCOPED_TRACE(::testing::Message() << sizes.length << " long, " << sizes.heads << " heads of " << sizes.size);
      const auto apply = [&, run = kernel](const std::vector<Tensor>& in, const Cuts& cuts) {
        Tensor y = empty_like(kType<T>, in[0].shape);
        bool out_of_memory = false;
        run_in_pieces(run, {data<T>(in[0]), data<T>(in[1]), data<T>(in[2]), data<T>(y), in[0].shape[0], sizes.length, sizes.heads, sizes.size, kEps, &out_of_memory}, cuts);
        EXPECT_FALSE(out_of_memory);
        return y;
      };
      const std::vector<Tensor> in = this->inputs(sizes);
      const Tensor whole = apply(in, {0, 2 * sizes.heads});
      expect_close(whole, sizes.shape(), this->expected(in, sizes), 1e-5);
      expect_same_bits(apply(in, {0, 1, 2 * sizes.heads}), whole);
      for (std::int64_t i = 0; i < 2; ++i) {
        const std::vector<Tensor> alone{slice(in[0], i, i + 1), slice(in[1], i, i + 1), slice(in[2], i, i + 1)};
        expect_same_bits(apply(alone, {0, sizes.heads}), slice(whole, i, i + 1));
      }
    }
  }
}

TYPED_TEST(ReLULinearAttentionTest, FollowsItsFormulaForRandomShapesAtEveryLevel) {
  using T = TypeParam;
  std::mt19937 generator(0);
  const auto up_to = [&](std::int64_t most) { return static_cast<std::int64_t>(generator() % static_cast<std::uint64_t>(most)) + 1; };
  for (int i = 0; i < 40; ++i) {
    const std::int64_t heads = up_to(4);
    const Case sizes{up_to(6) - 1, up_to(70), heads, up_to(200 / heads)};
    std::vector<Tensor> in = this->inputs(sizes);
    if (i % 3 == 0 && sizes.samples > 0) {
      Values points = values(in[2]);
      points[static_cast<std::size_t>(up_to(elements(sizes.shape())) - 1)] = std::numeric_limits<double>::quiet_NaN();
      in[2] = tensor(kType<T>, sizes.shape(), points);
    }
    const Values expected = this->expected(in, sizes);
    for (const auto& [level, kernel] : SCM_LEVELS(relu_linear_attention, T)) {
      SCOPED_TRACE(::testing::Message() << level << ": " << sizes.length << " long, " << sizes.heads << " heads of " << sizes.size);
      Tensor y = empty_like(kType<T>, sizes.shape());
      bool out_of_memory = false;
      const auto at = [&](std::size_t input) { return data<T>(std::as_const(in[input])); };
      kernel({at(0), at(1), at(2), data<T>(y), sizes.samples, sizes.length, sizes.heads, sizes.size, kEps, &out_of_memory}, 0, sizes.samples * sizes.heads);
      expect_close(y, sizes.shape(), expected, 1e-5);
    }
  }
}

TYPED_TEST(ReLULinearAttentionTest, InfersTheShapeOfTheQueries) {
  const auto type = kType<TypeParam>;
  const auto shapes = [&](const char* q, const char* k) { return inferred("ReLULinearAttention", {{type, q}, {type, k}, {type, k}}, attributes(4)); };
  EXPECT_EQ(shapes("[N, L, 64]", "[N, L, 64]"), std::vector<std::string>{"[N, L, 64]"});
  EXPECT_EQ(shapes("[2, 8, C]", "?"), std::vector<std::string>{"[2, 8, C]"});
  EXPECT_EQ(shapes("?", "[2, 8, 64]"), std::vector<std::string>{"?"});
}

TYPED_TEST(ReLULinearAttentionTest, RejectsInvalidInputs) {
  const auto zeros = [](const Sizes& shape) { return random(kType<TypeParam>, shape); };
  const auto rejected = [&](const Sizes& q, const Sizes& k, const Attributes& given, const std::vector<std::string>& fragments) {
    expect_rejected("ReLULinearAttention", {zeros(q), zeros(k), zeros(k)}, given, fragments);
  };
  rejected({5, 8}, {5, 8}, attributes(1), {"q must have 3 axes", "[5, 8]"});
  rejected({1, 5, 0}, {1, 5, 0}, attributes(1), {"q must have at least 1 channel", "[1, 5, 0]"});
  rejected({1, 5, 8}, {1, 6, 8}, attributes(1), {"k must have the shape of q, [1, 5, 8]", "[1, 6, 8]"});
  rejected({1, 5, 8}, {1, 5, 8}, attributes(3), {"q must have channels that are a multiple of heads = 3", "[1, 5, 8]"});
  rejected({1, 1, 514}, {1, 1, 514}, attributes(2), {"at most 256 channels per head", "[1, 1, 514]"});
  rejected({1, 5, 8}, {1, 5, 8}, attributes(0), {"heads must be in [1, 2^31), got 0"});
  rejected({1, 5, 8}, {1, 5, 8}, {{"heads", std::int64_t{1}}}, {"eps"});
}

}  // namespace
}  // namespace scm::testing
