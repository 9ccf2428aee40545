// What ONNX Runtime may do concurrently: create sessions, run one session from several threads, and divide a kernel's work among its own threads. The results
// must equal those of one thread. ThreadSanitizer (make ops-tsan) checks that threads share memory only for reading.
//
// This is a separate executable, because several threads must make the first call of the library at the same time.
#include <algorithm>
#include <set>
#include <string>
#include <thread>

#include "support.h"

// A test allocates more memory than is available, and expects malloc to return null.
#if defined(__SANITIZE_ADDRESS__)
extern "C" __attribute__((visibility("default"))) const char* __asan_default_options() { return "allocator_may_return_null=1"; }
#elif defined(__SANITIZE_THREAD__)
extern "C" __attribute__((visibility("default"))) const char* __tsan_default_options() { return "allocator_may_return_null=1"; }
#endif

namespace scm::testing {
namespace {

constexpr int kCallers = 4;

struct Example {
  const char* op;
  std::vector<Tensor> inputs;
  Attributes attributes;
  std::size_t outputs;
  std::string precision = "";

  Options options() const {
    Options options = with_outputs(std::vector<bool>(outputs, true));
    options.precision = precision;
    return options;
  }

  std::vector<ONNXTensorElementDataType> types() const {
    std::vector<ONNXTensorElementDataType> types;
    for (const Tensor& input : inputs) types.push_back(input.type);
    return types;
  }
};

// Returns a node of each operator, with enough work for several threads.
std::vector<Example> examples(ONNXTensorElementDataType type) {
  const Tensor x = random(type, {2, 500, 64}), map = random(type, {2, 64, 20, 25}, 1, 1), weights = random(kFloat, {64});
  const Tensor state = random(kFloat, {2, 4, 90, 91}), t = random(kFloat, {2});
  std::vector<Example> all{
      {"PixelNorm", {x}, {{"eps", 1e-4f}}, 2},
      {"MPSiLU", {x}, {}, 1},
      {"MPSum", {x, random(type, x.shape, 1, 1)}, {{"t", 0.3f}, {"clip", 256.0f}}, 2},
      {"MPCat", {x, random(type, {2, 500, 7})}, {{"t", 0.5f}}, 2},
      {"ModulateSiLU", {x, random(type, {2, 64})}, {}, 1},
      {"NormModulateSiLU", {x, random(type, {2, 128})}, {{"eps", 1e-4f}}, 1},
      {"CosineAttention", {random(type, {2, 150, 3 * 2 * 8})}, {{"heads", std::int64_t{2}}, {"eps", 1e-4f}}, 1},
      {"Attention", {random(type, {2, 150, 4, 8}), random(type, {2, 70, 2, 8}, 1, 1), random(type, {2, 70, 2, 24})}, {{"scale", 0.3f}}, 1},
      {"MaskedAttention",
       {random(type, {2, 150, 4, 8}), random(type, {2, 70, 2, 8}, 1, 1), random(type, {2, 70, 2, 24}), random(type, {2, 1, 1, 70})},
       {{"scale", 0.3f}},
       1},
      {"ReLULinearAttention", {x, random(type, x.shape, 1, 1), random(type, x.shape, 1, 2)}, {{"heads", std::int64_t{4}}, {"eps", 1e-15f}}, 1},
      {"DepthwiseGLU", {random(type, {2, 80, 32, 33}), random(type, {80, 1, 3, 3}), random(type, {80})}, {}, 1},
      {"GEGLU", {random(type, {2, 500, 128}), random(type, {128})}, {}, 1},
      {"GroupNorm", {map, weights, weights}, {{"groups", std::int64_t{8}}, {"eps", 1e-5f}}, 1},
      {"GroupNormSiLU", {map, weights, weights}, {{"groups", std::int64_t{8}}, {"eps", 1e-5f}}, 1},
      {"GroupNormModulateSiLU", {map, weights, weights, random(type, {2, 128})}, {{"groups", std::int64_t{8}}, {"eps", 1e-5f}}, 1},
      {"LayerNorm", {x, weights, weights}, {{"eps", 1e-5f}}, 1},
      {"LayerNormModulate", {x, random(type, {2, 1, 64}), random(type, {2, 1, 64}, 1, 1)}, {{"eps", 1e-5f}}, 1},
      {"RMSNorm", {x, weights}, {{"eps", 1e-5f}}, 1},
      {"ConsistencyStep", {state, random(type, state.shape), state, t, t}, {{"sigma_data", 0.5f}}, 1},
      {"ToImage", {random(type, {2, 3, 120, 110})}, {{"scale", 127.5f}, {"offset", 128.0f}}, 1},
  };
  const Tensor image = random(type, {2, 64, 40, 41}), channels_last = random(type, {2, 13, 14, 64});
  const Tensor w = random(type, {40, 64, 3, 3}), w1x1 = random(type, {40, 64, 1, 1}), b = random(type, {40});
  const std::vector<Example> convolutions{
      {"Conv", {image, w, b}, {{"pads", Sizes{1, 1, 1, 1}}}, 1, "high"},
      {"Conv", {image, w1x1, b}, {{"pads", Sizes{0, 0, 0, 0}}}, 1, "high"},
      {"Conv3x3", {channels_last, w}, {}, 1, "high"},
      {"Conv3x3ModulateSiLU", {channels_last, w, random(type, {2, 40})}, {{"begin", Sizes{0}}, {"end", Sizes{40}}}, 1, "high"},
      {"Conv3x3MPSum", {channels_last, w, random(type, {2, 13, 14, 40})}, {{"t", 0.3f}, {"clip", 256.0f}}, 1, "high"},
  };
  for (const Example& example : convolutions) {
    if (fake_ort::find(example.op, example.types(), example.precision)) all.push_back(example);  // depends on the processor
  }
  if (type == kFloat) all.push_back({"PhiloxNormal", {integers({2}, {1, -2}), integers({}, {3}), scalar(1)}, {{"shape", Sizes{4, 33, 34}}}, 1});
  return all;
}

void expect_outputs(const Outcome& outcome, const Outcome& expected) {
  EXPECT_EQ(outcome.error, "");
  ASSERT_EQ(outcome.outputs.size(), expected.outputs.size());
  for (std::size_t i = 0; i < expected.outputs.size(); ++i) expect_same_bits(outcome.outputs[i], expected.outputs[i]);
}

// Must be the first test in the process, so that the threads make the first call of the library.
TEST(ConcurrencyTest, SessionsCreatedConcurrentlyGetTheSameDomain) {
  const auto domains = fake_ort::register_concurrently(kCallers);
  EXPECT_EQ(std::set(domains.begin(), domains.end()).size(), 1u);
  EXPECT_NE(domains.at(0), nullptr);
}

TEST(ConcurrencyTest, TheExamplesAreAllOperators) {
  std::set<std::string> registered, tested;
  for (const OrtCustomOp* op : fake_ort::library().ops) registered.insert(op->GetName(op));
  for (const Example& node : examples(kFloat)) {
    if (node.precision.empty()) tested.insert(node.op);  // the others are in domains of their own
  }
  EXPECT_EQ(tested, registered);
}

// No kernel has run yet: the threads select the processor's x86-64 level concurrently.
TEST(ConcurrencyTest, SessionsInferAndRunConcurrently) {
  fake_ort::library();
  const std::vector<Example> nodes = examples(kFloat);
  std::vector<std::vector<Outcome>> outcomes(kCallers);
  fake_ort::in_parallel(kCallers, [&](int caller) {
    for (const Example& node : nodes) {
      Options own = node.options();
      own.threads = Threads::many;
      std::vector<Spec> specs;
      for (const Tensor& input : node.inputs) specs.push_back(spec(input));
      EXPECT_EQ(fake_ort::infer(node.op, specs, node.attributes, node.outputs, fake_ort::kNever, node.precision).error, "");
      fake_ort::may_inplace(*fake_ort::find(node.op, node.types(), node.precision));
      outcomes[static_cast<std::size_t>(caller)].push_back(fake_ort::run(node.op, node.inputs, node.attributes, own));
    }
  });
  for (std::size_t i = 0; i < nodes.size(); ++i) {
    SCOPED_TRACE(nodes[i].op);
    const Outcome expected = fake_ort::run(nodes[i].op, nodes[i].inputs, nodes[i].attributes, nodes[i].options());
    for (const std::vector<Outcome>& of_caller : outcomes) expect_outputs(of_caller.at(i), expected);
  }
}

TEST(ConcurrencyTest, OneKernelServesManyCallers) {
  for (const auto type : {kFloat, kHalf}) {
    for (const Example& node : examples(type)) {
      SCOPED_TRACE(::testing::Message() << node.op << (type == kHalf ? " of float16" : " of float"));
      Options options = node.options();
      const Outcome expected = fake_ort::run(node.op, node.inputs, node.attributes, options);
      ASSERT_EQ(expected.error, "");
      const bool one_thread = std::thread::hardware_concurrency() == 1;  // convolutions do not divide their work then
      EXPECT_TRUE(expected.pieces > 1 || (one_thread && !node.precision.empty())) << "the work is too small to be divided";
      options.threads = Threads::many;
      for (const Outcome& outcome : fake_ort::run_concurrently(*fake_ort::find(node.op, node.types(), node.precision), node.inputs, node.attributes, options, kCallers, 3)) {
        EXPECT_EQ(outcome.pieces, expected.pieces);
        expect_outputs(outcome, expected);
      }
    }
  }
}

TEST(ConcurrencyTest, CallersGetTheirOwnErrors) {
  const std::int64_t length = std::int64_t{1} << 44;  // more than the available memory
  Options options;
  options.no_output_memory = true;
  options.threads = Threads::many;
  const OrtCustomOp* op = fake_ort::find("CosineAttention", {kFloat});
  const Attributes attributes{{"heads", std::int64_t{1}}, {"eps", 1e-4f}};
  for (const Outcome& outcome : fake_ort::run_concurrently(*op, {{kFloat, {4, length, 3}, {}}}, attributes, options, kCallers, 3)) {
    EXPECT_EQ(outcome.error, "scm::CosineAttention: std::bad_alloc with input shapes [4, 17592186044416, 3]");
  }
}

// Not a test of the library: shows that ThreadSanitizer reports a race (see CMakeLists.txt).
TEST(DISABLED_DeliberateRaceTest, KernelThatCountsItsRuns) {
  struct Counting : OrtCustomOp {
    int runs = 0;
  } op{};
  op.CreateKernelV2 = [](const OrtCustomOp* self, const OrtApi*, const OrtKernelInfo*, void** kernel) -> OrtStatusPtr {
    *kernel = const_cast<OrtCustomOp*>(self);
    return nullptr;
  };
  op.KernelComputeV2 = [](void* kernel, OrtKernelContext*) -> OrtStatusPtr {
    ++static_cast<Counting*>(kernel)->runs;
    return nullptr;
  };
  op.KernelDestroy = [](void*) {};
  fake_ort::run_concurrently(op, {}, {}, with_outputs({}), kCallers, 3);
  EXPECT_GT(op.runs, 0);
}

}  // namespace
}  // namespace scm::testing
