// The kernels of the 3x3 convolution in float32, called directly for each x86-64 level that the processor supports, with every way to divide the work.
#include "winograd/winograd.h"

#include <cmath>
#include <cstring>
#include <limits>

#include "support.h"
#include "winograd/run.h"

namespace scm::testing {
namespace {

using winograd::Kernels;
using winograd::Params;
using winograd::Plan;

template <typename T>
std::vector<std::pair<const char*, Kernels<T>>> levels() {
  std::vector<std::pair<const char*, Kernels<T>>> found{{"generic", winograd::kernels_generic<T>()}};
#ifdef SCM_OPS_X86_LEVELS
  if (cpu_level() >= CpuLevel::v3) found.emplace_back("v3", winograd::kernels_v3<T>());
  if (cpu_level() >= CpuLevel::v4) found.emplace_back("v4", winograd::kernels_v4<T>());
#endif
  return found;
}

struct Case {
  std::int64_t samples, height, width, in, out;

  Sizes map(bool channels_first, std::int64_t channels) const {
    return channels_first ? Sizes{samples, channels, height, width} : Sizes{samples, height, width, channels};
  }
  std::string text() const { return testing::text({samples, height, width, in, out}); }
};

// Offset of an element of a map.
std::size_t at(const Case& c, bool channels_first, std::int64_t channels, std::int64_t n, std::int64_t h, std::int64_t w, std::int64_t channel) {
  const std::int64_t first = ((n * channels + channel) * c.height + h) * c.width + w, last = ((n * c.height + h) * c.width + w) * channels + channel;
  return static_cast<std::size_t>(channels_first ? first : last);
}

Values reference(const Case& c, bool channels_first, const Values& x, const Values& weight, const Values& bias) {
  Values y(static_cast<std::size_t>(c.samples * c.height * c.width * c.out));
  for (std::int64_t n = 0; n < c.samples; ++n) {
    for (std::int64_t h = 0; h < c.height; ++h) {
      for (std::int64_t w = 0; w < c.width; ++w) {
        for (std::int64_t o = 0; o < c.out; ++o) {
          double sum = bias[static_cast<std::size_t>(o)];
          for (std::int64_t tap = 0; tap < 9; ++tap) {
            const std::int64_t row = h + tap / 3 - 1, column = w + tap % 3 - 1;
            if (row < 0 || row >= c.height || column < 0 || column >= c.width) continue;
            for (std::int64_t i = 0; i < c.in; ++i) {
              sum += x[at(c, channels_first, c.in, n, row, column, i)] * weight[static_cast<std::size_t>((o * c.in + i) * 9 + tap)];
            }
          }
          y[at(c, channels_first, c.out, n, h, w, o)] = sum;
        }
      }
    }
  }
  return y;
}

template <typename T>
Tensor apply(const Kernels<T>& kernels, const Case& c, bool channels_first, const Plan& plan, const Tensor& x, const Tensor& weight, const Tensor& bias) {
  Tensor y = empty_like(kType<T>, c.map(channels_first, c.out));
  Params<T> p{};
  p.x = data<T>(x);
  p.weight = data<T>(weight);
  p.bias = data<T>(bias);
  p.y = data<T>(y);
  p.sizes = {c.samples, c.height, c.width, c.in, c.out};
  p.channels_first = channels_first;
  p.plan = plan;
  // Scratch memory has undefined contents.
  constexpr float kUndefined = std::numeric_limits<float>::quiet_NaN();
  const std::int64_t scratch_size = std::max(winograd::transform_scratch(p.sizes), winograd::multiply_scratch(plan));
  std::vector<float> v(static_cast<std::size_t>(winograd::v_size(p.sizes, plan)), kUndefined), scratch(static_cast<std::size_t>(scratch_size), kUndefined);
  p.v = v.data();
  for (p.first = 0; p.first < winograd::total_tiles(p.sizes); p.first += plan.group) {
    p.count = std::min(plan.group, winograd::total_tiles(p.sizes) - p.first);
    const std::int64_t half = p.count / 2;
    kernels.transform(p, half, p.count, scratch.data());
    kernels.transform(p, 0, half, scratch.data());
    for (std::int64_t piece = winograd::pieces(p.sizes, plan, p.count); piece-- > 0;) kernels.multiply(p, piece, scratch.data());
  }
  return y;
}

// As expect_same_bits, but every NaN equals every other.
void expect_same_numbers(const Values& actual, const Values& expected) {
  ASSERT_EQ(actual.size(), expected.size());
  for (std::size_t i = 0; i < expected.size(); ++i) {
    ASSERT_TRUE(actual[i] == expected[i] || (std::isnan(actual[i]) && std::isnan(expected[i]))) << actual[i] << " in place of " << expected[i] << " at " << i;
  }
}

template <typename T>
class WinogradTest : public ::testing::Test {};
TYPED_TEST_SUITE(WinogradTest, Elements, ElementNames);

// With 9 tiles, the last chunk of {9, 4, ...} has a single one.
const Plan kPlans[] = {{1000, 1000, 32, 32, false}, {7, 7, 32, 16, true}, {9, 4, 16, 48, false}, {13, 6, 32, 0, false}, {1000, 1, 16, 0, false}};

// The largest error of F(4x4, 3x3), relative to the root mean square of the outputs, which is about 1 here.
constexpr double kTolerance = 5e-5;

TYPED_TEST(WinogradTest, EqualsTheSumOverTapsHoweverTheWorkIsDivided) {
  using T = TypeParam;
  for (const Case& c : {Case{1, 1, 1, 1, 1}, Case{2, 3, 5, 33, 17}, Case{3, 4, 4, 16, 64}, Case{1, 9, 30, 20, 66}, Case{2, 17, 2, 5, 4}, Case{1, 2, 35, 50, 33},
                        Case{5, 7, 6, 48, 100}, Case{1, 12, 12, 40, 4}, Case{9, 1, 1, 40, 70}}) {
    for (const bool channels_first : {false, true}) {
      const Tensor x = random(kType<T>, c.map(channels_first, c.in)), bias = random(kType<T>, {c.out}, 1, 2);
      const Tensor weight = random(kType<T>, {c.out, c.in, 3, 3}, 1 / std::sqrt(9.0 * static_cast<double>(c.in)), 1);
      const Values expected = reference(c, channels_first, values(x), values(weight), values(bias));
      Tensor fused;  // of the first level with fused multiply-adds
      for (const auto& [level, kernels] : levels<T>()) {
        SCOPED_TRACE(std::string(level) + ", " + c.text() + (channels_first ? ", channels first" : ", channels last"));
        const Tensor whole = apply(kernels, c, channels_first, kPlans[0], x, weight, bias);
        expect_close(whole, c.map(channels_first, c.out), expected, kTolerance);
        for (const Plan& plan : kPlans) expect_same_bits(apply(kernels, c, channels_first, plan, x, weight, bias), whole);
        if (std::strcmp(level, "generic") == 0) continue;
        if (fused.bytes.empty()) fused = whole;
        expect_same_bits(whole, fused);
      }
    }
  }
}

TYPED_TEST(WinogradTest, ComputesTilesThatAreNotFiniteAsTheSumOverTaps) {
  using T = TypeParam;
  const Case c{2, 9, 10, 20, 35};
  const double infinity = std::numeric_limits<double>::infinity(), nan = std::numeric_limits<double>::quiet_NaN();
  struct Special {
    double value;
    bool in_weight;
  };
  for (const auto& [special, in_weight] :
       {Special{nan, false}, Special{infinity, false}, Special{-infinity, false}, Special{nan, true}, Special{infinity, true}}) {
    for (const bool channels_first : {false, true}) {
      Values x = values(random(kType<T>, c.map(channels_first, c.in))), weight = values(random(kType<T>, {c.out, c.in, 3, 3}, 0.1, 1));
      (in_weight ? weight[(1 * 20 + 19) * 9 + 4] : x[at(c, channels_first, c.in, 1, 4, 3, 19)]) = special;
      const Tensor X = tensor(kType<T>, c.map(channels_first, c.in), x), W = tensor(kType<T>, {c.out, c.in, 3, 3}, weight);
      const Tensor bias = random(kType<T>, {c.out}, 1, 2);
      const Values expected = reference(c, channels_first, values(X), values(W), values(bias));
      Values fused;  // of the first level with fused multiply-adds
      for (const auto& [level, kernels] : levels<T>()) {
        SCOPED_TRACE(::testing::Message() << level << ", " << special << (in_weight ? " in a weight" : " in x"));
        const Values whole = values(apply(kernels, c, channels_first, kPlans[0], X, W, bias));
        if (std::strcmp(level, "generic") != 0 && fused.empty()) fused = whole;
        for (const Plan& plan : kPlans) {
          const Values y = values(apply(kernels, c, channels_first, plan, X, W, bias));
          expect_same_numbers(y, whole);
          if (!fused.empty()) expect_same_numbers(y, fused);
          for (std::size_t i = 0; i < expected.size(); ++i) {
            if (std::isfinite(expected[i])) {
              ASSERT_NEAR(y[i], expected[i], (sizeof(T) == 2 ? 2e-3 : kTolerance) * std::max(1.0, std::fabs(expected[i])));
            } else {
              ASSERT_TRUE(std::isnan(expected[i]) ? std::isnan(y[i]) : y[i] == expected[i]) << y[i] << " in place of " << expected[i];
            }
          }
        }
      }
    }
  }
}

constexpr std::int64_t kThreads[] = {1, 2, 3, 5, 8, 16, 31, 64, 256};

TEST(WinogradPlanTest, ThreadsGetWorkInBoundedMemory) {
  constexpr std::int64_t kMaxV = (64 << 20) / sizeof(float);
  for (const std::int64_t threads : kThreads) {
    for (const std::int64_t samples : {1, 2, 8, 64}) {
      for (const std::int64_t side : {1, 4, 7, 8, 16, 30, 64, 256}) {
        for (const std::int64_t in : {1, 16, 192, 1280}) {
          for (const std::int64_t out : {1, 4, 32, 200, 1280}) {
            SCOPED_TRACE(::testing::Message() << threads << " threads, " << text({samples, side, side, in, out}));
            const winograd::Sizes sizes{samples, side, side, in, out};
            const Plan plan = winograd::choose_plan(sizes, threads);
            const std::int64_t tiles = winograd::total_tiles(sizes), group = plan.group, groups = (tiles + group - 1) / group;
            ASSERT_TRUE(plan.block == 16 || plan.block == 32);
            ASSERT_EQ(plan.depth % winograd::kStep, 0);
            ASSERT_GE(plan.chunk, 1);
            ASSERT_LE(plan.chunk, group);
            ASSERT_LE(group, tiles);
            ASSERT_TRUE(!plan.separate || plan.chunk == group);
            ASSERT_LE(winograd::v_size(sizes, plan) * (plan.separate ? std::min(groups, threads) : 1), kMaxV);
            ASSERT_LE(winograd::multiply_scratch(plan), (1 << 20) / static_cast<std::int64_t>(sizeof(float)));
            const std::int64_t pieces = plan.separate ? groups : winograd::pieces(sizes, plan, group);
            ASSERT_TRUE(pieces * 4 >= threads * 3 || (plan.block == 16 && plan.chunk <= 8)) << pieces << " pieces";
          }
        }
      }
    }
  }
}

TEST(WinogradPlanTest, ResultsDoNotDependOnTheNumberOfThreads) {
  for (const Case& c : {Case{1, 24, 24, 20, 4}, Case{3, 8, 9, 20, 40}, Case{2, 33, 33, 17, 70}}) {
    const Tensor x = random(kFloat, c.map(false, c.in)), weight = random(kFloat, {c.out, c.in, 3, 3}, 0.1, 1), bias = random(kFloat, {c.out}, 1, 2);
    for (const auto& [level, kernels] : levels<float>()) {
      const Tensor whole = apply(kernels, c, false, kPlans[0], x, weight, bias);
      for (const std::int64_t threads : kThreads) {
        SCOPED_TRACE(::testing::Message() << level << ", " << c.text() << ", " << threads << " threads");
        const Plan plan = winograd::choose_plan({c.samples, c.height, c.width, c.in, c.out}, threads);
        expect_same_bits(apply(kernels, c, false, plan, x, weight, bias), whole);
      }
    }
  }
}

// The sums of output 0 overflow in float32, those of its neighbors do not.
TEST(WinogradOverflowTest, ChannelsDoNotDependOnTheDivisionOfTheWork) {
  const Case c{1, 8, 8, 32, 32};
  Values x = values(random(kFloat, c.map(false, c.in))), weight = values(random(kFloat, {c.out, c.in, 3, 3}, 1, 1));
  for (double& element : x) element *= 1e34;
  for (std::size_t i = 0; i < 32 * 9; ++i) weight[i] *= 1e5;
  const Tensor X = tensor(kFloat, c.map(false, c.in), x), W = tensor(kFloat, {c.out, c.in, 3, 3}, weight), bias = random(kFloat, {c.out});
  for (const auto& [level, kernels] : levels<float>()) {
    SCOPED_TRACE(level);
    const Values whole = values(apply(kernels, c, false, kPlans[0], X, W, bias));
    EXPECT_FALSE(std::isfinite(whole[0]) && std::isfinite(whole[32]));
    EXPECT_TRUE(std::isfinite(whole[31]));
    for (const Plan& plan : kPlans) expect_same_numbers(values(apply(kernels, c, false, plan, X, W, bias)), whole);
  }
}

}  // namespace
}  // namespace scm::testing
