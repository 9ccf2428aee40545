// Values, random inputs, comparisons and thread orders of the tests of kernels.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include "common/types.h"
#include "simulator.h"

namespace scm::testing {

using Values = std::vector<double>;

// AddressSanitizer makes the simulator slow. Tests then take fewer cases and types: it is for addresses, which depend on neither; the other builds have all.
#ifdef __SANITIZE_ADDRESS__
constexpr bool kAddressSanitizer = true;
#else
constexpr bool kAddressSanitizer = false;
#endif
using Elements = std::conditional_t<kAddressSanitizer, ::testing::Types<float, float16>, ::testing::Types<float, float16, bfloat16>>;
using HalfElements = std::conditional_t<kAddressSanitizer, ::testing::Types<float16>, ::testing::Types<float16, bfloat16>>;

inline const double kNan = std::numeric_limits<double>::quiet_NaN(), kInfinity = std::numeric_limits<double>::infinity();

// -- Elements -----------------------------------------------------------------------------------------------------------------

template <typename T>
constexpr double kRounding = 0x1p-24;  // of numbers near 1
template <>
constexpr double kRounding<float16> = 0x1p-11;
template <>
constexpr double kRounding<bfloat16> = 0x1p-8;

template <typename T>
std::vector<T> from_doubles(const Values& values) {
  std::vector<T> result;
  for (const double value : values) result.push_back(from_float<T>(static_cast<float>(value)));
  return result;
}

template <typename T>
Values to_doubles(const std::vector<T>& values) {
  Values result;
  for (const T value : values) {
    if constexpr (std::is_integral_v<T>) {
      result.push_back(value);
    } else {
      result.push_back(to_float(value));
    }
  }
  return result;
}

template <typename T>
std::vector<T> random(std::int64_t count, unsigned seed, double scale = 1) {
  std::mt19937 generator(seed);
  std::normal_distribution<double> normal(0, scale);
  Values values(static_cast<std::size_t>(count));
  for (double& value : values) value = normal(generator);
  return from_doubles<T>(values);
}

// NaN equals NaN, and infinity equals infinity.
inline ::testing::AssertionResult close(const Values& actual, const Values& expected, double relative, double absolute) {
  if (actual.size() != expected.size()) return ::testing::AssertionFailure() << actual.size() << " elements, expected " << expected.size();
  for (std::size_t i = 0; i < actual.size(); ++i) {
    if (actual[i] == expected[i] || (std::isnan(actual[i]) && std::isnan(expected[i]))) continue;
    if (!(std::abs(actual[i] - expected[i]) <= absolute + relative * std::abs(expected[i]))) {
      return ::testing::AssertionFailure() << "element " << i << " of " << actual.size() << " is " << actual[i] << ", expected " << expected[i];
    }
  }
  return ::testing::AssertionSuccess();
}

template <typename T>
::testing::AssertionResult close(const Values& actual, const Values& expected) {
  return close(actual, expected, kRounding<T> + 2e-6, 1e-6);
}

struct Names {
  template <typename T>
  static std::string GetName(int) {
    return std::is_same_v<T, float> ? "float" : std::is_same_v<T, float16> ? "float16" : "bfloat16";
  }
};

// Calls `run`, which launches one kernel and returns its outputs, with different thread orders and grid sizes, and expects the same bits.
template <typename Run>
std::vector<Values> run_in_all_orders(const Run& run) {
  simulator::options = {};
  const unsigned long before = simulator::launches;
  const std::vector<Values> expected = run();
  EXPECT_EQ(simulator::launches, before + 1);
  if (kAddressSanitizer) return expected;
  for (const bool reversed : {false, true}) {
    simulator::options.reversed = reversed;
    simulator::options.max_blocks = reversed ? 0 : 2;
    const std::vector<Values> actual = run();
    for (std::size_t i = 0; i < expected.size(); ++i) {
      EXPECT_TRUE(close(actual[i], expected[i], 0, 0)) << (reversed ? "reversed" : "in at most two blocks") << ", output " << i;
    }
  }
  simulator::options = {};
  return expected;
}

inline double mp_silu_of(double x) { return x / (1 + std::exp(-x)) / 0.596; }

inline Values mp_silu_of(Values x) {
  for (double& value : x) value = mp_silu_of(value);
  return x;
}

}  // namespace scm::testing
