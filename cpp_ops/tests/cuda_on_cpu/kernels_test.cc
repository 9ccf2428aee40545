// The CUDA kernels of all operators, run by simulator.h and compared with references in double. The sizes are at boundaries of the kernels: of a vector, a
// warp, the number of vectors per lane, a tile.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <ostream>
#include <random>
#include <string>

#include "consistency_step/op.h"
#include "cosine_attention/op.h"
#include "simulator.h"
#include "memory.h"
#include "modulate_silu/op.h"
#include "mp_cat/op.h"
#include "mp_silu/op.h"
#include "mp_sum/op.h"
#include "norm_modulate_silu/op.h"
#include "philox_normal/op.h"
#include "pixel_norm/op.h"
#include "to_image/op.h"
#include "values.h"

namespace scm::testing {
namespace {

constexpr float kEps = 1e-4f;

template <typename T>
struct KernelsTest : ::testing::Test {
  void TearDown() override { simulator::options = {}; }
};

TYPED_TEST_SUITE(KernelsTest, Elements, Names);

// -- Runs ---------------------------------------------------------------------------------------------------------------------

// Memory layout of a run: the offset of each input and output from an aligned address, in elements, and whether the output reuses an input's memory.
struct Layout {
  std::array<int, 4> offsets;
  bool in_place = false;
};

const std::vector<Layout> kLayouts{{{}, false},           {{}, true},            {{1, 1, 1, 1}, true},  {{1, 0, 0, 0}, false},
                                   {{0, 3, 0, 0}, false}, {{0, 0, 5, 0}, false}, {{0, 0, 0, 1}, false}};
const std::vector<Layout> kFewLayouts{{{}, false}, {{}, true}, {{1, 1, 1, 1}, true}};

std::ostream& operator<<(std::ostream& out, const Layout& layout) {
  for (const int offset : layout.offsets) out << offset << ' ';
  return out << (layout.in_place ? "in place" : "apart");
}

Values pixel_norm_of(Values x, std::int64_t channels) {
  for (std::size_t row = 0; row < x.size(); row += static_cast<std::size_t>(channels)) {
    double sum = 0;
    for (std::int64_t c = 0; c < channels; ++c) sum += x[row + c] * x[row + c];
    const double norm = double{kEps} + std::sqrt(sum / static_cast<double>(channels));
    for (std::int64_t c = 0; c < channels; ++c) x[row + c] /= norm;
  }
  return x;
}

const std::vector<std::int64_t> kCounts{1, 3, 7, 8, 511, 512, 1000, 4096, 4097};
const std::vector<std::int64_t> kChannels{1, 2, 3, 7, 8, 24, 64, 65, 128, 130, 192, 448, 520, 1000, 1792, 2000, 2056, 4104};

// -- Element by element ----------------------------------------------------------------------------------------------------------

TYPED_TEST(KernelsTest, MPSiLUFollowsItsFormula) {
  using T = TypeParam;
  for (const std::int64_t count : kCounts) {
    for (const Layout& layout : kLayouts) {
      SCOPED_TRACE(::testing::Message() << count << " elements, offsets " << layout);
      std::vector<T> input = random<T>(count, 1, 4);
      input[0] = from_doubles<T>({-100})[0];
      if (count > 2) std::copy_n(from_doubles<T>({-kInfinity, kInfinity}).begin(), 2, input.end() - 2);
      const auto outputs = run_in_all_orders([&]() -> std::vector<Values> {
        Array<T> x(input, layout.offsets[0]), y(input.size(), layout.offsets[1]);
        EXPECT_EQ(mp_silu::cuda<T>({x.data(), layout.in_place ? x.data() : y.data(), count}, nullptr), nullptr);
        return {to_doubles(layout.in_place ? x.values() : y.values())};
      });
      EXPECT_TRUE(close<T>(outputs[0], mp_silu_of(to_doubles(input))));
    }
  }
}

TYPED_TEST(KernelsTest, MPSumFollowsItsFormula) {
  using T = TypeParam;
  for (const std::int64_t count : kCounts) {
    for (const Layout& layout : kLayouts) {
      for (const bool activate : {false, true}) {
        SCOPED_TRACE(::testing::Message() << count << " elements, offsets " << layout << ", activated " << activate);
        std::vector<T> left = random<T>(count, 1), right = random<T>(count, 2);
        left[0] = from_doubles<T>({kNan})[0];
        const auto outputs = run_in_all_orders([&]() -> std::vector<Values> {
          Array<T> a(left, layout.offsets[0]), b(right, layout.offsets[1]), y(left.size(), layout.offsets[2]), activated(left.size(), layout.offsets[3]);
          T* out = layout.in_place ? (activate ? a.data() : b.data()) : y.data();
          EXPECT_EQ(mp_sum::cuda<T>({a.data(), b.data(), out, activate ? activated.data() : nullptr, count, 0.6f, 0.8f, 1.5f}, nullptr), nullptr);
          return {to_doubles(layout.in_place ? (activate ? a.values() : b.values()) : y.values()), activate ? to_doubles(activated.values()) : Values{}};
        });
        Values expected = to_doubles(left);
        for (std::size_t i = 0; i < expected.size(); ++i) {
          expected[i] = expected[i] * 0.6f + to_float(right[i]) * 0.8f;
          if (!std::isnan(expected[i])) expected[i] = std::clamp(expected[i], -1.5, 1.5);
        }
        EXPECT_TRUE(close<T>(outputs[0], expected));
        EXPECT_TRUE(close<T>(outputs[1], activate ? mp_silu_of(outputs[0]) : Values{}));
      }
    }
  }
}

TYPED_TEST(KernelsTest, MPCatFollowsItsFormula) {
  using T = TypeParam;
  using Channels = std::pair<std::int64_t, std::int64_t>;
  for (const auto& [channels_a, channels_b] :
       {Channels{1, 1}, Channels{3, 5}, Channels{8, 8}, Channels{0, 8}, Channels{8, 0}, Channels{64, 65}, Channels{4, 12}, Channels{448, 256}}) {
    for (const std::int64_t rows : {1, 5, 12}) {
      for (const Layout& layout : kLayouts) {
        if (layout.in_place) continue;
        SCOPED_TRACE(::testing::Message() << rows << " rows of " << channels_a << " and " << channels_b << " channels, offsets " << layout);
        const std::vector<T> left = random<T>(rows * channels_a, 1), right = random<T>(rows * channels_b, 2);
        const bool activate = rows > 1;
        const auto outputs = run_in_all_orders([&]() -> std::vector<Values> {
          Array<T> a(left, layout.offsets[0]), b(right, layout.offsets[1]);
          Array<T> y(left.size() + right.size(), layout.offsets[2]), activated(left.size() + right.size(), layout.offsets[3]);
          EXPECT_EQ(mp_cat::cuda<T>({a.data(), b.data(), y.data(), activate ? activated.data() : nullptr, rows, channels_a, channels_b, 0.7f, 1.3f}, nullptr),
                    nullptr);
          return {to_doubles(y.values()), activate ? to_doubles(activated.values()) : Values{}};
        });
        Values expected;
        for (std::int64_t row = 0; row < rows; ++row) {
          for (std::int64_t c = 0; c < channels_a; ++c) expected.push_back(double{to_float(left[row * channels_a + c])} * 0.7f);
          for (std::int64_t c = 0; c < channels_b; ++c) expected.push_back(double{to_float(right[row * channels_b + c])} * 1.3f);
        }
        EXPECT_TRUE(close<T>(outputs[0], expected));
        EXPECT_TRUE(close<T>(outputs[1], activate ? mp_silu_of(outputs[0]) : Values{}));
      }
    }
  }
}

TYPED_TEST(KernelsTest, ModulateSiLUFollowsItsFormula) {
  using T = TypeParam;
  for (const std::int64_t channels : {1, 3, 7, 8, 64, 65, 448}) {
    for (const auto& [samples, pixels] : {std::pair<std::int64_t, std::int64_t>{1, 1}, {3, 1}, {1, 5}, {3, 12}, {5, 2}}) {
      for (const Layout& layout : kLayouts) {
        SCOPED_TRACE(::testing::Message() << samples << " x " << pixels << " x " << channels << ", offsets " << layout);
        const std::vector<T> input = random<T>(samples * pixels * channels, 1), scales = random<T>(samples * channels, 2);
        const auto outputs = run_in_all_orders([&]() -> std::vector<Values> {
          Array<T> y(input, layout.offsets[0]), scale(scales, layout.offsets[1]), z(input.size(), layout.offsets[2]);
          EXPECT_EQ(modulate_silu::cuda<T>({y.data(), scale.data(), layout.in_place ? y.data() : z.data(), samples, pixels, channels}, nullptr), nullptr);
          return {to_doubles(layout.in_place ? y.values() : z.values())};
        });
        Values expected = to_doubles(input);
        for (std::size_t i = 0; i < expected.size(); ++i) {
          expected[i] = mp_silu_of(expected[i] * to_float(scales[i / (pixels * channels) * channels + i % channels]));
        }
        EXPECT_TRUE(close<T>(outputs[0], expected));
      }
    }
  }
}

TYPED_TEST(KernelsTest, ConsistencyStepFollowsItsFormula) {
  using T = TypeParam;
  for (const std::int64_t size : {1, 3, 4, 511, 1027, 2048}) {
    for (const std::int64_t samples : {1, 3, 5}) {
      for (const Layout& layout : kLayouts) {
        SCOPED_TRACE(::testing::Message() << samples << " x " << size << ", offsets " << layout);
        const std::vector<float> states = random<float>(samples * size, 1), noises = random<float>(samples * size, 3);
        const std::vector<T> predictions = random<T>(samples * size, 2);
        const std::vector<float> times{1.57079f, 0.3f, 0, 1, 0.7f}, next{0, 0.2f, 0.1f, 1.2f, 0.01f};
        const bool over_noise = samples == 3;
        const auto outputs = run_in_all_orders([&]() -> std::vector<Values> {
          Array<float> x(states, layout.offsets[0]), noise(noises, layout.offsets[1]), x_next(states.size(), layout.offsets[2]), t(times), t_next(next);
          Array<T> F(predictions, layout.offsets[3]);
          Array<float>& out = layout.in_place ? (over_noise ? noise : x) : x_next;
          EXPECT_EQ(consistency_step::cuda<T>({x.data(), F.data(), noise.data(), t.data(), t_next.data(), out.data(), samples, size, 0.5f}, nullptr), nullptr);
          return {to_doubles(out.values())};
        });
        Values expected;
        for (std::int64_t i = 0; i < samples * size; ++i) {
          const double t = times[i / size], t_next = next[i / size];
          const double denoised = std::cos(t) * states[i] - std::sin(t) * 0.5 * to_float(predictions[i]);
          expected.push_back(std::cos(t_next) * denoised + std::sin(t_next) * 0.5 * noises[i]);
        }
        EXPECT_TRUE(close<float>(outputs[0], expected));
      }
    }
  }
}

TYPED_TEST(KernelsTest, ToImageFollowsItsFormula) {
  using T = TypeParam;
  for (const std::int64_t channels : {1, 2, 3, 4, 5}) {
    for (const std::int64_t pixels : {1, 4, 7, 784, 2052}) {
      for (const Layout& layout : kLayouts) {
        if (layout.in_place) continue;
        SCOPED_TRACE(::testing::Message() << channels << " channels, " << pixels << " pixels, offsets " << layout);
        const std::int64_t samples = 3;
        std::vector<T> input = random<T>(samples * channels * pixels, 1);
        input[0] = from_doubles<T>({kNan})[0];
        input.back() = from_doubles<T>({-kInfinity})[0];
        const auto outputs = run_in_all_orders([&]() -> std::vector<Values> {
          Array<T> x(input, layout.offsets[0]);
          Array<std::uint8_t> image(input.size(), layout.offsets[1]);
          EXPECT_EQ(to_image::cuda<T>({x.data(), image.data(), samples, channels, pixels, 127.5f, 128}, nullptr), nullptr);
          return {to_doubles(image.values())};
        });
        Values expected;
        for (std::int64_t i = 0; i < samples * pixels * channels; ++i) {
          const std::int64_t c = i % channels, pixel = i / channels % pixels, sample = i / channels / pixels;
          const float x = to_float(input[(sample * channels + c) * pixels + pixel]);
          expected.push_back(std::isnan(x) ? 0.0 : std::nearbyint(std::clamp(x * 127.5f + 128, 0.0f, 255.0f)));
        }
        EXPECT_TRUE(close(outputs[0], expected, 0, 0));
      }
    }
  }
}

// Philox4x32-10 and the Box-Muller transform, implemented from docs/custom-ops.md.
double philox_normal_of(std::uint64_t seed, std::uint64_t draw, std::uint64_t element) {
  std::uint64_t counter[4] = {draw, 0, element & 0xffffffff, element >> 32}, key[2] = {seed & 0xffffffff, seed >> 32};
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t a = 0xD2511F53 * counter[0], b = 0xCD9E8D57 * counter[2];
    const std::uint64_t next[4] = {(b >> 32) ^ counter[1] ^ key[0], b & 0xffffffff, (a >> 32) ^ counter[3] ^ key[1], a & 0xffffffff};
    std::copy(next, next + 4, counter);
    key[0] = (key[0] + 0x9E3779B9) & 0xffffffff;
    key[1] = (key[1] + 0xBB67AE85) & 0xffffffff;
  }
  const double pi = 3.14159265358979323846;
  const double u = static_cast<double>(counter[0]) * 0x1p-32 + 0x1p-33, v = (static_cast<double>(counter[1]) * 0x1p-32 + 0x1p-33) * 2 * pi;
  return std::sqrt(-2 * std::log(u)) * std::sin(v);
}

TEST(PhiloxNormalTest, FollowsItsFormula) {
  for (const std::int64_t size : {1, 3, 256, 1027}) {
    for (const std::int64_t samples : {1, 3}) {
      const std::vector<std::int64_t> keys{-1, 0, 0x123456789abcdef};
      const auto outputs = run_in_all_orders([&]() -> std::vector<Values> {
        Array<std::int64_t> seeds(std::vector<std::int64_t>(keys.begin(), keys.begin() + samples)), draw(std::vector<std::int64_t>{0xffffffff});
        Array<float> scale(std::vector<float>{2.5f}), noise(static_cast<std::size_t>(samples * size), 1);
        EXPECT_EQ(philox_normal::cuda<float>({seeds.data(), draw.data(), scale.data(), noise.data(), samples, size}, nullptr), nullptr);
        return {to_doubles(noise.values())};
      });
      Values expected;
      for (std::int64_t i = 0; i < samples * size; ++i) {
        expected.push_back(2.5 * philox_normal_of(static_cast<std::uint64_t>(keys[i / size]), 0xffffffff, static_cast<std::uint64_t>(i % size)));
      }
      EXPECT_TRUE(close(outputs[0], expected, 1e-5, 1e-5));  // u and v are floats
    }
  }
}

// -- Row by row --------------------------------------------------------------------------------------------------------------------

TYPED_TEST(KernelsTest, PixelNormFollowsItsFormula) {
  using T = TypeParam;
  for (const std::int64_t channels : kChannels) {
    for (const std::int64_t rows : {1, 3, 37}) {
      if (channels > 1000 && rows > 3) continue;
      for (const Layout& layout : channels > 65 ? kFewLayouts : kLayouts) {
        SCOPED_TRACE(::testing::Message() << rows << " x " << channels << ", offsets " << layout);
        const std::vector<T> input = random<T>(rows * channels, 1);
        const bool activate = rows > 1;
        const auto outputs = run_in_all_orders([&]() -> std::vector<Values> {
          Array<T> x(input, layout.offsets[0]), y(input.size(), layout.offsets[1]), activated(input.size(), layout.offsets[2]);
          T* out = layout.in_place ? x.data() : y.data();
          EXPECT_EQ(pixel_norm::cuda<T>({x.data(), out, activate ? activated.data() : nullptr, rows, channels, kEps}, nullptr), nullptr);
          return {to_doubles(layout.in_place ? x.values() : y.values()), activate ? to_doubles(activated.values()) : Values{}};
        });
        EXPECT_TRUE(close<T>(outputs[0], pixel_norm_of(to_doubles(input), channels)));
        EXPECT_TRUE(close<T>(outputs[1], activate ? mp_silu_of(outputs[0]) : Values{}));
      }
    }
  }
}

TYPED_TEST(KernelsTest, NormsOfZerosAreZerosAndNaNStaysInItsRow) {
  using T = TypeParam;
  for (const std::int64_t channels : {3, 64}) {
    Values values(static_cast<std::size_t>(3 * channels), 0);
    values[static_cast<std::size_t>(channels)] = kNan;
    Array<T> x(from_doubles<T>(values)), y(values.size());
    EXPECT_EQ(pixel_norm::cuda<T>({x.data(), y.data(), nullptr, 3, channels, kEps}, nullptr), nullptr);
    EXPECT_TRUE(close<T>(to_doubles(y.values()), pixel_norm_of(values, channels)));
  }
}

// The modulation of a layer may be columns of a wider matrix, which may start anywhere.
TYPED_TEST(KernelsTest, NormModulateSiLUReadsColumnsOfAWiderModulation) {
  using T = TypeParam;
  const std::int64_t samples = 3, pixels = 5;
  for (const std::int64_t channels : {8, 64, 65, 1600}) {
    for (const auto& [begin, columns] : {std::pair<std::int64_t, std::int64_t>{8, 2 * channels + 24}, {3, 2 * channels + 5}}) {
      SCOPED_TRACE(::testing::Message() << channels << " channels, columns from " << begin << " of " << columns);
      const std::vector<T> wider = random<T>(samples * columns, 2, 3);
      std::vector<T> narrow;
      for (std::int64_t sample = 0; sample < samples; ++sample) {
        const auto from = wider.begin() + sample * columns + begin;
        narrow.insert(narrow.end(), from, from + 2 * channels);
      }
      Array<T> y(random<T>(samples * pixels * channels, 1)), wide_modulation(wider), modulation(narrow), z(y.values().size()), expected(y.values().size());
      EXPECT_EQ(norm_modulate_silu::cuda<T>({y.data(), wide_modulation.data() + begin, z.data(), samples, pixels, channels, columns, kEps}, nullptr), nullptr);
      EXPECT_EQ(norm_modulate_silu::cuda<T>({y.data(), modulation.data(), expected.data(), samples, pixels, channels, 2 * channels, kEps}, nullptr), nullptr);
      // Loads of another width add the squares in another order, so either result may be rounded the other way.
      EXPECT_TRUE(close(to_doubles(z.values()), to_doubles(expected.values()), 2 * kRounding<T> + 2e-6, 1e-6));
    }
  }
}

TYPED_TEST(KernelsTest, NormModulateSiLUFollowsItsFormula) {
  using T = TypeParam;
  for (const std::int64_t channels : kChannels) {
    for (const auto& [samples, pixels] : {std::pair<std::int64_t, std::int64_t>{1, 1}, {3, 5}, {1, 70}}) {
      if (channels > 65 && pixels > 5) continue;
      for (const Layout& layout : channels > 65 ? kFewLayouts : kLayouts) {
        SCOPED_TRACE(::testing::Message() << samples << " x " << pixels << " x " << channels << ", offsets " << layout);
        const std::vector<T> input = random<T>(samples * pixels * channels, 1), modulations = random<T>(samples * 2 * channels, 2, 3);
        const auto outputs = run_in_all_orders([&]() -> std::vector<Values> {
          Array<T> y(input, layout.offsets[0]), modulation(modulations, layout.offsets[1]), z(input.size(), layout.offsets[2]);
          T* out = layout.in_place ? y.data() : z.data();
          EXPECT_EQ(norm_modulate_silu::cuda<T>({y.data(), modulation.data(), out, samples, pixels, channels, 2 * channels, kEps}, nullptr), nullptr);
          return {to_doubles(layout.in_place ? y.values() : z.values())};
        });
        Values expected = pixel_norm_of(to_doubles(input), channels);
        const Values normed = pixel_norm_of(to_doubles(modulations), channels);
        for (std::size_t i = 0; i < expected.size(); ++i) {
          const std::size_t scale = i / (pixels * channels) * 2 * channels + i % channels;
          expected[i] = mp_silu_of(expected[i] * normed[scale] + normed[scale + channels]);
        }
        EXPECT_TRUE(close<T>(outputs[0], expected));
      }
    }
  }
}

// -- Attention ---------------------------------------------------------------------------------------------------------------------

struct Shape {
  std::int64_t samples, length, heads, head_size;
};

Values attention_of(const Values& qkv, const Shape& shape) {
  const auto [samples, length, heads, size] = shape;
  const Values normed = pixel_norm_of(qkv, size);
  Values y(static_cast<std::size_t>(samples * length * heads * size));
  const auto at = [&](std::int64_t sample, std::int64_t position, int part, std::int64_t head) {
    return normed.data() + (((sample * length + position) * 3 + part) * heads + head) * size;
  };
  for (std::int64_t unit = 0; unit < samples * heads * length; ++unit) {
    const std::int64_t sample = unit / (heads * length), head = unit / length % heads, query = unit % length;
    const double* q = at(sample, query, 0, head);
    Values weights(static_cast<std::size_t>(length));
    double sum = 0;
    for (std::int64_t key = 0; key < length; ++key) {
      const double* k = at(sample, key, 1, head);
      double score = 0;
      for (std::int64_t c = 0; c < size; ++c) score += q[c] * k[c];
      sum += weights[key] = std::exp((score - static_cast<double>(size)) / std::sqrt(static_cast<double>(size)));
    }
    double* out = y.data() + ((sample * length + query) * heads + head) * size;
    for (std::int64_t key = 0; key < length; ++key) {
      const double* v = at(sample, key, 2, head);
      for (std::int64_t c = 0; c < size; ++c) out[c] += weights[key] / sum * v[c];
    }
  }
  return y;
}

// Every third query equals its key, so that the softmax has large weights.
template <typename T>
std::vector<T> random_qkv(const Shape& shape, double scale = 1) {
  std::vector<T> qkv = random<T>(shape.samples * shape.length * 3 * shape.heads * shape.head_size, 1, scale);
  const std::int64_t vector = shape.heads * shape.head_size;
  for (std::int64_t row = 0; row < shape.samples * shape.length; row += 3) {
    std::copy_n(qkv.begin() + row * 3 * vector, vector, qkv.begin() + (row * 3 + 1) * vector);
  }
  return qkv;
}

template <typename T>
Values run_attention(const std::vector<T>& qkv, const Shape& shape, int offset = 0, int offset_y = 0, float eps = kEps) {
  Array<T> input(qkv, offset), y(qkv.size() / 3, offset_y);
  EXPECT_EQ(cosine_attention::cuda<T>({input.data(), y.data(), shape.samples, shape.length, shape.heads, shape.head_size, eps, nullptr}, nullptr), nullptr);
  return to_doubles(y.values());
}

// Weights are rounded to T before they are multiplied with the values, which are of size 1: the tolerance is absolute too.
template <typename T>
::testing::AssertionResult attention_close(const Values& actual, const Values& expected) {
  return sizeof(T) == sizeof(float) ? close(actual, expected, 1e-5, 3e-6) : close(actual, expected, 2 * kRounding<T>, 2 * kRounding<T>);
}

TYPED_TEST(KernelsTest, AttentionOfHeadsOf64FollowsItsFormula) {
  using T = TypeParam;
  for (const Shape& shape : {Shape{1, 1, 1, 64}, Shape{3, 5, 1, 64}, Shape{1, 8, 2, 64}, Shape{1, 17, 1, 64}, Shape{3, 64, 2, 64}, Shape{1, 65, 3, 64},
                             Shape{1, 77, 1, 64}, Shape{1, 111, 1, 64}}) {
    SCOPED_TRACE(::testing::Message() << shape.samples << " x " << shape.length << ", " << shape.heads << " heads");
    const std::vector<T> qkv = random_qkv<T>(shape);
    const auto outputs = run_in_all_orders([&] { return std::vector<Values>{run_attention(qkv, shape)}; });
    EXPECT_TRUE(attention_close<T>(outputs[0], attention_of(to_doubles(qkv), shape)));
  }
  const Shape large{1, 256, 1, 64};
  const std::vector<T> qkv = random_qkv<T>(large);
  EXPECT_TRUE(attention_close<T>(run_attention(qkv, large), attention_of(to_doubles(qkv), large)));
}

TYPED_TEST(KernelsTest, AttentionOfAnyHeadSizeFollowsItsFormula) {
  using T = TypeParam;
  for (const Shape& shape : {Shape{1, 1, 1, 1}, Shape{3, 5, 2, 3}, Shape{1, 64, 1, 16}, Shape{1, 77, 2, 32}, Shape{1, 33, 3, 80}, Shape{1, 40, 1, 128},
                             Shape{1, 5, 1, 300}}) {
    SCOPED_TRACE(::testing::Message() << shape.samples << " x " << shape.length << ", " << shape.heads << " heads of " << shape.head_size);
    const std::vector<T> qkv = random_qkv<T>(shape);
    const auto outputs = run_in_all_orders([&] { return std::vector<Values>{run_attention(qkv, shape)}; });
    EXPECT_TRUE(attention_close<T>(outputs[0], attention_of(to_doubles(qkv), shape)));
  }
}

TYPED_TEST(KernelsTest, AttentionAcceptsPointersThatAreNotAligned) {
  const Shape shape{1, 70, 1, 64};
  const std::vector<TypeParam> qkv = random_qkv<TypeParam>(shape);
  EXPECT_TRUE(attention_close<TypeParam>(run_attention(qkv, shape, 1, 0), attention_of(to_doubles(qkv), shape)));
  EXPECT_TRUE(attention_close<TypeParam>(run_attention(qkv, shape, 0, 1), attention_of(to_doubles(qkv), shape)));
}

// Rows past the last key are zeros, whose norm plus eps is then 0.
TYPED_TEST(KernelsTest, AttentionAcceptsAnEpsOfZero) {
  for (const std::int64_t size : {64, 16}) {
    const Shape shape{1, 21, 1, size};
    const std::vector<TypeParam> qkv = random_qkv<TypeParam>(shape);
    EXPECT_TRUE(close(run_attention(qkv, shape, 0, 0, 0.0f), run_attention(qkv, shape), 0.02, 0.02));
  }
}

// Large batches use the kernel with two query tiles per warp, which must give the same bits as the one with one tile.
TYPED_TEST(KernelsTest, AttentionIsTheSameToTheBitInALargeBatch) {
  using T = TypeParam;
  for (const std::int64_t length : {100, 128, 200}) {
    const Shape one{1, length, 1, 64}, many{256, length, 1, 64};
    const std::vector<T> qkv = random_qkv<T>(one);
    const Values alone = run_attention(qkv, one);
    std::vector<T> batch(qkv.size() * 256);
    std::copy(qkv.begin(), qkv.end(), batch.begin());
    const std::int64_t queries = sizeof(T) == 4 ? 64 : 128;  // per block
    simulator::options.only_blocks = static_cast<unsigned>((length + queries - 1) / queries);  // the first sample
    Values first = run_attention(batch, many);
    simulator::options = {};
    first.resize(alone.size());
    EXPECT_TRUE(close(first, alone, 0, 0));
    EXPECT_TRUE(attention_close<T>(first, attention_of(to_doubles(qkv), one)));
  }
}

TYPED_TEST(KernelsTest, AttentionAcceptsAnyScaleAndExtremeScores) {
  using T = TypeParam;
  for (const std::int64_t size : {64, 80}) {
    const Shape shape{1, 33, 1, size};
    for (const double scale : {1e-3, 1.0, 100.0}) {
      const std::vector<T> qkv = random_qkv<T>(shape, scale);
      EXPECT_TRUE(attention_close<T>(run_attention(qkv, shape), attention_of(to_doubles(qkv), shape))) << "scale " << scale << ", head size " << size;
    }
    // Every query equals a key or its opposite: scores of sqrt(size) and -sqrt(size).
    std::vector<T> same = random<T>(33 * 3 * size, 1);
    for (std::int64_t vector = 0; vector < 33 * 3; ++vector) {
      for (std::int64_t c = 0; c < size; ++c) {
        const double sign = (vector % 3 == 0 && vector % 2 == 0) || (vector % 3 == 1 && vector % 5 == 0) ? -1 : 1;
        if (vector % 3 != 2) same[vector * size + c] = from_doubles<T>({sign * (c % 3 + 1)})[0];
      }
    }
    EXPECT_TRUE(attention_close<T>(run_attention(same, shape), attention_of(to_doubles(same), shape))) << "head size " << size;
  }
}

TYPED_TEST(KernelsTest, AttentionKeepsNaNWhereItBelongs) {
  using T = TypeParam;
  for (const std::int64_t size : {64, 16}) {
    const Shape shape{1, 20, 2, size};
    std::vector<T> qkv = random_qkv<T>(shape);
    qkv[static_cast<std::size_t>(4 * 3 * 2 * size)] = from_doubles<T>({kNan})[0];  // query 4 of head 0
    EXPECT_TRUE(attention_close<T>(run_attention(qkv, shape), attention_of(to_doubles(qkv), shape)));
    qkv[static_cast<std::size_t>((7 * 3 + 1) * 2 * size + size)] = from_doubles<T>({kNan})[0];  // key 7 of head 1
    EXPECT_TRUE(attention_close<T>(run_attention(qkv, shape), attention_of(to_doubles(qkv), shape)));
  }
}

// -- Launches ----------------------------------------------------------------------------------------------------------------------

TYPED_TEST(KernelsTest, AFailedLaunchIsReportedAndItsErrorCleared) {
  using T = TypeParam;
  Array<T> x(std::size_t{8});
  simulator::options.refuse_launches = true;
  EXPECT_STREQ(mp_silu::cuda<T>({x.data(), x.data(), 8}, nullptr), "unspecified launch failure");
  simulator::options.refuse_launches = false;
  EXPECT_EQ(mp_silu::cuda<T>({x.data(), x.data(), 8}, nullptr), nullptr);
}

}  // namespace
}  // namespace scm::testing
