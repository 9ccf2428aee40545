#include "attention/op.h"

#include <cmath>
#include <limits>

#include "attention_reference.h"
#include "support.h"

namespace scm::testing {
namespace {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN(), kInfinity = std::numeric_limits<double>::infinity();

Attributes attributes(const AttentionCase& c) { return {{"scale", c.scale()}}; }

struct Inputs {
  std::vector<Tensor> tensors;  // q, k, v, and a mask or none

  Inputs(ONNXTensorElementDataType type, const AttentionCase& c, const MaskShape& mask = {}, double scale = 1)
      : tensors{random(type, c.q(), scale, 1), random(type, c.k(), scale, 2), random(type, c.v(), 1, 3)} {
    if (!mask.empty()) tensors.push_back(tensor(type, mask, some_mask(mask)));
  }

  const char* op() const { return tensors.size() > 3 ? "MaskedAttention" : "Attention"; }

  Values expected(const AttentionCase& c) const {
    const bool masked = tensors.size() > 3;
    return attention(c, values(tensors[0]), values(tensors[1]), values(tensors[2]), masked ? values(tensors[3]) : Values{}, masked ? tensors[3].shape : MaskShape{});
  }
};

void expect_formula(const Inputs& inputs, const AttentionCase& c, double tolerance = 3e-6) {
  const Outcome outcome = fake_ort::run(inputs.op(), inputs.tensors, attributes(c));
  ASSERT_EQ(outcome.error, "");
  expect_close(outcome.outputs.at(0), c.y(), inputs.expected(c), tolerance);
}

template <typename T>
struct AttentionTest : ::testing::Test {};
TYPED_TEST_SUITE(AttentionTest, Elements, ElementNames);

TYPED_TEST(AttentionTest, FollowsItsFormula) {
  std::vector<AttentionCase> cases{{1, 1, 1, 1, 1, 1, 1}, {2, 64, 64, 1, 1, 64, 64}, {1, 200, 300, 2, 2, 40, 40}, {1, 70, 77, 6, 2, 8, 16}, {1, 20, 90, 1, 1, 256, 3},
                                   {0, 5, 5, 2, 1, 3, 3}, {2, 0, 5, 2, 1, 3, 3},    {2, 5, 0, 2, 1, 3, 3}};
  for (const std::int64_t queries : {1, 15, 33, 65}) {
    for (const std::int64_t keys : {1, 5, 63, 65, 128, 130}) cases.push_back({2, queries, keys, 2, 1 + queries % 2, keys % 40 + 1, queries});
  }
  for (const AttentionCase& c : cases) {
    for (const MaskShape& mask : {MaskShape{}, MaskShape{c.samples, 1, 1, c.keys}, MaskShape{1, c.heads, c.queries, c.keys}, MaskShape{1, 1, c.queries, c.keys}}) {
      SCOPED_TRACE(::testing::Message() << c << ", mask " << text(mask));
      expect_formula(Inputs(kType<TypeParam>, c, mask), c);
    }
  }
}

TYPED_TEST(AttentionTest, AcceptsScoresOfAnyMagnitude) {
  const AttentionCase c{1, 33, 200, 1, 1, 16, 16};
  for (const double scale : {1e-3, 3.0, 30.0}) expect_formula(Inputs(kType<TypeParam>, c, {}, scale), c, 1e-5 * (1 + scale * scale));
  // Scores from -2000 to 2000, ascending: each tile of keys has a larger maximum. The value of the last key remains.
  Inputs ascending(kType<TypeParam>, c);
  Values q(33 * 16, 0), k(200 * 16, 0);
  for (std::size_t i = 0; i < 33; ++i) q[i * 16] = 4;
  for (std::size_t i = 0; i < 200; ++i) k[i * 16] = (static_cast<double>(i) - 100) * 20;
  ascending.tensors[0] = tensor(kType<TypeParam>, c.q(), q);
  ascending.tensors[1] = tensor(kType<TypeParam>, c.k(), k);
  expect_formula(ascending, c);
}

TYPED_TEST(AttentionTest, GivesZeroForAQueryThatMayAttendToNoKey) {
  const AttentionCase c{1, 3, 70, 2, 2, 8, 8};
  Inputs inputs(kType<TypeParam>, c, {1, 1, 3, 70});
  Values mask(3 * 70, 0.5);
  std::fill(mask.begin() + 70, mask.begin() + 140, -kInfinity);
  inputs.tensors[3] = tensor(kType<TypeParam>, {1, 1, 3, 70}, mask);
  expect_formula(inputs, c);
  inputs.tensors[1] = tensor(kType<TypeParam>, c.k(), Values(70 * 16, kNan));
  expect_formula(inputs, c);
}

TYPED_TEST(AttentionTest, TreatsTheLowestNumberInAMaskAsFinite) {
  const AttentionCase c{1, 3, 70, 1, 1, 8, 8};
  Inputs inputs(kType<TypeParam>, c, {1, 1, 3, 70});
  const double lowest = sizeof(TypeParam) == 2 ? -65504 : -static_cast<double>(std::numeric_limits<float>::max());
  Values mask(3 * 70, lowest);  // a query that may attend to no key attends to all of them
  mask[0] = 0;
  inputs.tensors[3] = tensor(kType<TypeParam>, {1, 1, 3, 70}, mask);
  Values q = values(inputs.tensors[0]);
  for (std::size_t i = 8; i < q.size(); ++i) q[i] = 0;
  inputs.tensors[0] = tensor(kType<TypeParam>, c.q(), q);
  expect_formula(inputs, c);
}

TYPED_TEST(AttentionTest, KeepsNaNAndInfinityWhereTheyCanReach) {
  const AttentionCase c{2, 70, 90, 2, 1, 3, 5};
  for (const double special : {kNan, kInfinity, -kInfinity}) {
    for (const std::size_t input : {0u, 1u, 2u}) {
      for (const std::size_t at : {0u, 100u, 260u}) {
        SCOPED_TRACE(::testing::Message() << special << " in input " << input << " at " << at);
        Inputs inputs(kType<TypeParam>, c);
        Values changed = values(inputs.tensors[input]);
        changed[at] = special;
        inputs.tensors[input] = tensor(kType<TypeParam>, inputs.tensors[input].shape, changed);
        expect_formula(inputs, c);
      }
    }
  }
}

TYPED_TEST(AttentionTest, IsReproducibleOnManyThreadsAndInAnyBatch) {
  const AttentionCase c{3, 300, 200, 3, 3, 20, 20};
  expect_reproducible("Attention", Inputs(kType<TypeParam>, c).tensors, attributes(c));
  expect_reproducible("MaskedAttention", Inputs(kType<TypeParam>, c, {3, 1, 1, 200}).tensors, attributes(c));
}

TYPED_TEST(AttentionTest, DoesNotDependOnTheBatchAtAnyLevel) {
  using T = TypeParam;
  const auto apply = [](CpuKernel<attention::Params<T>> kernel, const std::vector<Tensor>& in, const AttentionCase& c, const Cuts& cuts) {
    Tensor y = empty_like(kType<T>, {in[0].shape[0], c.queries, c.heads, c.value_size});
    bool out_of_memory = false;
    run_in_pieces(kernel,
                  {data<T>(in[0]), data<T>(in[1]), data<T>(in[2]), data<T>(in[3]), data<T>(y), in[0].shape[0], c.queries, c.keys, c.heads, c.key_heads, c.size,
                   c.value_size, {c.keys, 0, 0}, c.scale(), &out_of_memory},
                  cuts);
    EXPECT_FALSE(out_of_memory);
    return y;
  };
  for (const auto& [level, kernel] : SCM_LEVELS(attention, T)) {
    SCOPED_TRACE(level);
    for (const AttentionCase& c : {AttentionCase{2, 130, 77, 2, 2, 3, 3}, AttentionCase{2, 77, 130, 2, 1, 64, 64}, AttentionCase{2, 64, 64, 3, 3, 40, 20},
                                   AttentionCase{2, 5, 9, 2, 2, 65, 7}}) {
      SCOPED_TRACE(::testing::Message() << c);
      const Inputs inputs(kType<T>, c, {2, 1, 1, c.keys});
      const std::int64_t units = c.heads * attention::query_blocks(c.queries);  // per sample
      const Tensor whole = apply(kernel, inputs.tensors, c, {0, 2 * units});
      expect_close(whole, c.y(), inputs.expected(c), 3e-6);
      Cuts every;
      for (std::int64_t unit = 0; unit <= 2 * units; ++unit) every.push_back(unit);
      expect_same_bits(apply(kernel, inputs.tensors, c, every), whole);
      for (std::int64_t i = 0; i < 2; ++i) {
        std::vector<Tensor> alone;
        for (const Tensor& input : inputs.tensors) alone.push_back(slice(input, i, i + 1));
        expect_same_bits(apply(kernel, alone, c, {0, units}), slice(whole, i, i + 1));
      }
    }
  }
}

TYPED_TEST(AttentionTest, InfersTheChannelsOfTheValues) {
  const auto type = kType<TypeParam>;
  const Attributes scale{{"scale", 0.5f}};
  EXPECT_EQ(inferred("Attention", {{type, "[N, L, 8, 40]"}, {type, "[N, S, 8, 40]"}, {type, "[N, S, 8, 16]"}}, scale), std::vector<std::string>{"[N, L, 8, 16]"});
  EXPECT_EQ(inferred("MaskedAttention", {{type, "[2, 5, 8, 4]"}, {type, "[2, S, 2, 4]"}, {type, "[2, S, 2, 4]"}, {type, "[2, 1, 1, S]"}}, scale),
            std::vector<std::string>{"[2, 5, 8, 4]"});
  EXPECT_EQ(inferred("Attention", {{type, "?"}, {type, "[N, S, 8, 40]"}, {type, "[N, S, 8, 16]"}}, scale), std::vector<std::string>{"?"});
}

TYPED_TEST(AttentionTest, RejectsInvalidInputs) {
  const auto expect_error = [](const Sizes& q, const Sizes& k, const Sizes& v, const std::vector<std::string>& fragments, const Sizes& mask = {}) {
    std::vector<Tensor> inputs;
    for (const Sizes& shape : {q, k, v}) inputs.push_back(random(kType<TypeParam>, shape));
    if (!mask.empty()) inputs.push_back(random(kType<TypeParam>, mask));
    expect_rejected(mask.empty() ? "Attention" : "MaskedAttention", inputs, {{"scale", 1.0f}}, fragments);
  };
  expect_error({2, 5, 12}, {2, 7, 4, 3}, {2, 7, 4, 3}, {"q must have 4 axes", "[2, 5, 12]"});
  expect_error({2, 5, 4, 257}, {2, 7, 4, 257}, {2, 7, 4, 3}, {"q must have at most 256 channels per head", "[2, 5, 4, 257]"});
  expect_error({2, 5, 4, 3}, {2, 7, 4, 3}, {2, 7, 4, 300}, {"v must have at most 256 channels per head", "[2, 7, 4, 300]"});
  expect_error({2, 5, 4, 0}, {2, 7, 4, 0}, {2, 7, 4, 3}, {"q must have at least 1 channel", "[2, 5, 4, 0]"});
  expect_error({2, 5, 4, 3}, {2, 7, 0, 3}, {2, 7, 0, 3}, {"k must have at least 1 head", "[2, 7, 0, 3]"});
  expect_error({2, 5, 4, 3}, {1, 7, 4, 3}, {2, 7, 4, 3}, {"k must have 2 (the samples of q) on axis 0", "[1, 7, 4, 3]"});
  expect_error({2, 5, 4, 3}, {2, 7, 4, 5}, {2, 7, 4, 3}, {"k must have 3 (the channels of q) on axis 3", "[2, 7, 4, 5]"});
  expect_error({2, 5, 4, 3}, {2, 7, 4, 3}, {2, 8, 4, 3}, {"v must have 7 (the keys of k) on axis 1", "[2, 8, 4, 3]"});
  expect_error({2, 5, 4, 3}, {2, 7, 2, 3}, {2, 7, 4, 3}, {"v must have 2 (the heads of k) on axis 2", "[2, 7, 4, 3]"});
  expect_error({2, 5, 4, 3}, {2, 7, 3, 3}, {2, 7, 3, 3}, {"k must have a number of heads that divides that of q, 4", "[2, 7, 3, 3]"});
  expect_error({2, 5, 4, 3}, {2, 7, 4, 3}, {2, 7, 4, 3}, {"mask must have 4 axes", "[5, 7]"}, {5, 7});
  expect_error({2, 5, 4, 3}, {2, 7, 4, 3}, {2, 7, 4, 3}, {"mask must have 4 (the heads of q, or 1) on axis 1", "[2, 3, 5, 7]"}, {2, 3, 5, 7});
  expect_error({2, 5, 4, 3}, {2, 7, 4, 3}, {2, 7, 4, 3}, {"mask must have 7 (the keys) on axis 3", "[2, 1, 1, 1]"}, {2, 1, 1, 1});
  const Tensor x = random(kType<TypeParam>, {1, 1, 1, 1});
  expect_rejected("Attention", {x, x, x}, {}, {"scale"});
}

}  // namespace
}  // namespace scm::testing
