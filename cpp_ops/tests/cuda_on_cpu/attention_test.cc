// The CUDA kernels of Attention and MaskedAttention, run by simulator.h and compared with a reference in double. The sizes are at boundaries of the kernels: of a
// vector, a tile of keys, a block of queries, the padded number of channels.
#include "../attention_reference.h"

#include "attention/op.h"
#include "memory.h"
#include "simulator.h"
#include "values.h"

namespace scm::testing {
namespace {

template <typename T>
struct AttentionKernelsTest : ::testing::Test {
  void TearDown() override { simulator::options = {}; }
};

TYPED_TEST_SUITE(AttentionKernelsTest, Elements, Names);

template <typename T>
struct Inputs {
  std::vector<T> q, k, v, mask;
  MaskShape mask_shape;

  explicit Inputs(const AttentionCase& c, const MaskShape& shape = {}, double scale = 1)
      : q(random<T>(c.samples * c.queries * c.heads * c.size, 1, scale)),
        k(random<T>(c.samples * c.keys * c.key_heads * c.size, 2, scale)),
        v(random<T>(c.samples * c.keys * c.key_heads * c.value_size, 3)),
        mask(shape.empty() ? std::vector<T>() : from_doubles<T>(some_mask(shape))),
        mask_shape(shape) {}

  Values run(const AttentionCase& c, int offset = 0) const {
    Array<T> q_array(q, offset), k_array(k), v_array(v), mask_array(mask), y(static_cast<std::size_t>(c.samples * c.queries * c.heads * c.value_size));
    attention::Params<T> p{q_array.data(), k_array.data(), v_array.data(), nullptr, y.data(), c.samples, c.queries, c.keys, c.heads, c.key_heads, c.size,
                           c.value_size,   {0, 0, 0},      c.scale(),      nullptr};
    if (!mask_shape.empty()) {
      p.mask = mask_array.data();
      std::copy_n(mask_strides(mask_shape).begin(), 3, p.mask_strides);
    }
    EXPECT_EQ(attention::cuda<T>(p, nullptr), nullptr);
    return to_doubles(y.values());
  }

  Values expected(const AttentionCase& c) const { return attention(c, to_doubles(q), to_doubles(k), to_doubles(v), to_doubles(mask), mask_shape); }
};

// Weights are rounded to T before they are multiplied with the values, which are of size 1: the tolerance is absolute too.
template <typename T>
::testing::AssertionResult attention_close(const Values& actual, const Values& expected) {
  return sizeof(T) == sizeof(float) ? close(actual, expected, 1e-5, 5e-6) : close(actual, expected, 2 * kRounding<T>, 2 * kRounding<T>);
}

TYPED_TEST(AttentionKernelsTest, FollowsItsFormula) {
  using T = TypeParam;
  for (const AttentionCase& c : {AttentionCase{1, 1, 1, 1, 1, 1, 1}, AttentionCase{2, 5, 7, 2, 1, 8, 8}, AttentionCase{1, 65, 77, 2, 2, 40, 40},
                                 AttentionCase{1, 17, 64, 1, 1, 64, 64}, AttentionCase{1, 33, 65, 2, 2, 80, 16}, AttentionCase{1, 20, 40, 1, 1, 128, 128},
                                 AttentionCase{1, 20, 33, 1, 1, 33, 65}, AttentionCase{1, 20, 33, 1, 1, 160, 160}, AttentionCase{1, 3, 0, 1, 1, 8, 8}}) {
    for (const MaskShape& mask : {MaskShape{}, MaskShape{c.samples, 1, 1, c.keys}, MaskShape{1, c.heads, c.queries, c.keys}}) {
      SCOPED_TRACE(::testing::Message() << c << ", mask of " << mask.size() << " axes");
      const Inputs<T> inputs(c, mask);
      const auto outputs = run_in_all_orders([&] { return std::vector<Values>{inputs.run(c)}; });
      EXPECT_TRUE(attention_close<T>(outputs[0], inputs.expected(c)));
    }
  }
}

TYPED_TEST(AttentionKernelsTest, AcceptsPointersThatAreNotAligned) {
  for (const std::int64_t size : {16, 64}) {
    const AttentionCase c{1, 70, 40, 1, 1, size, size};
    const Inputs<TypeParam> inputs(c);
    EXPECT_TRUE(attention_close<TypeParam>(inputs.run(c, 1), inputs.expected(c)));
  }
}

TYPED_TEST(AttentionKernelsTest, IsTheSameToTheBitInALargeBatch) {
  using T = TypeParam;
  const AttentionCase one{1, 100, 77, 1, 1, 40, 40}, many{256, 100, 77, 1, 1, 40, 40};
  const Inputs<T> alone(one);
  Inputs<T> batch(one);
  for (std::vector<T>* x : {&batch.q, &batch.k, &batch.v}) x->resize(x->size() * 256);
  simulator::options.only_blocks = 2;  // the first sample
  Values first = batch.run(many);
  simulator::options = {};
  const Values expected = alone.run(one);
  first.resize(expected.size());
  EXPECT_TRUE(close(first, expected, 0, 0));
}

TYPED_TEST(AttentionKernelsTest, AcceptsScoresThatGrowFromKeyToKey) {
  using T = TypeParam;
  for (const std::int64_t size : {32, 160}) {
    const AttentionCase c{1, 20, 130, 1, 1, size, size};
    Inputs<T> inputs(c);
    Values q(static_cast<std::size_t>(20 * size)), k(static_cast<std::size_t>(130 * size));
    for (std::size_t i = 0; i < 20; ++i) q[i * static_cast<std::size_t>(size)] = 4;
    for (std::size_t i = 0; i < 130; ++i) k[i * static_cast<std::size_t>(size)] = (static_cast<double>(i) - 65) * 16;
    inputs.q = from_doubles<T>(q);
    inputs.k = from_doubles<T>(k);
    EXPECT_TRUE(attention_close<T>(inputs.run(c), inputs.expected(c)));
  }
}

TYPED_TEST(AttentionKernelsTest, GivesZeroForAQueryThatMayAttendToNoKey) {
  using T = TypeParam;
  for (const std::int64_t size : {16, 160}) {
    const AttentionCase c{1, 3, 40, 1, 1, size, size};
    Inputs<T> inputs(c, {1, 1, 3, 40});
    std::fill_n(inputs.mask.begin() + 40, 40, from_doubles<T>({-kInfinity})[0]);
    EXPECT_TRUE(attention_close<T>(inputs.run(c), inputs.expected(c)));
  }
}

TYPED_TEST(AttentionKernelsTest, KeepsNaNWhereItBelongs) {
  using T = TypeParam;
  for (const std::int64_t size : {16, 160}) {
    const AttentionCase c{1, 20, 20, 2, 2, size, size};
    Inputs<T> inputs(c);
    inputs.q[static_cast<std::size_t>(4 * 2 * size)] = from_doubles<T>({kNan})[0];  // query 4 of head 0
    EXPECT_TRUE(attention_close<T>(inputs.run(c), inputs.expected(c)));
    inputs.k[static_cast<std::size_t>((7 * 2 + 1) * size)] = from_doubles<T>({kNan})[0];  // key 7 of head 1
    EXPECT_TRUE(attention_close<T>(inputs.run(c), inputs.expected(c)));
  }
}

}  // namespace
}  // namespace scm::testing
