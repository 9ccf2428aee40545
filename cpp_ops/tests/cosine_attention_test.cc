#include "cosine_attention/op.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "support.h"

namespace scm::testing {
namespace {

constexpr float kEps = 1e-4f;

Attributes attributes(std::int64_t heads) { return {{"heads", heads}, {"eps", kEps}}; }

struct Case {
  std::int64_t samples, length, heads, size;

  Sizes input() const { return {samples, length, 3 * heads * size}; }
  Sizes output() const { return {samples, length, heads * size}; }
};

// qkv [samples, length, 3, heads, size]
Values reference(const Values& qkv, const Case& sizes) {
  const auto length = static_cast<std::size_t>(sizes.length), heads = static_cast<std::size_t>(sizes.heads), size = static_cast<std::size_t>(sizes.size);
  const Values normed = pixel_norm(qkv, sizes.size, kEps);
  Values y(qkv.size() / 3), weights(length);
  for (std::size_t sample = 0; sample < static_cast<std::size_t>(sizes.samples); ++sample) {
    for (std::size_t head = 0; head < heads; ++head) {
      const auto part = [&](std::size_t which, std::size_t at) { return normed.data() + (((sample * length + at) * 3 + which) * heads + head) * size; };
      for (std::size_t query = 0; query < length; ++query) {
        double sum = 0;
        for (std::size_t key = 0; key < length; ++key) {
          double score = 0;
          for (std::size_t c = 0; c < size; ++c) score += part(0, query)[c] * part(1, key)[c];
          sum += weights[key] = std::exp(score / std::sqrt(static_cast<double>(size)));  // |score| is at most size
        }
        double* out = y.data() + ((sample * length + query) * heads + head) * size;
        for (std::size_t key = 0; key < length; ++key) {
          for (std::size_t c = 0; c < size; ++c) out[c] += weights[key] / sum * part(2, key)[c];
        }
      }
    }
  }
  return y;
}

template <typename T>
struct CosineAttentionTest : ::testing::Test {};
TYPED_TEST_SUITE(CosineAttentionTest, Elements, ElementNames);

TYPED_TEST(CosineAttentionTest, FollowsItsFormula) {
  std::vector<Case> cases{{1, 256, 2, 64}, {3, 256, 1, 20}, {1, 64, 1, 448}, {3, 5, 4, 65}};
  for (const std::int64_t samples : {0, 1, 3}) {
    for (const std::int64_t length : {0, 1, 5, 64, 65, 77}) {
      for (const std::int64_t heads : {1, 2, 3, 4}) cases.push_back({samples, length, heads, std::vector<std::int64_t>{1, 3, 20, 64}[static_cast<std::size_t>(heads - 1)]});
      cases.push_back({samples, length, 3, 1});
      cases.push_back({samples, length, 1, 33});
    }
  }
  for (const Case& sizes : cases) {
    SCOPED_TRACE(::testing::Message() << sizes.heads << " heads of " << sizes.size);
    const Tensor qkv = random(kType<TypeParam>, sizes.input());
    const Outcome outcome = fake_ort::run("CosineAttention", {qkv}, attributes(sizes.heads));
    ASSERT_EQ(outcome.error, "");
    expect_close(outcome.outputs.at(0), sizes.output(), reference(values(qkv), sizes), 2e-6);
  }
}

TYPED_TEST(CosineAttentionTest, AttendsSharplyAndEvenly) {
  const Case sizes{1, 77, 1, 64};
  Values points(77 * 3 * 64, 0);
  // Each query equals its own key, and is orthogonal or opposite to all others: scores of 8, 0 and -8.
  for (std::size_t at = 0; at < 77; ++at) {
    for (std::size_t which = 0; which < 3; ++which) points[(at * 3 + which) * 64 + at % 32] = at % 2 ? 1000 : -1e-2;
  }
  const Tensor sharp = tensor(kType<TypeParam>, sizes.input(), points);
  Outcome outcome = fake_ort::run("CosineAttention", {sharp}, attributes(1));
  ASSERT_EQ(outcome.error, "");
  expect_close(outcome.outputs.at(0), sizes.output(), reference(values(sharp), sizes), 5e-6);
  // All zeros: the weights are uniform.
  const Tensor zeros = tensor(kType<TypeParam>, sizes.input(), Values(77 * 3 * 64, 0));
  outcome = fake_ort::run("CosineAttention", {zeros}, attributes(1));
  ASSERT_EQ(outcome.error, "");
  expect_close(outcome.outputs.at(0), sizes.output(), Values(77 * 64, 0));
}

TYPED_TEST(CosineAttentionTest, DistinguishesKeysThatAreAllOppositeToTheQuery) {
  for (const std::int64_t size : {64, 448, 1024, 4096}) {
    const Case sizes{1, 8, 1, size};
    Values points;
    for (int at = 0; at < 8; ++at) {
      for (std::int64_t c = 0; c < size; ++c) points.push_back(c < size / 2);                   // queries
      for (std::int64_t c = 0; c < size; ++c) points.push_back(c < size / 2 ? -1 : 0.1 * at);   // keys: scores from -sqrt(size) up
      for (std::int64_t c = 0; c < size; ++c) points.push_back(std::sin(static_cast<double>(at * size + c)));
    }
    const Tensor qkv = tensor(kType<TypeParam>, sizes.input(), points);
    const Outcome outcome = fake_ort::run("CosineAttention", {qkv}, attributes(1));
    ASSERT_EQ(outcome.error, "");
    expect_close(outcome.outputs.at(0), sizes.output(), reference(values(qkv), sizes), size > 1024 ? 1e-3 : 5e-5);  // scores up to 32 are accurate to 1e-5; scores of 64, sums of 4096 terms, to 1e-4
  }
}

TYPED_TEST(CosineAttentionTest, KeepsNaNAndInfinityWhereTheyCanReach) {
  const Case sizes{2, 70, 2, 3};
  for (const double special : {std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity()}) {
    for (const std::size_t which : {0u, 1u, 2u}) {
      for (const std::size_t at : {0u, 33u, 69u}) {
        SCOPED_TRACE(::testing::Message() << special << " in part " << which << " at " << at);
        Values points = values(random(kFloat, sizes.input()));
        points[((70 + at) * 3 + which) * 6 + 4] = special;  // second sample, second head
        const Tensor qkv = tensor(kType<TypeParam>, sizes.input(), points);
        const Outcome outcome = fake_ort::run("CosineAttention", {qkv}, attributes(2));
        ASSERT_EQ(outcome.error, "");
        expect_close(outcome.outputs.at(0), sizes.output(), reference(values(qkv), sizes), 2e-6);
      }
    }
  }
}

TYPED_TEST(CosineAttentionTest, IsReproducibleOnManyThreadsAndInAnyBatch) {
  expect_reproducible("CosineAttention", {random(kType<TypeParam>, {3, 200, 3 * 3 * 20})}, attributes(3));
}

TYPED_TEST(CosineAttentionTest, DoesNotDependOnTheBatchAtAnyLevel) {
  using T = TypeParam;
  const auto apply = [](CpuKernel<cosine_attention::Params<T>> kernel, const Tensor& qkv, const Case& sizes, const Cuts& cuts) {
    Tensor y = empty_like(qkv.type, {qkv.shape[0], sizes.length, sizes.heads * sizes.size});
    bool out_of_memory = false;
    run_in_pieces(kernel, {data<T>(qkv), data<T>(y), qkv.shape[0], sizes.length, sizes.heads, sizes.size, kEps, &out_of_memory}, cuts);
    EXPECT_FALSE(out_of_memory);
    return y;
  };
  for (const auto& [level, kernel] : SCM_LEVELS(cosine_attention, T)) {
    SCOPED_TRACE(level);
    for (const Case& sizes : {Case{2, 130, 2, 3}, Case{2, 77, 1, 64}, Case{2, 64, 3, 20}, Case{2, 5, 2, 65}, Case{2, 1, 3, 1}}) {
      SCOPED_TRACE(::testing::Message() << sizes.length << " long, " << sizes.heads << " heads of " << sizes.size);
      const Tensor qkv = random(kType<T>, sizes.input());
      const std::int64_t units = sizes.heads * cosine_attention::query_blocks(sizes.length);  // per sample
      const Tensor whole = apply(kernel, qkv, sizes, {0, 2 * units});
      expect_close(whole, sizes.output(), reference(values(qkv), sizes), 2e-6);
      Cuts every;
      for (std::int64_t unit = 0; unit <= 2 * units; ++unit) every.push_back(unit);
      expect_same_bits(apply(kernel, qkv, sizes, every), whole);
      expect_same_bits(apply(kernel, qkv, sizes, {0, 1, 2 * units}), whole);
      for (std::int64_t i = 0; i < 2; ++i) expect_same_bits(apply(kernel, slice(qkv, i, i + 1), sizes, {0, units}), slice(whole, i, i + 1));
    }
  }
}

TYPED_TEST(CosineAttentionTest, ReportsOutOfMemory) {
  const std::int64_t length = std::int64_t{1} << 44;  // a thread allocates one factor per key
  Options options;
  options.no_output_memory = true;
  options.threads = Threads::many;
  for (const std::int64_t samples : {1, 4}) {
    const Tensor qkv{kType<TypeParam>, {samples, length, 3}, {}};
    EXPECT_EQ(fake_ort::run("CosineAttention", {qkv}, attributes(1), options).error,
              "scm::CosineAttention: std::bad_alloc with input shapes [" + std::to_string(samples) + ", 17592186044416, 3]");
  }
}

TYPED_TEST(CosineAttentionTest, InfersAThirdOfTheChannels) {
  const auto type = kType<TypeParam>;
  EXPECT_EQ(inferred("CosineAttention", {{type, "[N, L, 192]"}}, attributes(4)), std::vector<std::string>{"[N, L, 64]"});
  EXPECT_EQ(inferred("CosineAttention", {{type, "[2, 64, 9]"}}, attributes(3)), std::vector<std::string>{"[2, 64, 3]"});
  EXPECT_EQ(inferred("CosineAttention", {{type, "[2, 64, C]"}}, attributes(3)), std::vector<std::string>{"?"});
  EXPECT_EQ(inferred("CosineAttention", {{type, "?"}}, attributes(3)), std::vector<std::string>{"?"});
}

TYPED_TEST(CosineAttentionTest, RejectsInvalidInputs) {
  const auto zeros = [](const Sizes& shape) { return random(kType<TypeParam>, shape); };
  expect_rejected("CosineAttention", {zeros({5, 9})}, attributes(1), {"qkv must have 3 axes", "[5, 9]"});
  expect_rejected("CosineAttention", {zeros({1, 1, 3 * 4097})}, attributes(1), {"at most 4096 channels per head", "[1, 1, 12291]"});
  expect_rejected("CosineAttention", {zeros({1, 2, 5, 9})}, attributes(1), {"qkv must have 3 axes", "[1, 2, 5, 9]"});
  expect_rejected("CosineAttention", {zeros({1, 5, 0})}, attributes(1), {"qkv must have at least 1 channel", "[1, 5, 0]"});
  expect_rejected("CosineAttention", {zeros({1, 5, 9})}, attributes(2), {"multiple of 3 * heads = 6", "[1, 5, 9]"});
  expect_rejected("CosineAttention", {zeros({1, 5, 8})}, attributes(1), {"multiple of 3 * heads = 3", "[1, 5, 8]"});
  expect_rejected("CosineAttention", {zeros({1, 5, 9})}, attributes(0), {"heads must be in [1, 2^31), got 0"});
  expect_rejected("CosineAttention", {zeros({1, 5, 9})}, attributes(-3), {"heads must be in [1, 2^31), got -3"});
  expect_rejected("CosineAttention", {zeros({1, 5, 9})}, attributes(0x5555555555555555), {"heads must be in [1, 2^31)"});  // 3 * heads would be -1
  expect_rejected("CosineAttention", {zeros({1, 5, 9})}, {{"eps", kEps}}, {"heads"});
  expect_rejected("CosineAttention", {zeros({1, 5, 9})}, {{"heads", std::int64_t{1}}}, {"eps"});
  expect_rejected("CosineAttention", {zeros({1, 5, 9})}, {{"heads", 1.0f}, {"eps", kEps}}, {""});
}

}  // namespace
}  // namespace scm::testing
