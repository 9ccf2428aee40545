// The CUDA kernels of the operators of transformer blocks, as in kernels_test.cc.
#include <cmath>

#include "depthwise_glu/op.h"
#include "geglu/op.h"
#include "memory.h"
#include "relu_linear_attention/op.h"
#include "values.h"

namespace scm::testing {
namespace {

template <typename T>
struct TransformerKernelsTest : ::testing::Test {
  void TearDown() override { simulator::options = {}; }
};

TYPED_TEST_SUITE(TransformerKernelsTest, Elements, Names);

double silu_of(double x) { return x / (1 + std::exp(-x)); }

double gelu_of(double x) { return x * std::erfc(-x / std::sqrt(2.0)) / 2; }

TYPED_TEST(TransformerKernelsTest, GEGLUFollowsItsFormula) {
  using T = TypeParam;
  for (const std::int64_t channels : {1, 3, 8, 24, 65, 256}) {
    for (const std::int64_t rows : {1, 5, 70}) {
      for (const int offset : {0, 1}) {
        SCOPED_TRACE(::testing::Message() << rows << " x " << channels << ", offset " << offset);
        std::vector<T> input = random<T>(rows * 2 * channels, 1, 2);
        input[0] = from_doubles<T>({kNan})[0];
        input.back() = from_doubles<T>({-kInfinity})[0];
        const std::vector<T> bias = random<T>(2 * channels, 2);
        const auto outputs = run_in_all_orders([&]() -> std::vector<Values> {
          Array<T> x(input, offset), b(bias), y(input.size() / 2, offset);
          EXPECT_EQ(geglu::cuda<T>({x.data(), b.data(), y.data(), rows, channels}, nullptr), nullptr);
          return {to_doubles(y.values())};
        });
        Values expected;
        for (std::int64_t i = 0; i < rows * channels; ++i) {
          const std::int64_t c = i % channels, at = i / channels * 2 * channels + c;
          const double gate = double{to_float(input[at + channels])} + to_float(bias[channels + c]);
          expected.push_back((double{to_float(input[at])} + to_float(bias[c])) * gelu_of(gate));
        }
        EXPECT_TRUE(close<T>(outputs[0], expected));
      }
    }
  }
}

TYPED_TEST(TransformerKernelsTest, DepthwiseGLUFollowsItsFormula) {
  using T = TypeParam;
  struct Map {
    std::int64_t samples, channels, height, width;
  };
  for (const Map& map : {Map{1, 1, 1, 1}, Map{2, 3, 2, 5}, Map{1, 2, 32, 32}, Map{1, 2, 33, 31}, Map{1, 1, 8, 70}, Map{3, 5, 8, 8}}) {
    const auto [samples, channels, height, width] = map;
    SCOPED_TRACE(::testing::Message() << samples << " x " << channels << " x " << height << " x " << width);
    std::vector<T> input = random<T>(samples * 2 * channels * height * width, 1);
    input[0] = from_doubles<T>({kInfinity})[0];
    const std::vector<T> filters = random<T>(2 * channels * 9, 2, 0.3), bias = random<T>(2 * channels, 3);
    const auto outputs = run_in_all_orders([&, samples = samples, channels = channels, height = height, width = width]() -> std::vector<Values> {
      Array<T> x(input), w(filters), b(bias), y(input.size() / 2);
      EXPECT_EQ(depthwise_glu::cuda<T>({x.data(), w.data(), b.data(), y.data(), samples, channels, height, width}, nullptr), nullptr);
      return {to_doubles(y.values())};
    });
    const auto convolved = [&, channels = channels, height = height, width = width](std::int64_t sample, std::int64_t channel, std::int64_t row, std::int64_t column) {
      double sum = to_float(bias[channel]);
      for (std::int64_t i = 0; i < 9; ++i) {
        const std::int64_t y = row + i / 3 - 1, x = column + i % 3 - 1;
        if (y < 0 || y >= height || x < 0 || x >= width) continue;
        sum += to_float(filters[channel * 9 + i]) * silu_of(to_float(input[((sample * 2 * channels + channel) * height + y) * width + x]));
      }
      return sum;
    };
    Values expected;
    for (std::int64_t i = 0; i < samples * channels * height * width; ++i) {
      const std::int64_t sample = i / (channels * height * width), channel = i / (height * width) % channels, row = i / width % height, column = i % width;
      expected.push_back(convolved(sample, channel, row, column) * silu_of(convolved(sample, channels + channel, row, column)));
    }
    EXPECT_TRUE(close(outputs[0], expected, kRounding<T> + 1e-5, 2e-6));
  }
}

TYPED_TEST(TransformerKernelsTest, ReLULinearAttentionFollowsItsFormula) {
  using T = TypeParam;
  struct Sizes {
    std::int64_t samples, length, heads, size;
  };
  for (const Sizes& sizes : {Sizes{1, 1, 1, 1}, Sizes{2, 5, 3, 3}, Sizes{1, 130, 2, 32}, Sizes{1, 64, 1, 33}, Sizes{1, 70, 1, 64}, Sizes{2, 33, 1, 100}, Sizes{1, 9, 1, 256}}) {
    const auto [samples, length, heads, size] = sizes;
    SCOPED_TRACE(::testing::Message() << samples << " x " << length << ", " << heads << " heads of " << size);
    const std::int64_t count = samples * length * heads * size;
    std::vector<T> queries = random<T>(count, 1), keys = random<T>(count, 2);
    const std::vector<T> values = random<T>(count, 3);
    for (std::int64_t c = 0; c < size; ++c) queries[static_cast<std::size_t>(c)] = from_doubles<T>({-1})[0];  // the denominator is eps
    if (samples > 1) keys.back() = from_doubles<T>({kNan})[0];
    const auto outputs = run_in_all_orders([&, samples = samples, length = length, heads = heads, size = size]() -> std::vector<Values> {
      Array<T> q(queries, 1), k(keys), v(values, 3), y(values.size());
      EXPECT_EQ(relu_linear_attention::cuda<T>({q.data(), k.data(), v.data(), y.data(), samples, length, heads, size, 1e-15f, nullptr}, nullptr), nullptr);
      return {to_doubles(y.values())};
    });
    const auto relu = [](T x) { return to_float(x) < 0 ? 0.0 : double{to_float(x)}; };
    Values expected(static_cast<std::size_t>(count));
    for (std::int64_t unit = 0; unit < samples * length * heads; ++unit) {
      const std::int64_t sample = unit / (length * heads), head = unit % heads, token = heads * size, first = sample * length * token + head * size;
      double sum = 1e-15f;
      Values y(static_cast<std::size_t>(size));
      for (std::int64_t l = 0; l < length; ++l) {
        double weight = 0;
        for (std::int64_t c = 0; c < size; ++c) weight += relu(queries[unit * size + c]) * relu(keys[first + l * token + c]);
        sum += weight;
        for (std::int64_t c = 0; c < size; ++c) y[c] += weight * to_float(values[first + l * token + c]);
      }
      for (std::int64_t c = 0; c < size; ++c) expected[unit * size + c] = y[c] / sum;
    }
    EXPECT_TRUE(close(outputs[0], expected, kRounding<T> + 2e-5, 1e-5));
  }
}

}  // namespace
}  // namespace scm::testing
