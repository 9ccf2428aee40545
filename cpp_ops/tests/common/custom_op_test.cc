// Behavior common to all operators: registration, declared types, and conversion of errors to statuses.
#include "common/custom_op.h"

#include <algorithm>
#include <set>

#include "support.h"

// A test allocates more memory than is available, and expects malloc to return null.
#if defined(__SANITIZE_ADDRESS__)
extern "C" __attribute__((visibility("default"))) const char* __asan_default_options() { return "allocator_may_return_null=1"; }
#elif defined(__SANITIZE_THREAD__)
extern "C" __attribute__((visibility("default"))) const char* __tsan_default_options() { return "allocator_may_return_null=1"; }
#endif

namespace scm::testing {
namespace {

struct Example {
  const char* op;
  std::vector<Tensor> inputs;
  Attributes attributes;
  std::size_t outputs;
  std::size_t allocators = 0;  // that the kernel gets when it is created
};

// Returns a small node of each operator.
std::vector<Example> examples(ONNXTensorElementDataType type) {
  const Tensor x = random(type, {2, 5, 4}), per_sample = random(kFloat, {2}), per_channel = random(kFloat, {5}), per_column = random(kFloat, {4});
  const Tensor state = random(kFloat, {2, 5, 4}), heads = random(type, {2, 5, 2, 4});
  return {
      {"PixelNorm", {x}, {{"eps", 1e-4f}}, 2},
      {"MPSiLU", {x}, {}, 1},
      {"MPSum", {x, x}, {{"t", 0.3f}, {"clip", 256.0f}}, 2},
      {"MPCat", {x, x}, {{"t", 0.5f}}, 2},
      {"ModulateSiLU", {x, random(type, {2, 4})}, {}, 1},
      {"NormModulateSiLU", {x, random(type, {2, 8})}, {{"eps", 1e-4f}}, 1},
      {"CosineAttention", {random(type, {2, 5, 12})}, {{"heads", std::int64_t{2}}, {"eps", 1e-4f}}, 1},
      {"Attention", {heads, heads, heads}, {{"scale", 0.5f}}, 1},
      {"MaskedAttention", {heads, heads, heads, random(type, {2, 1, 1, 5})}, {{"scale", 0.5f}}, 1},
      {"ReLULinearAttention", {x, x, x}, {{"heads", std::int64_t{2}}, {"eps", 1e-15f}}, 1},
      {"DepthwiseGLU", {random(type, {2, 4, 5, 3}), random(type, {4, 1, 3, 3}), random(type, {4})}, {}, 1},
      {"GEGLU", {x, random(type, {4})}, {}, 1},
      {"GroupNorm", {x, per_channel, per_channel}, {{"groups", std::int64_t{1}}, {"eps", 1e-5f}}, 1, 1},
      {"GroupNormSiLU", {x, per_channel, per_channel}, {{"groups", std::int64_t{1}}, {"eps", 1e-5f}}, 1, 1},
      {"GroupNormModulateSiLU", {x, per_channel, per_channel, random(type, {2, 10})}, {{"groups", std::int64_t{1}}, {"eps", 1e-5f}}, 1, 1},
      {"LayerNorm", {x, per_column, per_column}, {{"eps", 1e-5f}}, 1},
      {"LayerNormModulate", {x, random(type, {2, 1, 4}), random(type, {2, 1, 4})}, {{"eps", 1e-5f}}, 1},
      {"RMSNorm", {x, per_column}, {{"eps", 1e-5f}}, 1},
      {"ConsistencyStep", {state, x, state, per_sample, per_sample}, {{"sigma_data", 0.5f}}, 1},
      {"PhiloxNormal", {integers({2}, {1, 2}), integers({}, {0}), scalar(1)}, {{"shape", Sizes{3, 4}}}, 1},
      {"ToImage", {random(type, {2, 3, 4, 5})}, {{"scale", 127.5f}, {"offset", 128.0f}}, 1},
  };
}

TEST(RegistrationTest, OffersEveryOperatorForFloatAndHalfOnTheCpu) {
  EXPECT_EQ(fake_ort::library().domain, "scm");
  std::multiset<std::string> names;
  for (const OrtCustomOp* op : fake_ort::library().ops) {
    if (op->GetExecutionProviderType(op) == std::string("CPUExecutionProvider")) names.insert(op->GetName(op));
    EXPECT_EQ(op->version, 18u);
    EXPECT_EQ(op->GetStartVersion(op), 1);
    EXPECT_EQ(op->GetEndVersion(op), 1);
  }
  std::multiset<std::string> expected;
  for (const auto type : {kFloat, kHalf}) {
    for (const Example& example : examples(type)) {
      if (example.op != std::string("PhiloxNormal") || type == kFloat) expected.insert(example.op);
    }
  }
  EXPECT_EQ(names, expected);
}

TEST(RegistrationTest, FailsWithAStatusWhereverOnnxRuntimeFails) {
  const fake_ort::Library& library = fake_ort::library();
  const auto& failures = library.failures;
  std::size_t calls = library.ops.size() + 2;  // one to create the domain, one per operator, one to add the domain to the session
  const auto number = [](const std::map<std::string, std::size_t>& numbers, const char* precision) {
    const auto found = numbers.find(precision);
    return found == numbers.end() ? 0 : found->second;
  };
  for (const char* precision : {"high", "medium"}) {
    calls += 3;  // two to read the configuration entry, one to add the domain `scm` to the session
    if (const std::size_t created = number(library.new_domains, precision)) {
      // One call per domain and one per operator, and one to add the first domain to the session. The calls that add the others never fail: the domains exist
      // by then, so the next attempt makes fewer calls and succeeds.
      calls += created + library.dense_ops.at(precision).size() + 1;
    } else {
      calls += number(library.dense_domains, precision);  // one to add each
    }
  }
  EXPECT_EQ(failures.size(), calls);
  for (const std::string& failure : failures) EXPECT_EQ(failure, "scm::RegisterCustomOps: injected failure");
}

TEST(RegistrationTest, ServesManySessions) {
  for (int session = 0; session < 3; ++session) {
    const auto [error, domains] = fake_ort::register_with(18, "1.18.0");
    EXPECT_EQ(error, "");
    EXPECT_EQ(domains, std::vector<std::string>{"scm"});
  }
  EXPECT_EQ(fake_ort::register_with(25, "1.25.0").first, "");
}

TEST(RegistrationTest, RejectsAnOnnxRuntimeThatIsTooOld) {
  const auto [error, domains] = fake_ort::register_with(15, "1.15.0");
  EXPECT_NE(error.find("1.18"), std::string::npos) << error;
  EXPECT_NE(error.find("1.15.0"), std::string::npos) << error;
  EXPECT_TRUE(domains.empty());
  EXPECT_EQ(fake_ort::live_objects(), 0);
}

TEST(CustomOpTest, WorksInPlaceWhereTypesAndSizesMatch) {
  for (const auto type : {kFloat, kHalf}) {
    for (const Example& example : examples(type)) {
      SCOPED_TRACE(example.op);
      std::vector<ONNXTensorElementDataType> types;
      for (const Tensor& input : example.inputs) types.push_back(input.type);
      const OrtCustomOp* op = fake_ort::find(example.op, types);
      ASSERT_NE(op, nullptr);
      for (const auto& [input, output] : fake_ort::may_inplace(*op)) {
        ASSERT_LT(static_cast<std::size_t>(input), types.size());
        ASSERT_LT(static_cast<std::size_t>(output), op->GetOutputTypeCount(op));
        EXPECT_EQ(op->GetInputType(op, static_cast<std::size_t>(input)), op->GetOutputType(op, static_cast<std::size_t>(output)));
        Options options = with_outputs(std::vector<bool>(example.outputs, true));
        const Outcome apart = fake_ort::run(example.op, example.inputs, example.attributes, options);
        options.inplace_input = input;
        const Outcome over = fake_ort::run(example.op, example.inputs, example.attributes, options);
        ASSERT_EQ(apart.error + over.error, "");
        for (std::size_t i = 0; i < example.outputs; ++i) expect_same_bits(over.outputs[i], apart.outputs[i]);
      }
    }
  }
}

TEST(CustomOpTest, RunsAndInfersTheSameShapesAndTypes) {
  for (const auto type : {kFloat, kHalf}) {
    for (const Example& example : examples(type)) {
      SCOPED_TRACE(example.op);
      std::vector<Spec> specs;
      for (const Tensor& input : example.inputs) specs.push_back(spec(input));
      const Outcome outcome = fake_ort::run(example.op, example.inputs, example.attributes, with_outputs(std::vector<bool>(example.outputs, true)));
      const auto inference = fake_ort::infer(example.op, specs, example.attributes, example.outputs);
      ASSERT_EQ(outcome.error + inference.error, "");
      for (std::size_t i = 0; i < example.outputs; ++i) {
        EXPECT_EQ(spec(outcome.outputs[i]).shape, inference.outputs[i].shape);
        EXPECT_EQ(outcome.outputs[i].type, inference.outputs[i].type);
      }
    }
  }
}

TEST(CustomOpTest, RejectsANodeThatLacksAnAttribute) {
  for (const Example& example : examples(kFloat)) {
    for (const auto& [name, value] : example.attributes) {
      SCOPED_TRACE(std::string(example.op) + " and " + name);
      Attributes lacking = example.attributes, mistyped = example.attributes;
      lacking.erase(name);
      mistyped[name] = std::string("text");
      expect_rejected(example.op, example.inputs, lacking, {name});
      expect_rejected(example.op, example.inputs, mistyped, {});
    }
  }
}

// Each API call fails once: the library must return a status, throw nothing, and leak nothing.
TEST(CustomOpTest, TurnsFailuresOfOnnxRuntimeIntoStatuses) {
  for (const Example& example : examples(kHalf)) {
    SCOPED_TRACE(example.op);
    Options options = with_outputs(std::vector<bool>(example.outputs, true));
    const std::string expected = std::string("scm::") + example.op + ": injected failure";
    Outcome outcome;
    for (options.failing_call = 0;; ++options.failing_call) {
      outcome = fake_ort::run(example.op, example.inputs, example.attributes, options);
      if (outcome.error.empty()) break;
      EXPECT_EQ(outcome.error, expected) << "call " << options.failing_call;
      ASSERT_LT(options.failing_call, 100);
    }
    // 6 calls per input, 3 per output, 1 per attribute and per allocator, and 1 of ParallelFor.
    const std::size_t calls =
        6 * example.inputs.size() + 3 * example.outputs + example.attributes.size() + example.allocators + (outcome.pieces > 0);
    EXPECT_EQ(static_cast<std::size_t>(options.failing_call), calls);
  }
}

TEST(CustomOpTest, InfersWhatItCanWhereOnnxRuntimeFails) {
  for (const Example& example : examples(kHalf)) {
    SCOPED_TRACE(example.op);
    std::vector<Spec> specs;
    for (const Tensor& input : example.inputs) specs.push_back(spec(input));
    const std::string expected = std::string("scm::") + example.op + ": injected failure";
    int errors = 0;
    for (int call = 0; call < 60; ++call) {  // an unknown input or an absent output is no error
      const auto inference = fake_ort::infer(example.op, specs, example.attributes, example.outputs, call);
      if (inference.error.empty()) continue;
      EXPECT_EQ(inference.error, expected) << "call " << call;
      ++errors;
    }
    EXPECT_GT(errors, 3);
  }
}

TEST(CustomOpTest, ReportsAFailureOfParallelFor) {
  Options options;
  options.failing_call = 10;  // the call after those for the attribute, the input and the output
  const Outcome outcome = fake_ort::run("PixelNorm", {random(kFloat, {1000, 64})}, {{"eps", 1e-4f}}, options);
  EXPECT_EQ(outcome.error, "scm::PixelNorm: injected failure");
}

TEST(CustomOpTest, InfersNothingForOutputsThatTheNodeDoesNotHave) {
  EXPECT_EQ(inferred("PixelNorm", {{kFloat, "[2, 3]"}}, {{"eps", 1e-4f}}, 0), std::vector<std::string>{});
}

}  // namespace
}  // namespace scm::testing
