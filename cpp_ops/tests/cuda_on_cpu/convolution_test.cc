// The CUDA convolution, run by simulator.h: every tile, split and epilogue, compared with sums in double, with the composition that it replaces, and with each
// other to the bit.
#include <gtest/gtest.h>

#include <array>
#include <string>
#include <vector>

#include "convolution_inputs.h"
#include "memory.h"

namespace scm::testing {
namespace {

using convolution::Epilogue;
using convolution::Params;
using convolution::Shape;
using convolution::Sizes;
using convolution::Tile;

constexpr std::array kEpilogues{Epilogue::none, Epilogue::modulate_silu, Epilogue::mp_sum};

std::vector<Shape> all_shapes() {
  std::vector<Shape> shapes;
  for (int i = 0; i < convolution::kShapes; ++i) shapes.push_back(static_cast<Shape>(i));
  return shapes;
}

// Offsets from an aligned address, in elements.
struct Layout {
  int x = 0, y = 0, other = 0;
  bool in_place = false;  // y is skip
};

template <typename T>
Values run(const Inputs<T>& in, const Tile& tile, Epilogue epilogue, const Layout& layout = {}) {
  const Sizes& s = in.sizes;
  Array<T> x(in.x, layout.x), weight(in.weight), packed(static_cast<std::size_t>(convolution::packed_size(s)));
  Array<T> y(in.skip.size(), layout.y), skip(in.skip, layout.other), scales(in.scales, layout.other);
  Array<float> partials(static_cast<std::size_t>(convolution::partials_bytes(s, tile) / 4));
  Array<std::uint32_t> counters(std::vector<std::uint32_t>(convolution::kCounters, 0));
  const simulator::Options options = simulator::options;
  simulator::options = {};
  const unsigned long launches = simulator::launches;
  EXPECT_EQ(convolution::pack<T>(weight.data(), s, packed.data(), nullptr), nullptr);
  simulator::launches = launches;
  simulator::options = options;
  Params<T> p = {};
  p.x = x.data();
  p.weight = packed.data();
  p.y = layout.in_place ? skip.data() : y.data();
  p.sizes = s;
  p.epilogue = epilogue;
  if (epilogue == Epilogue::modulate_silu) p.scales = scales.data();
  if (epilogue == Epilogue::mp_sum) p.skip = skip.data();
  p.scales_stride = in.scales_stride;
  p.weight_skip = kWeightSkip;
  p.weight_sum = kWeightSum;
  p.clip = kClip;
  if (tile.split > 1) {
    p.partials = partials.data();
    p.counters = counters.data();
  }
  EXPECT_EQ(convolution::cuda<T>(p, tile, nullptr), nullptr);
  EXPECT_EQ(counters.values(), std::vector<std::uint32_t>(convolution::kCounters, 0));
  return to_doubles(layout.in_place ? skip.values() : y.values());
}

template <typename T>
::testing::AssertionResult follows(const Inputs<T>& in, Epilogue epilogue, const Values& sums, const Values& actual) {
  const auto exact = close(actual, epilogue_of(in, epilogue, sums), kRounding<T>, 3e-5);
  if (!exact) return exact;
  // The operators that it replaces round the sum first.
  const Values composed = epilogue_of(in, epilogue, to_doubles(from_doubles<T>(sums)));
  return close(actual, composed, 4 * kRounding<T>, 4 * kRounding<T>);
}

template <typename T>
struct ConvolutionTest : ::testing::Test {
  unsigned long conflicts = simulator::bank_conflicts;

