#include "philox_normal/op.h"

#include <array>
#include <cmath>
#include <limits>

#include "philox_normal/philox.h"
#include "support.h"

namespace scm::testing {
namespace {

// Philox4x32-10 in plain integers, after Salmon et al. (SC 2011), section 3.3.
std::array<std::uint32_t, 4> philox(std::array<std::uint32_t, 4> counter, std::array<std::uint32_t, 2> key) {
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t left = counter[0] * std::uint64_t{0xD2511F53}, right = counter[2] * std::uint64_t{0xCD9E8D57};
    counter = {static_cast<std::uint32_t>(right >> 32) ^ counter[1] ^ key[0], static_cast<std::uint32_t>(right), static_cast<std::uint32_t>(left >> 32) ^ counter[3] ^ key[1],
               static_cast<std::uint32_t>(left)};
    key = {key[0] + 0x9E3779B9, key[1] + 0xBB67AE85};
  }
  return counter;
}

double reference(std::int64_t seed, std::int64_t draw, std::uint64_t element) {
  const auto key = static_cast<std::uint64_t>(seed);
  const auto words = philox({static_cast<std::uint32_t>(draw), 0, static_cast<std::uint32_t>(element), static_cast<std::uint32_t>(element >> 32)},
                            {static_cast<std::uint32_t>(key), static_cast<std::uint32_t>(key >> 32)});
  const double pi = std::acos(-1.0);
  const auto step = static_cast<float>(2 * pi * 0x1p-32), half_step = static_cast<float>(2 * pi * 0x1p-33);
  const float u = static_cast<float>(words[0]) * 0x1p-32f + 0x1p-33f, v = static_cast<float>(words[1]) * step + half_step;
  return std::sqrt(-2 * std::log(double{u})) * std::sin(double{v});
}

Outcome noise(const std::vector<std::int64_t>& seeds, std::int64_t draw, const Sizes& shape, float scale = 1) {
  return fake_ort::run("PhiloxNormal", {integers({static_cast<std::int64_t>(seeds.size())}, seeds), integers({}, {draw}), scalar(scale)}, {{"shape", shape}});
}

// Expects the float nearest to the reference or one of its neighbors.
void expect_noise(const Outcome& outcome, const std::vector<std::int64_t>& seeds, std::int64_t draw, const Sizes& shape, float scale = 1) {
  ASSERT_EQ(outcome.error, "");
  Values expected;
  Sizes full = shape;
  full.insert(full.begin(), static_cast<std::int64_t>(seeds.size()));
  for (const std::int64_t seed : seeds) {
    for (std::int64_t e = 0; e < elements(shape); ++e) expected.push_back(static_cast<float>(static_cast<float>(reference(seed, draw, static_cast<std::uint64_t>(e))) * scale));
  }
  ASSERT_EQ(text(outcome.outputs.at(0).shape), text(full));
  const Values got = values(outcome.outputs.at(0));
  for (std::size_t i = 0; i < got.size(); ++i) ASSERT_NEAR(got[i], expected[i], std::fabs(expected[i]) * 0x1p-23) << "element " << i;
}

constexpr auto kSmallest = std::numeric_limits<std::int64_t>::min(), kLargest = std::numeric_limits<std::int64_t>::max();

TEST(PhiloxNormalTest, ReferenceGivesTheKnownAnswersOfRandom123) {
  const std::uint32_t ones = 0xffffffff;
  EXPECT_EQ(philox({0, 0, 0, 0}, {0, 0}), (std::array<std::uint32_t, 4>{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  EXPECT_EQ(philox({ones, ones, ones, ones}, {ones, ones}), (std::array<std::uint32_t, 4>{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
  EXPECT_EQ(philox({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0}), (std::array<std::uint32_t, 4>{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));
}

TEST(PhiloxNormalTest, GivesTheKnownNoiseOfSeedZero) {
  const Outcome outcome = noise({0}, 0, {6});
  ASSERT_EQ(outcome.error, "");
  const Values got = values(outcome.outputs.at(0)), known{-0.92466259, -0.42534415, -2.64384570, 0.14518388, -0.12086647, -0.57972564};
  for (std::size_t i = 0; i < known.size(); ++i) EXPECT_NEAR(got[i], known[i], 1e-6) << "element " << i;
}

TEST(PhiloxNormalTest, FollowsItsFormulaForAllSeedsAndDraws) {
  const std::vector<std::int64_t> seeds{0, 1, -1, 7, 0xffffffff, 0x100000000, -0x100000000, 0x123456789abcdef0, kSmallest, kLargest};
  for (const std::int64_t draw : {std::int64_t{0}, std::int64_t{1}, std::int64_t{12345}, std::int64_t{0x80000000}, std::int64_t{0xffffffff}}) {
    expect_noise(noise(seeds, draw, {3, 77}), seeds, draw, {3, 77});
  }
  expect_noise(noise({5}, 2, {200000}), {5}, 2, {200000});
}

TEST(PhiloxNormalTest, AcceptsAnyShapeAndScale) {
  for (const Sizes& shape : {Sizes{}, {0}, {1}, {5}, {64}, {77}, {3, 0, 2}, {4, 8, 8}, {1, 2, 3, 4, 5}}) {
    for (const std::vector<std::int64_t>& seeds : {std::vector<std::int64_t>{}, {3}, {3, -4, 5}}) {
      for (const float scale : {1.0f, 80.0f, -0.5f, 0.0f}) expect_noise(noise(seeds, 1, shape, scale), seeds, 1, shape, scale);
    }
  }
}

TEST(PhiloxNormalTest, CountsElementsBeyond32Bits) {
  for (const std::uint64_t element : {std::uint64_t{1} << 32, (std::uint64_t{1} << 32) + 5, std::uint64_t{0x123456789a}}) {
    EXPECT_NEAR(standard_normal(9, 3, element), reference(9, 3, element), 1e-6);
  }
}

TEST(PhiloxNormalTest, IsReproducibleOnManyThreadsAndInAnyBatch) {
  expect_reproducible("PhiloxNormal", {integers({3}, {1, -2, 3}), integers({}, {4}), scalar(2)}, {{"shape", Sizes{4, 32, 33}}});
}

TEST(PhiloxNormalTest, GivesTheSameBitsAtEveryLevelWhateverTheBatch) {
  const auto apply = [](CpuKernel<philox_normal::Params<float>> kernel, const std::vector<std::int64_t>& seeds, std::int64_t size, const Cuts& cuts) {
    const auto samples = static_cast<std::int64_t>(seeds.size());
    const std::int64_t draw = 6;
    const float scale = 1.7f;
    Tensor noise = empty_like(kFloat, {samples, size});
    run_in_pieces(kernel, {seeds.data(), &draw, &scale, data<float>(noise), samples, size}, cuts);
    return noise;
  };
  const std::vector<std::int64_t> seeds{11, -12, kLargest};
  for (const std::int64_t size : {1, 3, 64, 77, 4099}) {
    Tensor first;
    for (const auto& [level, kernel] : SCM_LEVELS(philox_normal, float)) {
      SCOPED_TRACE(level);
      const Tensor whole = apply(kernel, seeds, size, {0, 3 * size});
      if (first.shape.empty()) first = whole;
      expect_same_bits(whole, first);
      expect_same_bits(apply(kernel, seeds, size, {0, 1, size / 2 + 1, size + 1, 2 * size, 3 * size}), whole);
      for (std::int64_t i = 0; i < 3; ++i) expect_same_bits(apply(kernel, {seeds[static_cast<std::size_t>(i)]}, size, {0, size}), slice(whole, i, i + 1));
    }
  }
}

TEST(PhiloxNormalTest, InfersTheBatchAndItsShape) {
  const auto shapes = [](const char* seeds, const Sizes& shape) { return inferred("PhiloxNormal", {{kInt64, seeds}, {kInt64, "[]"}, {kFloat, "[]"}}, {{"shape", shape}}); };
  EXPECT_EQ(shapes("[N]", {4, 64, 64}), std::vector<std::string>{"[N, 4, 64, 64]"});
  EXPECT_EQ(shapes("[3]", {}), std::vector<std::string>{"[3]"});
  EXPECT_EQ(shapes("[?]", {4}), std::vector<std::string>{"?"});
  EXPECT_EQ(shapes("?", {4}), std::vector<std::string>{"?"});
}

TEST(PhiloxNormalTest, RejectsADrawOutOfRange) {
  EXPECT_EQ(noise({1}, -1, {4}).error, "scm::PhiloxNormal: draw must be in [0, 2^32), got -1");
  EXPECT_EQ(noise({1}, 0x100000000, {4}).error, "scm::PhiloxNormal: draw must be in [0, 2^32), got 4294967296");
  EXPECT_EQ(noise({}, kLargest, {4}).error, "scm::PhiloxNormal: draw must be in [0, 2^32), got 9223372036854775807");
}

TEST(PhiloxNormalTest, RejectsInvalidInputs) {
  const Tensor seeds = integers({2}, {1, 2}), draw = integers({}, {0}), scale = scalar(1);
  const Attributes attributes{{"shape", Sizes{4}}};
  expect_scalar_rejected("PhiloxNormal", {integers({}, {1}), draw, scale}, attributes, {"seeds must have 1 axis", "[]"});
  expect_rejected("PhiloxNormal", {seeds, integers({1}, {0}), scale}, attributes, {"draw must have 0 axes", "[1]"});
  expect_rejected("PhiloxNormal", {seeds, draw, random(kFloat, {1})}, attributes, {"scale must have 0 axes", "[1]"});
  expect_rejected("PhiloxNormal", {seeds, draw, scale}, {{"shape", Sizes{4, -1}}}, {"shape must be at least 0, got -1"});
  expect_rejected("PhiloxNormal", {seeds, draw, scale}, {{"shape", Sizes(65, 1)}}, {""});  // more axes than a tensor can have
  expect_rejected("PhiloxNormal", {seeds, draw, scale}, {}, {"shape"});
  expect_rejected("PhiloxNormal", {seeds, draw, scale}, {{"shape", std::int64_t{4}}}, {""});
}

TEST(PhiloxNormalTest, ReportsAShapeThatIsTooLarge) {
  EXPECT_NE(noise({1}, 0, {std::int64_t{1} << 40}).error.find("scm::PhiloxNormal: "), std::string::npos);
  EXPECT_NE(noise({1}, 0, {std::int64_t{1} << 40, std::int64_t{1} << 40}).error.find("scm::PhiloxNormal: "), std::string::npos);
}

}  // namespace
}  // namespace scm::testing
