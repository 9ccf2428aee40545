// Conversions between float and the 16-bit types, compared with the independent implementations in support.cc and, if the compiler has it, with _Float16. Also
// through kernels of each x86-64 level, whose vectorized conversions are different code.
#include "common/types.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <random>

#include "mp_sum/op.h"
#include "support.h"

namespace scm::testing {
namespace {

std::uint32_t bits(float x) {
  std::uint32_t result;
  std::memcpy(&result, &x, sizeof result);
  return result;
}

float from_bits(std::uint32_t x) {
  float result;
  std::memcpy(&result, &x, sizeof result);
  return result;
}

// Returns floats of all kinds: every exponent with fractions around the ties of both 16-bit types, and random bits.
std::vector<float> sampled_floats() {
  std::vector<float> floats;
  for (std::uint32_t high = 0; high < 0x10000; ++high) {  // sign, exponent, upper 7 bits of the fraction
    for (const std::uint32_t low : {0x0000u, 0x0001u, 0x0fffu, 0x1000u, 0x1001u, 0x2fffu, 0x3000u, 0x3001u, 0x7fffu, 0x8000u, 0x8001u, 0xf000u, 0xffffu}) {
      floats.push_back(from_bits(high << 16 | low));
    }
  }
  std::mt19937 generator(1);
  for (int i = 0; i < 200000; ++i) floats.push_back(from_bits(static_cast<std::uint32_t>(generator())));
  for (int i = 0; i < 200000; ++i) floats.push_back(std::ldexp(static_cast<float>(generator()), static_cast<int>(generator() % 45) - 32 - 27));  // around float16
  for (const float x : {65519.996f, 65520.0f, -65520.0f, 65504.0f, 0x1p-25f, 0x1.000002p-25f, 0x1p-24f, 0x1.8p-24f, 0x1p-14f, 0x1.ffcp-15f, 0x1.ffep-15f}) floats.push_back(x);
  return floats;
}

TEST(TypesTest, EveryHalfConvertsToItsFloat) {
  for (std::uint32_t half = 0; half < 0x10000; ++half) {
    const float got = to_float(float16{static_cast<std::uint16_t>(half)});
    const double expected = half_to_double(static_cast<std::uint16_t>(half));
    if (std::isnan(expected)) {
      ASSERT_TRUE(std::isnan(got)) << half;
    } else {
      ASSERT_EQ(got, expected) << half;
    }
    ASSERT_EQ(std::signbit(got), half >> 15 != 0) << half;
  }
}

TEST(TypesTest, EveryHalfSurvivesARoundTrip) {
  for (std::uint32_t half = 0; half < 0x10000; ++half) {
    const std::uint16_t back = from_float<float16>(to_float(float16{static_cast<std::uint16_t>(half)})).bits;
    const bool nan = (half & 0x7fff) > 0x7c00;
    ASSERT_EQ(back, nan ? (half & 0x8000) | 0x7e00 : half);
  }
}

TEST(TypesTest, FloatsRoundToTheNearestHalf) {
  for (const float x : sampled_floats()) ASSERT_EQ(from_float<float16>(x).bits, double_to_half(x)) << std::hexfloat << x;
}

#if defined(__FLT16_MANT_DIG__) && (defined(__x86_64__) || defined(__clang__) || __GNUC__ >= 13)  // GCC 12 has no _Float16 in C++ on ARM
TEST(TypesTest, AgreesWithTheCompilersHalf) {
  for (std::uint32_t half = 0; half < 0x10000; ++half) {
    const auto narrow = static_cast<std::uint16_t>(half);
    _Float16 other;
    std::memcpy(&other, &narrow, sizeof other);
    const float got = to_float(float16{narrow}), expected = static_cast<float>(other);
    ASSERT_TRUE(std::isnan(expected) ? std::isnan(got) : bits(got) == bits(expected)) << half;
  }
  for (const float x : sampled_floats()) {
    if (std::isnan(x)) continue;  // the payload may differ
    const auto other = static_cast<_Float16>(x);
    std::uint16_t expected;
    std::memcpy(&expected, &other, sizeof expected);
    ASSERT_EQ(from_float<float16>(x).bits, expected) << std::hexfloat << x;
  }
}
#endif

TEST(TypesTest, EveryBfloat16ConvertsToItsFloatAndBack) {
  for (std::uint32_t narrow = 0; narrow < 0x10000; ++narrow) {
    const float x = to_float(bfloat16{static_cast<std::uint16_t>(narrow)});
    ASSERT_EQ(bits(x), narrow << 16);
    const std::uint16_t back = from_float<bfloat16>(x).bits;
    if ((narrow & 0x7fff) > 0x7f80) {
      ASSERT_TRUE(std::isnan(to_float(bfloat16{back})));
    } else {
      ASSERT_EQ(back, narrow);
    }
  }
}

TEST(TypesTest, FloatsRoundToTheNearestBfloat16) {
  for (const float x : sampled_floats()) {
    const float got = to_float(from_float<bfloat16>(x));
    if (std::isnan(x)) {
      ASSERT_TRUE(std::isnan(got)) << std::hexfloat << x;
      continue;
    }
    // The two neighbors of x. Beyond the largest number is infinity, which counts as 2^128.
    const float below = from_bits(bits(x) & 0xffff0000);
    const float above = std::isinf(x) ? x : from_bits((bits(x) & 0xffff0000) + 0x10000);
    const double far = std::isinf(above) ? std::copysign(0x1p128, x) : above, down = std::fabs(double{x} - below), up = std::fabs(far - double{x});
    const bool even_below = (bits(below) >> 16 & 1) == 0;
    const float expected = std::isinf(x) || down < up || (down == up && even_below) ? below : above;
    ASSERT_EQ(bits(got), bits(expected)) << std::hexfloat << x;
  }
}

// a + 2^-k b is rounded to float once, whether or not the multiplication is fused.
TEST(TypesTest, KernelsRoundToTheNearestHalfAtEveryLevel) {
  const std::size_t count = 0x10000;
  Tensor a = empty_like(kHalf, {count}), b = a, y = a;
  for (std::size_t i = 0; i < count; ++i) data<float16>(a)[i].bits = static_cast<std::uint16_t>(i);
  std::mt19937 generator(2);
  for (const auto& [level, kernel] : SCM_LEVELS(mp_sum, float16)) {
    SCOPED_TRACE(level);
    for (const float weight : {0.0f, 0x1p-11f, 0x1p-12f, 0x1p-1f, -0x1p-11f}) {
      for (std::size_t i = 0; i < count; ++i) data<float16>(b)[i].bits = static_cast<std::uint16_t>(generator() % 0x7c00);
      kernel({data<float16>(a), data<float16>(b), data<float16>(y), nullptr, static_cast<std::int64_t>(count), 1.0f, weight, std::numeric_limits<float>::infinity()}, 0, count);
      for (std::size_t i = 0; i < count; ++i) {
        const double sum = half_to_double(data<float16>(a)[i].bits) + static_cast<double>(weight) * half_to_double(data<float16>(b)[i].bits);
        const std::uint16_t expected = double_to_half(static_cast<float>(sum)), got = data<float16>(y)[i].bits;
        if (std::isnan(sum)) {
          ASSERT_TRUE(std::isnan(half_to_double(got))) << i;
        } else {
          ASSERT_EQ(got & (sum == 0 ? 0x7fff : 0xffff), expected & (sum == 0 ? 0x7fff : 0xffff)) << i;
        }
      }
    }
  }
}

}  // namespace
}  // namespace scm::testing