  void TearDown() override {
    simulator::options = {};
    EXPECT_EQ(simulator::bank_conflicts, conflicts);
  }
};

TYPED_TEST_SUITE(ConvolutionTest, HalfElements, Names);

TYPED_TEST(ConvolutionTest, EveryTileSplitAndEpilogueFollowsTheFormulaAndTilesAgreeToTheBit) {
  using T = TypeParam;
  for (const Sizes& sizes : {Sizes{2, 9, 8, 40, 72, 9}, Sizes{1, 262, 1, 264, 136, 1}}) {
    const Inputs<T> in(sizes);
    const Values sums = sums_of(in);
    for (const int split : {1, 2, 4, 8}) {
      if (kAddressSanitizer && split != 4) continue;
      for (const Epilogue epilogue : kEpilogues) {
        if (split > 1 && epilogue != kEpilogues[static_cast<std::size_t>(split) % 3]) continue;  // all with one part, one with several
        Values first;
        for (const Shape shape : all_shapes()) {
          SCOPED_TRACE(text(sizes) + ", epilogue " + std::to_string(static_cast<int>(epilogue)) + ", tile " + std::to_string(static_cast<int>(shape)) + ", split " +
                       std::to_string(split));
          // Without a split, the stages in shared memory are used again.
          const bool all_orders = split == (sizes.taps == 9 ? 4 : 2) || (split == 1 && sizes.taps == 9 && epilogue == Epilogue::mp_sum);
          const Values y = all_orders ? run_in_all_orders([&] { return std::vector<Values>{run(in, {shape, split}, epilogue)}; })[0] : run(in, {shape, split}, epilogue);
          EXPECT_TRUE(follows(in, epilogue, sums, y));
          if (first.empty()) first = y;
          EXPECT_TRUE(close(y, first, 0, 0));
        }
      }
    }
  }
}

TYPED_TEST(ConvolutionTest, AnySizesAndPointersFollowTheFormula) {
  using T = TypeParam;
  for (const Sizes& sizes : {Sizes{1, 1, 1, 1, 1, 9}, Sizes{3, 1, 7, 5, 9, 9}, Sizes{2, 7, 1, 8, 4, 9}, Sizes{1, 3, 5, 12, 17, 9}, Sizes{1, 2, 2, 24, 40, 9},
                             Sizes{1, 1, 1, 7, 3, 1}, Sizes{2, 3, 3, 40, 33, 1}, Sizes{5, 1, 1, 16, 8, 1}}) {
    const Inputs<T> in(sizes);
    const Values sums = sums_of(in);
    for (const Epilogue epilogue : kEpilogues) {
      for (const Layout& layout : {Layout{}, Layout{1, 0, 0}, Layout{0, 3, 0}, Layout{0, 0, 1}, Layout{0, 0, 0, true}, Layout{1, 1, 1, true}}) {
        if (layout.in_place && epilogue != Epilogue::mp_sum) continue;
        for (const Tile tile : {Tile{Shape::mma_128x128, 2}, Tile{Shape::mma_64x64, 1}}) {
          if (kAddressSanitizer && tile.split == 1) continue;
          SCOPED_TRACE(text(sizes) + ", epilogue " + std::to_string(static_cast<int>(epilogue)) + ", offsets " + std::to_string(layout.x) + ' ' +
                       std::to_string(layout.y) + ' ' + std::to_string(layout.other) + (layout.in_place ? ", in place" : ""));
          EXPECT_TRUE(follows(in, epilogue, sums, run_in_all_orders([&] { return std::vector<Values>{run(in, tile, epilogue, layout)}; })[0]));
        }
      }
    }
  }
}

// The layers of EDM2 networks with an eighth of their channels, on some lines of their maps, with the tiles that `choose` takes for the whole maps.
TYPED_TEST(ConvolutionTest, TheLayersOfEDM2FollowTheFormula) {
  using T = TypeParam;
  int number = 0;
  for (std::int64_t width = 8; width <= 56; width += std::is_same_v<T, float16> ? 8 : 16) {
    for (const std::int64_t level : {1, 2, 3, 4}) {
      const std::int64_t side = 128 >> level, channels = width * level, below = width * (level < 4 ? level + 1 : 4);
      if (kAddressSanitizer && (width != 8 || level == 4)) continue;
      for (Sizes sizes : {Sizes{1, side, side, channels, channels, 9}, Sizes{1, side, side, below + channels, channels, 9}, Sizes{1, side, side, below, channels, 1}}) {
        const Epilogue epilogue = kEpilogues[static_cast<std::size_t>(number++) % 3];
        const Tile tile = convolution::choose(sizes, number % 2 == 0 ? kA100 : kH200);
        sizes.height = std::min<std::int64_t>(side, 256 / (side * level));
        SCOPED_TRACE(text(sizes) + ", tile " + std::to_string(static_cast<int>(tile.shape)) + ", split " + std::to_string(tile.split));
        const Inputs<T> in(sizes);
        EXPECT_TRUE(follows(in, epilogue, sums_of(in), run(in, tile, epilogue)));
      }
    }
  }
}

TYPED_TEST(ConvolutionTest, ASampleIsTheSameToTheBitInAnyBatch) {
  using T = TypeParam;
  for (const Sizes& sizes : {Sizes{3, 5, 7, 40, 48, 9}, Sizes{3, 5, 7, 5, 4, 9}, Sizes{3, 9, 1, 136, 40, 1}}) {
    const Inputs<T> batch(sizes);
    for (const int split : {1, 3}) {
      for (const Epilogue epilogue : kEpilogues) {
        const Values together = run(batch, {Shape::mma_128x64, split}, epilogue);
        for (std::int64_t sample = 0; sample < sizes.samples; ++sample) {
          const Values alone = run(Inputs<T>(batch, sample), {Shape::mma_64x32, split}, epilogue);
          const auto size = static_cast<std::ptrdiff_t>(alone.size());
          EXPECT_TRUE(close(Values(together.begin() + sample * size, together.begin() + (sample + 1) * size), alone, 0, 0)) << text(sizes) << ", sample " << sample;
        }
      }
    }
  }
}

TYPED_TEST(ConvolutionTest, NaNAndInfinityStayWhereTheyBelong) {
  using T = TypeParam;
  for (const int taps : {9, 1}) {
    for (const int split : {1, 2}) {
      Inputs<T> in({2, 6, 5, 16, 24, taps});
      in.x[(1 * 5 + 2) * 16 + 3] = from_doubles<T>({kNan})[0];
      in.x[(30 + 4 * 5 + 4) * 16 + 15] = from_doubles<T>({kInfinity})[0];
      const Values sums = sums_of(in);
      for (const Epilogue epilogue : kEpilogues) {
        EXPECT_TRUE(follows(in, epilogue, sums, run(in, {Shape::mma_64x64, split}, epilogue))) << taps << " taps, split " << split;
      }
    }
  }
}

// Counters are needed only for the tiles of one launch.
TYPED_TEST(ConvolutionTest, ASplitOfMoreTilesThanCountersTakesSeveralLaunches) {
  using T = TypeParam;
  if (kAddressSanitizer) GTEST_SKIP() << "takes 20 s";
  const Inputs<T> in({1, 64 * 520, 1, 72, 8, 1});
  const unsigned long before = simulator::launches;
  EXPECT_TRUE(follows(in, Epilogue::none, sums_of(in), run(in, {Shape::mma_64x32, 2}, Epilogue::none)));
  EXPECT_EQ(simulator::launches, before + 2);
}

TYPED_TEST(ConvolutionTest, AnEmptyBatchLaunchesNothing) {
  const unsigned long before = simulator::launches;
  EXPECT_EQ(run(Inputs<TypeParam>({0, 8, 8, 8, 8, 9}), {Shape::mma_64x64, 1}, Epilogue::mp_sum), Values{});
  EXPECT_EQ(simulator::launches, before);
}

TYPED_TEST(ConvolutionTest, AFailedLaunchAndImpossibleSizesAreReported) {
  using T = TypeParam;
  Array<T> data(std::size_t{64 * 9});
  Params<T> p = {};
  p.x = p.weight = p.y = data.data();
  p.sizes = {1, 1, 1, 8, 8, 1};
  simulator::options.refuse_launches = true;
  EXPECT_STREQ(convolution::cuda<T>(p, {Shape::mma_64x64, 1}, nullptr), "unspecified launch failure");
  EXPECT_STREQ(convolution::pack<T>(data.data(), p.sizes, data.data(), nullptr), "unspecified launch failure");
  const auto error_of = [&](const Sizes& sizes) {
    p.sizes = sizes;
    return std::string(convolution::cuda<T>(p, {Shape::mma_64x64, 1}, nullptr));
  };
  EXPECT_NE(error_of({2, std::int64_t{1} << 29, 1, 8, 8, 1}).find("fewer than 2^30 pixels"), std::string::npos);
  EXPECT_NE(error_of({1, 1, 1, 8, std::int64_t{1} << 20, 1}).find("fewer than 2^20 output channels"), std::string::npos);
  EXPECT_NE(error_of({1, 1, 1, std::int64_t{1} << 20, 8, 9}).find("fewer than 2^23 terms"), std::string::npos);
}

}  // namespace
}  // namespace scm::testing
