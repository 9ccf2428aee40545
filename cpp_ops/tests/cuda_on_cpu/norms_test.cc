// The CUDA kernels of GroupNorm, LayerNorm and RMSNorm, run by simulator.h and compared with references in double. The sizes are at boundaries of the kernels.
#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <vector>

#include "group_norm/op.h"
#include "layer_norm/op.h"
#include "memory.h"
#include "simulator.h"
#include "values.h"

namespace scm::testing {
namespace {

constexpr float kEps = 1e-5f;

template <typename T>
struct NormsTest : ::testing::Test {
  void TearDown() override { simulator::options = {}; }
};

TYPED_TEST_SUITE(NormsTest, Elements, Names);

// Normalizes pieces of `size` elements, in double.
Values normalized(Values y, std::int64_t size, bool subtracts_mean) {
  for (std::size_t begin = 0; begin < y.size(); begin += static_cast<std::size_t>(size)) {
    double mean = 0, squares = 0;
    for (std::int64_t i = 0; subtracts_mean && i < size; ++i) mean += y[begin + i] / static_cast<double>(size);
    for (std::int64_t i = 0; i < size; ++i) squares += std::pow(y[begin + i] - mean, 2);
    const double root = std::sqrt(squares / static_cast<double>(size) + double{kEps});
    for (std::int64_t i = 0; i < size; ++i) y[begin + i] = (y[begin + i] - mean) / root;
  }
  return y;
}

struct GroupCase {
  std::int64_t samples, channels, pixels, groups;
};
const std::vector<GroupCase> kGroupCases{{1, 1, 1, 1}, {2, 6, 35, 3}, {1, 64, 16, 32}, {3, 4, 257, 1}, {1, 2, 2048, 2}, {2, 2, 16385, 2}, {1, 4, 8200, 1}};

TYPED_TEST(NormsTest, GroupNormFollowsItsFormula) {
  using T = TypeParam;
  for (const auto& [samples, channels, pixels, groups] : kGroupCases) {
    for (const int form : {0, 1, 2}) {  // plain, with SiLU, with SiLU and modulation
      for (const auto& [offset, in_place] : {std::pair{0, false}, {0, true}, {1, false}}) {
        if (in_place && form == 1) continue;
        SCOPED_TRACE(::testing::Message() << samples << ' ' << channels << ' ' << pixels << ' ' << groups << ", form " << form << ", offset " << offset << (in_place ? ", in place" : ""));
        const std::int64_t count = samples * channels * pixels;
        const std::vector<T> input = random<T>(count, 1), columns = random<T>(samples * 2 * channels, 2, 0.5);
        const std::vector<float> scales = random<float>(channels, 3), biases = random<float>(channels, 4);
        const std::int64_t size = channels / groups * pixels, floats = group_norm::parts_of(size) > 1 ? 3 * group_norm::parts_of(size) * samples * groups : 0;
        const auto run = [&] {
          Array<T> x(input, offset), y(input.size(), offset), modulation(columns);
          Array<float> scale(scales), bias(biases), partials(static_cast<std::size_t>(floats));
          T* out = in_place ? x.data() : y.data();
          group_norm::Params<T> p{x.data(), scale.data(), bias.data(), form == 2 ? modulation.data() : nullptr, out, samples, channels, pixels, groups, kEps, form > 0};
          EXPECT_EQ(group_norm::partial_floats(p), floats);
          p.partials = partials.data();
          EXPECT_EQ(group_norm::cuda(p, nullptr), nullptr);
          return to_doubles(in_place ? x.values() : y.values());
        };
        Values expected = normalized(to_doubles(input), size, true);
        for (std::int64_t i = 0; i < count; ++i) {
          const std::int64_t channel = i / pixels % channels, row = i / pixels / channels * 2 * channels + channel;
          double& y = expected[i];
          y = y * scales[channel] + biases[channel];
          if (form == 2) y = y * (1 + to_float(columns[row])) + to_float(columns[row + channels]);
          if (form > 0) y = y / (1 + std::exp(-y));
        }
        const Values found = run();
        EXPECT_TRUE(close(found, expected, kRounding<T> + 2e-6, 4e-6));
        for (const bool reversed : {false, true}) {
          simulator::options.reversed = reversed;
          simulator::options.max_blocks = reversed ? 0 : 2;
          EXPECT_TRUE(close(run(), found, 0, 0)) << (reversed ? "reversed" : "in at most two blocks");
        }
        simulator::options = {};
      }
    }
  }
}

TYPED_TEST(NormsTest, GroupNormKeepsInfinityAndNaNInTheirPlace) {
  using T = TypeParam;
  const std::vector<T> input = random<T>(24, 1);
  const Values plain = normalized(to_doubles(input), 12, true);
  for (const double special : {kInfinity, -kInfinity, kNan}) {
    for (const int place : {0, 1, 2, 3}) {  // scale, bias, factor and shift of the second channel
      SCOPED_TRACE(::testing::Message() << special << " in place " << place);
      Array<T> x(input), y(input.size()), modulation(std::vector<T>(8, from_float<T>(0)));
      Array<float> scale(std::vector<float>{1, 1, 1, 1}), bias(std::vector<float>{0, 0, 0, 0}), partials(0);
      double numbers[] = {1, 0, 0, 0};
      numbers[place] = special;
      scale.data()[1] = static_cast<float>(numbers[0]);
      bias.data()[1] = static_cast<float>(numbers[1]);
      modulation.data()[1] = from_float<T>(static_cast<float>(numbers[2]));
      modulation.data()[5] = from_float<T>(static_cast<float>(numbers[3]));
      const group_norm::Params<T> p{x.data(), scale.data(), bias.data(), modulation.data(), y.data(), 1, 4, 6, 2, kEps, false};
      EXPECT_EQ(group_norm::cuda(p, nullptr), nullptr);
      Values expected = plain;
      for (std::size_t i = 6; i < 12; ++i) expected[i] = (expected[i] * numbers[0] + numbers[1]) * (1 + numbers[2]) + numbers[3];
      EXPECT_TRUE(close(to_doubles(y.values()), expected, kRounding<T> + 2e-6, 4e-6));
    }
  }
}

TEST(NormsAccuracyTest, NormalizationsAreAccurateForALargeMean) {
  std::vector<float> input = random<float>(2 * 17000, 1);
  for (float& x : input) x += 1000;
  const auto size = static_cast<std::int64_t>(input.size());
  Array<float> x(input), group(input.size()), rows(input.size()), ones(std::vector<float>(1000, 1)), zeros(std::vector<float>(1000, 0));
  group_norm::Params<float> p{x.data(), ones.data(), zeros.data(), nullptr, group.data(), 1, 2, size / 2, 1, kEps, false};
  Array<float> partials(static_cast<std::size_t>(group_norm::partial_floats(p)));
  p.partials = partials.data();
  EXPECT_EQ(group_norm::cuda(p, nullptr), nullptr);
  const layer_norm::Params<float> of_rows{x.data(), ones.data(), zeros.data(), nullptr, nullptr, rows.data(), 1, 34, 1000, kEps, true};
  EXPECT_EQ(layer_norm::cuda(of_rows, nullptr), nullptr);
  EXPECT_TRUE(close(to_doubles(group.values()), normalized(to_doubles(input), size, true), 0, 1e-4));  // half of the last place of 1000 is 3e-5
  EXPECT_TRUE(close(to_doubles(rows.values()), normalized(to_doubles(input), 1000, true), 0, 2e-4));  // a few roundings of the mean
}

TYPED_TEST(NormsTest, GroupNormDoesNotDependOnTheBatch) {
  using T = TypeParam;
  const std::int64_t channels = 2, pixels = 20000;
  const std::vector<T> input = random<T>(3 * channels * pixels, 1);
  const auto run = [&](const std::vector<T>& values, std::int64_t samples) {
    Array<T> x(values), y(values.size());
    Array<float> scale(std::vector<float>{1, 2}), bias(std::vector<float>{3, 4});
    group_norm::Params<T> p{x.data(), scale.data(), bias.data(), nullptr, y.data(), samples, channels, pixels, 1, kEps, true};
    Array<float> partials(static_cast<std::size_t>(group_norm::partial_floats(p)));
    p.partials = partials.data();
    EXPECT_EQ(group_norm::cuda(p, nullptr), nullptr);
    return to_doubles(y.values());
  };
  const Values together = run(input, 3), alone = run({input.end() - channels * pixels, input.end()}, 1);
  EXPECT_TRUE(close(alone, {together.end() - channels * pixels, together.end()}, 0, 0));
}

TYPED_TEST(NormsTest, RowNormsFollowTheirFormulas) {
  using T = TypeParam;
  for (const std::int64_t channels : {1, 3, 8, 64, 65, 130, 448, 1000, 2056, 4104}) {
    for (const auto& [samples, rows] : {std::pair{std::int64_t{1}, std::int64_t{1}}, {3, 5}}) {
      for (const int form : {0, 1, 2}) {  // LayerNorm, LayerNormModulate, RMSNorm
        for (const auto& [offset, in_place] : {std::pair{0, false}, {0, true}, {1, false}}) {
          SCOPED_TRACE(::testing::Message() << samples << ' ' << rows << ' ' << channels << ", form " << form << ", offset " << offset << (in_place ? ", in place" : ""));
          const std::vector<T> input = random<T>(samples * rows * channels, 1), scales = random<T>(samples * channels, 2), shifts = random<T>(samples * channels, 3);
          const std::vector<float> weights = random<float>(channels, 4), biases = random<float>(channels, 5);
          const auto outputs = run_in_all_orders([&]() -> std::vector<Values> {
            Array<T> x(input, offset), y(input.size(), offset), modulation_scale(scales), modulation_shift(shifts);
            Array<float> scale(weights), bias(biases);
            const bool modulated = form == 1;
            layer_norm::Params<T> p{x.data(), modulated ? nullptr : scale.data(), form == 0 ? bias.data() : nullptr, modulated ? modulation_scale.data() : nullptr,
                                    modulated ? modulation_shift.data() : nullptr, in_place ? x.data() : y.data(), samples, rows, channels, kEps, form != 2};
            EXPECT_EQ(layer_norm::cuda(p, nullptr), nullptr);
            return {to_doubles(in_place ? x.values() : y.values())};
          });
          Values expected = normalized(to_doubles(input), channels, form != 2);
          for (std::size_t i = 0; i < expected.size(); ++i) {
            const std::int64_t c = static_cast<std::int64_t>(i) % channels, row = static_cast<std::int64_t>(i) / (rows * channels) * channels + c;
            if (form == 0) expected[i] = expected[i] * weights[c] + biases[c];
            if (form == 1) expected[i] = expected[i] * (1 + to_float(scales[row])) + to_float(shifts[row]);
            if (form == 2) expected[i] *= weights[c];
          }
          EXPECT_TRUE(close(outputs[0], expected, kRounding<T> + 2e-6, 4e-6));
        }
      }
    }
  }
}

}  // namespace
}  // namespace scm::testing
