// Conv3x3ModulateSiLU and Conv3x3MPSum of the domain scm.fused, on the CPU. Skipped where the library has no float32 convolution.
#include "support.h"

namespace scm::testing {
namespace {

Options high() {
  Options options;
  options.precision = "high";
  return options;
}

template <typename T>
class FusedTest : public ::testing::Test {
 protected:
  void SetUp() override {
    const bool exists = fake_ort::find("Conv3x3MPSum", {kType<T>, kType<T>, kType<T>}, "high");
    if (!exists) GTEST_SKIP() << "convolutions run on bfloat16 instructions, or are ONNX Runtime's";
  }
};
TYPED_TEST_SUITE(FusedTest, Elements, ElementNames);

const std::vector<Sizes> kMaps{{1, 4, 4, 16}, {3, 9, 6, 33}, {2, 16, 16, 20}, {0, 4, 4, 3}};

TYPED_TEST(FusedTest, ModulateGivesTheSameBitsAsTwoOperators) {
  for (const Sizes& map : kMaps) {
    SCOPED_TRACE(text(map));
    const std::int64_t outputs = 70;
    const Tensor x = random(kType<TypeParam>, map), w = random(kType<TypeParam>, {outputs, map[3], 3, 3}, 0.1, 1);
    const Tensor scales = random(kType<TypeParam>, {map[0], outputs + 9}, 1, 2);
    const Attributes columns{{"begin", Sizes{4}}, {"end", Sizes{4 + outputs}}};
    Values scale;
    for (std::int64_t n = 0; n < map[0]; ++n) {
      for (std::int64_t o = 0; o < outputs; ++o) scale.push_back(values(scales)[static_cast<std::size_t>(n * (outputs + 9) + 4 + o)]);
    }
    const Outcome convolved = fake_ort::run("Conv3x3", {x, w}, {}, high());
    ASSERT_EQ(convolved.error, "");
    const Outcome expected = fake_ort::run("ModulateSiLU", {convolved.outputs.at(0), tensor(kType<TypeParam>, {map[0], outputs}, scale)});
    ASSERT_EQ(expected.error, "");
    const Outcome outcome = fake_ort::run("Conv3x3ModulateSiLU", {x, w, scales}, columns, high());
    ASSERT_EQ(outcome.error, "");
    expect_same_bits(outcome.outputs.at(0), expected.outputs.at(0));
  }
}

TYPED_TEST(FusedTest, MPSumGivesTheSameBitsAsTwoOperatorsAlsoInPlace) {
  for (const Sizes& map : kMaps) {
    SCOPED_TRACE(text(map));
    const Sizes shape{map[0], map[1], map[2], 70};
    const Tensor x = random(kType<TypeParam>, map), w = random(kType<TypeParam>, {70, map[3], 3, 3}, 0.1, 1), skip = random(kType<TypeParam>, shape, 1, 2);
    const Attributes blend{{"t", 0.3f}, {"clip", 1.5f}};
    const Outcome convolved = fake_ort::run("Conv3x3", {x, w}, {}, high());
    ASSERT_EQ(convolved.error, "");
    const Outcome expected = fake_ort::run("MPSum", {skip, convolved.outputs.at(0)}, blend);
    ASSERT_EQ(expected.error, "");
    for (const int inplace : {-1, 2}) {
      Options options = high();
      options.inplace_input = inplace;
      const Outcome outcome = fake_ort::run("Conv3x3MPSum", {x, w, skip}, blend, options);
      ASSERT_EQ(outcome.error, "");
      expect_same_bits(outcome.outputs.at(0), expected.outputs.at(0));
    }
  }
}

TYPED_TEST(FusedTest, RejectsShapesThatDoNotFit) {
  const auto type = kType<TypeParam>;
  const Tensor x = random(type, {2, 4, 4, 3}), w = random(type, {5, 3, 3, 3});
  const auto modulate = [&](const Sizes& scales, std::int64_t begin, std::int64_t end) {
    return fake_ort::run("Conv3x3ModulateSiLU", {x, w, random(type, scales)}, {{"begin", Sizes{begin}}, {"end", Sizes{end}}}, high()).error;
  };
  EXPECT_NE(modulate({2, 9}, 0, 4).find("end - begin must be 5 (the outputs of w), got 4"), std::string::npos);
  EXPECT_NE(modulate({2, 9}, 5, 10).find("at least end = 10 columns"), std::string::npos);
  EXPECT_NE(modulate({1, 9}, 0, 5).find("the samples"), std::string::npos);
  const auto sum = [&](const Sizes& skip, float clip) {
    return fake_ort::run("Conv3x3MPSum", {x, w, random(type, skip)}, {{"t", 0.3f}, {"clip", clip}}, high()).error;
  };
  EXPECT_NE(sum({2, 4, 4, 4}, 1).find("skip"), std::string::npos);
  EXPECT_NE(sum({2, 4, 4, 5}, -1).find("clip must be at least 0"), std::string::npos);
}

}  // namespace
}  // namespace scm::testing
