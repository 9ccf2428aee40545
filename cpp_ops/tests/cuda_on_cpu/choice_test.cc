// The choice of a convolution's tile: the table of measured shapes, and the estimate.
#include <gtest/gtest.h>

#include <array>

#include "convolution/choice.h"
#include "convolution_inputs.h"

namespace scm::testing {
namespace {

using convolution::Device;
using convolution::Row;
using convolution::Shape;
using convolution::Sizes;
using convolution::Tile;

TEST(ConvolutionChoiceTest, TheOrderOfASumDoesNotDependOnTheBatch) {
  for (const Device& device : {kA100, kH200, Device{86, 82}, Device{89, 128}, Device{120, 170}}) {
    for (const std::int64_t width : {64, 192, 448}) {
      for (const std::int64_t level : {1, 2, 3, 4}) {
        for (const int taps : {9, 1}) {
          Sizes sizes{1, 128 >> level, 128 >> level, width * level, width * level, taps};
          const Tile alone = convolution::choose(sizes, device);
          EXPECT_TRUE(convolution::supported(alone.shape, device));
          for (const std::int64_t samples : {2, 3, 8, 33, 256}) {
            sizes.samples = samples;
            const Tile tile = convolution::choose(sizes, device);
            EXPECT_EQ(tile.split, alone.split) << text(sizes);
            EXPECT_EQ(convolution::family(tile.shape), convolution::family(alone.shape)) << text(sizes);
          }
        }
      }
    }
  }
}

// Large tiles load less from the cache for each product; small tiles fill the device.
TEST(ConvolutionChoiceTest, LargeMapsTakeLargeTilesAndSmallMapsSmallTiles) {
  EXPECT_EQ(convolution::estimate({8, 64, 64, 448, 448, 9}, kH200).shape, Shape::wgmma_256x128);
  EXPECT_EQ(convolution::estimate({8, 64, 64, 448, 448, 9}, kA100).shape, Shape::mma_128x128);
  for (const Device& device : {kH200, kA100}) {
    for (const std::int64_t channels : {256, 768, 1792}) {
      const Shape shape = convolution::estimate({1, 8, 8, channels, channels, 9}, device).shape;
      EXPECT_TRUE(shape == Shape::wgmma_64x64 || shape == Shape::mma_64x64 || shape == Shape::mma_64x32) << static_cast<int>(shape);
    }
  }
}

TEST(ConvolutionChoiceTest, SmallMapsWithManyChannelsAreSplit) {
  EXPECT_GT(convolution::estimate({1, 8, 8, 1792, 1792, 9}, kH200).split, 1);
  EXPECT_GT(convolution::estimate({1, 8, 8, 1792, 1792, 9}, kA100).split, 1);
  EXPECT_EQ(convolution::estimate({1, 64, 64, 448, 448, 9}, kH200).split, 1);
}

// The kernel that runs is then the same for all shapes.
TEST(ConvolutionChoiceTest, ChannelsThatAreNoMultiplesOf8TakeTheShapeThatHasAKernelForThem) {
  for (const Device& device : {kH200, kA100}) {
    for (const std::int64_t samples : {1, 8}) {
      for (const Sizes& sizes : {Sizes{samples, 64, 64, 5, 448, 9}, Sizes{samples, 64, 64, 448, 4, 9}, Sizes{samples, 16, 16, 1797, 1792, 1}}) {
        EXPECT_EQ(convolution::choose(sizes, device).shape, Shape::mma_64x32) << text(sizes);
      }
    }
  }
  EXPECT_EQ(convolution::choose({1, 64, 64, 5, 448, 9}, kH200).split, 1);
}

TEST(ConvolutionChoiceTest, AMeasuredShapeTakesItsTileByTheNumberOfSamples) {
  const Row of_h200{90, 256, 64, 128, 9, 4, Shape::wgmma_64x64, Shape::wgmma_128x128}, of_a100{80, 256, 64, 128, 9, 2, Shape::mma_64x32, Shape::mma_128x64};
  const std::array rows{of_h200, of_a100};
  const auto look_up = [&](const Sizes& sizes, const Device& device) { return convolution::look_up(rows.data(), rows.data() + rows.size(), sizes, device); };
  for (const std::int64_t samples : {1, 3, 4, 33}) {
    const auto tile = look_up({samples, 16, 16, 64, 128, 9}, kH200);
    ASSERT_TRUE(tile.has_value());
    EXPECT_EQ(tile->shape, samples < 4 ? Shape::wgmma_64x64 : Shape::wgmma_128x128) << samples;
    EXPECT_EQ(tile->split, 4);
  }
  EXPECT_EQ(look_up({1, 8, 32, 64, 128, 9}, kA100)->split, 2);
  for (const Sizes& sizes : {Sizes{1, 16, 8, 64, 128, 9}, Sizes{1, 16, 16, 128, 128, 9}, Sizes{1, 16, 16, 64, 64, 9}, Sizes{1, 16, 16, 64, 128, 1}}) {
    EXPECT_FALSE(look_up(sizes, kH200).has_value()) << text(sizes);
  }
  EXPECT_FALSE(look_up({1, 16, 16, 64, 128, 9}, {86, 82}).has_value());
  EXPECT_FALSE(convolution::look_up(nullptr, nullptr, {1, 16, 16, 64, 128, 9}, kH200).has_value());
}

TEST(ConvolutionChoiceTest, ARowHasTilesOfOneFamily) {
  const auto independent = [](Shape shape, Shape of_many) {
    const Row row{90, 256, 64, 128, 9, 4, shape, of_many};
    return convolution::independent_of_batch(&row, &row + 1);
  };
  EXPECT_TRUE(independent(Shape::mma_64x32, Shape::mma_128x128));
  EXPECT_TRUE(independent(Shape::wgmma_64x64, Shape::wgmma_256x128));
  EXPECT_FALSE(independent(Shape::mma_64x64, Shape::wgmma_256x128));
  EXPECT_FALSE(independent(Shape::wgmma_64x64, Shape::mma_128x128));
}

}  // namespace
}  // namespace scm::testing
