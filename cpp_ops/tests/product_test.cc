// The float32 matrix product of the CPU kernels, at each x86-64 level and on the threads of a session.
#include "product/product.h"

#include <limits>
#include <random>

#include "product/run.h"
#include "support.h"

namespace scm::testing {
namespace {

struct Case {
  std::int64_t samples, rows, columns, depth;
};

// bias may be empty.
Values reference(const Values& a, const Values& b, const Values& bias, const Case& sizes) {
  Values c;
  for (std::int64_t sample = 0; sample < sizes.samples; ++sample) {
    for (std::int64_t row = 0; row < sizes.rows; ++row) {
      for (std::int64_t column = 0; column < sizes.columns; ++column) {
        double sum = bias.empty() ? 0 : bias[static_cast<std::size_t>(row)];
        for (std::int64_t k = 0; k < sizes.depth; ++k) {
          sum += a[static_cast<std::size_t>(row * sizes.depth + k)] * b[static_cast<std::size_t>((sample * sizes.depth + k) * sizes.columns + column)];
        }
        c.push_back(sum);
      }
    }
  }
  return c;
}

// Runs a kernel with units of the given size, the last unit first.
template <typename T>
Tensor apply(CpuKernel<product::Params<T>> kernel, std::int64_t lanes, const Tensor& a, const Tensor& b, const Tensor* bias, const Case& sizes,
             std::int64_t unit_rows, std::int64_t unit_vectors) {
  Tensor c = empty_like(a.type, {sizes.samples, sizes.rows, sizes.columns});
  bool out_of_memory = false;
  const product::Params<T> p{data<T>(a), data<T>(b), bias ? data<T>(*bias) : nullptr, data<T>(c), sizes.samples, sizes.rows, sizes.columns, sizes.depth,
                             unit_rows, unit_vectors, &out_of_memory};
  for (std::int64_t unit = product::units(p, lanes); unit > 0; --unit) kernel(p, unit - 1, unit);
  EXPECT_FALSE(out_of_memory);
  return c;
}

std::int64_t lanes_of(const std::string& level) { return level == "v4" ? 16 : level == "v3" ? 8 : 4; }

// A sum of `depth` terms of magnitude 1 in float32, added one after the other.
double tolerance(const Case& sizes) { return 1.5e-7 * static_cast<double>(sizes.depth + 8); }

template <typename T>
struct ProductTest : ::testing::Test {};
TYPED_TEST_SUITE(ProductTest, Elements, ElementNames);

TYPED_TEST(ProductTest, FollowsItsFormulaAndDependsOnNoBlocking) {
  using T = TypeParam;
  for (const auto& [level, kernel] : SCM_LEVELS(product, T)) {
    for (const Case& sizes : {Case{1, 1, 1, 1}, Case{2, 1, 64, 7}, Case{1, 14, 32, 256}, Case{1, 15, 33, 257}, Case{3, 29, 16, 70}, Case{5, 13, 5, 33},
                              Case{1, 70, 200, 600}, Case{2, 65, 49, 64}, Case{1, 3, 1, 520}, Case{2, 4, 100, 0}}) {
      SCOPED_TRACE(::testing::Message() << level << ": " << sizes.samples << " samples, [" << sizes.rows << ", " << sizes.depth << "] by [" << sizes.depth << ", "
                                        << sizes.columns << "]");
      const Tensor a = random(kType<T>, {sizes.rows, sizes.depth}), b = random(kType<T>, {sizes.samples, sizes.depth, sizes.columns}, 1, 1);
      const Tensor bias = random(kType<T>, {sizes.rows}, 1, 2);
      const Sizes shape{sizes.samples, sizes.rows, sizes.columns};
      const std::int64_t lanes = lanes_of(level);
      const Tensor whole = apply<T>(kernel, lanes, a, b, &bias, sizes, sizes.rows, 1000);
      expect_close(whole, shape, reference(values(a), values(b), values(bias), sizes), tolerance(sizes));
      expect_close(apply<T>(kernel, lanes, a, b, nullptr, sizes, sizes.rows, 1000), shape, reference(values(a), values(b), {}, sizes), tolerance(sizes));
      for (const std::int64_t unit_rows : {1, 5, 20}) {
        for (const std::int64_t unit_vectors : {1, 2, 5}) expect_same_bits(apply<T>(kernel, lanes, a, b, &bias, sizes, unit_rows, unit_vectors), whole);
      }
      for (std::int64_t sample = 0; sample < sizes.samples; ++sample) {
        const Case alone{1, sizes.rows, sizes.columns, sizes.depth};
        expect_same_bits(apply<T>(kernel, lanes, a, slice(b, sample, sample + 1), &bias, alone, sizes.rows, 1000), slice(whole, sample, sample + 1));
      }
      for (std::int64_t row = 0; row < sizes.rows; row += 9) {  // a row alone
        const Case alone{sizes.samples, 1, sizes.columns, sizes.depth};
        const Tensor one = slice(bias, row, row + 1), expected = apply<T>(kernel, lanes, slice(a, row, row + 1), b, &one, alone, 1, 3);
        for (std::int64_t sample = 0; sample < sizes.samples; ++sample) {
          Tensor got = slice(slice(whole, sample, sample + 1), 0, 1);
          got.shape = {sizes.rows, sizes.columns};
          got = slice(got, row, row + 1);
          got.shape = {1, 1, sizes.columns};
          expect_same_bits(got, slice(expected, sample, sample + 1));
        }
      }
    }
  }
}

TYPED_TEST(ProductTest, FollowsItsFormulaForRandomSizes) {
  using T = TypeParam;
  std::mt19937 generator(7);
  const auto pick = [&](std::int64_t low, std::int64_t high) { return std::uniform_int_distribution<std::int64_t>(low, high)(generator); };
  for (int i = 0; i < 20; ++i) {
    const Case sizes{pick(0, 5), pick(1, 200), pick(1, 70), pick(1, 300)};
    const Tensor a = random(kType<T>, {sizes.rows, sizes.depth}), b = random(kType<T>, {sizes.samples, sizes.depth, sizes.columns}, 1, 1);
    const Values expected = reference(values(a), values(b), {}, sizes);
    const std::int64_t unit_rows = pick(1, sizes.rows), unit_vectors = pick(1, 20);
    for (const auto& [level, kernel] : SCM_LEVELS(product, T)) {
      SCOPED_TRACE(::testing::Message() << level << ": " << sizes.samples << " samples, [" << sizes.rows << ", " << sizes.depth << "] by [" << sizes.depth << ", "
                                        << sizes.columns << "], units of " << unit_rows << " rows and " << unit_vectors << " vectors");
      expect_close(apply<T>(kernel, lanes_of(level), a, b, nullptr, sizes, unit_rows, unit_vectors), {sizes.samples, sizes.rows, sizes.columns}, expected,
                   tolerance(sizes));
    }
  }
}

TYPED_TEST(ProductTest, KeepsNaNAndInfinityWhereTheyCanReach) {
  using T = TypeParam;
  const Case sizes{2, 17, 37, 40};
  for (const auto& [level, kernel] : SCM_LEVELS(product, T)) {
    for (const double special : {std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity()}) {
      SCOPED_TRACE(::testing::Message() << level << ", " << special);
      Values a = values(random(kFloat, {sizes.rows, sizes.depth})), b = values(random(kFloat, {sizes.samples, sizes.depth, sizes.columns}, 1, 1));
      a[16 * 40 + 39] = special;
      b[(40 + 20) * 37 + 36] = special;  // the last column of the second sample
      const Tensor A = tensor(kType<T>, {sizes.rows, sizes.depth}, a), B = tensor(kType<T>, {sizes.samples, sizes.depth, sizes.columns}, b);
      expect_close(apply<T>(kernel, lanes_of(level), A, B, nullptr, sizes, 17, 100), {2, 17, 37}, reference(values(A), values(B), {}, sizes), tolerance(sizes));
    }
  }
}

TYPED_TEST(ProductTest, ReportsOutOfMemory) {
  using T = TypeParam;
  for (const auto& [level, kernel] : SCM_LEVELS(product, T)) {
    SCOPED_TRACE(level);
    bool out_of_memory = false;
    constexpr std::int64_t kRows = std::int64_t{1} << 44;
    kernel({nullptr, nullptr, nullptr, nullptr, 1, kRows, 1, 1000, kRows, 1, &out_of_memory}, 0, 1);
    EXPECT_TRUE(out_of_memory);
  }
}

// Units of few rows have partial sums from kStreams terms on.
TEST(ProductDivisionTest, PartialSumsFitTheCacheForAnyNumberOfColumns) {
  constexpr std::int64_t kMaxRowsOfTile = 14, kL2 = 2 << 20;
  for (const std::int64_t threads : {1, 2, 8, 64}) {
    for (const Case& sizes : {Case{8, 4, 512 * 512, 128}, Case{8, 4, 512 * 512, 33}, Case{1, 14, 1 << 20, 192}, Case{8, 300, 512 * 512, 1000}}) {
      SCOPED_TRACE(::testing::Message() << threads << " threads, " << sizes.rows << " rows, " << sizes.depth << " terms");
      product::Params<float> p{nullptr, nullptr, nullptr, nullptr, sizes.samples, sizes.rows, sizes.columns, sizes.depth, 0, 0, nullptr};
      product::divide(p, threads);
      const std::int64_t rows = (p.unit_rows + kMaxRowsOfTile - 1) / kMaxRowsOfTile * kMaxRowsOfTile;
      EXPECT_LE(rows * p.unit_vectors * product::vector_lanes() * static_cast<std::int64_t>(sizeof(float)), kL2);
    }
  }
}

}  // namespace
}  // namespace scm::testing
