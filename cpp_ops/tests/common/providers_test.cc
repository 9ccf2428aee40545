// The execution providers that an operator's kernels are registered for, in a build with CUDA kernels.
#ifndef SCM_OPS_CUDA
#define SCM_OPS_CUDA
#endif
#include <gtest/gtest.h>

#include <new>
#include <set>

#include "common/custom_op.h"

namespace scm::testing {
namespace {

struct Nothing {
  static constexpr const char* kName = "Nothing";
  static constexpr std::array kInputs{Argument{"x"}};
  static constexpr std::array kOutputs{Argument{"y"}};
  static constexpr std::array<Inplace, 0> kInplace{};

  explicit Nothing(const Attributes&) {}
  Shapes infer(const Shapes& inputs) const { return inputs; }
  template <typename T>
  void cpu(Context&) const {}
  template <typename T>
  void cuda(Context&) const {}
};

TEST(ProvidersTest, KernelsAreRegisteredForTheCudaProviderUnderBothOfItsNames) {
  const OrtApi api{};
  CustomOps ops{};
  add_all<Nothing, float, float16, bfloat16>(ops, api);
  std::multiset<std::pair<std::string, ONNXTensorElementDataType>> found, expected;
  for (const auto& op : ops) found.emplace(op->GetExecutionProviderType(op.get()), op->GetInputType(op.get(), 0));
  for (const auto type : {kElementType<float>, kElementType<float16>, kElementType<bfloat16>}) {
    for (const char* provider : {"CUDAExecutionProvider", "CudaPluginExecutionProvider"}) expected.emplace(provider, type);
    if (type != kElementType<bfloat16>) expected.emplace("CPUExecutionProvider", type);
  }
  EXPECT_EQ(found, expected);
}

// A status without room for its message still says that memory ran out.
TEST(GuardedTest, ReportsThatMemoryRanOutIfThereIsNoneForTheMessage) {
  static const char* reason = nullptr;
  OrtApi api{};
  api.CreateStatus = [](OrtErrorCode, const char* message) noexcept -> OrtStatus* {
    reason = message;
    return nullptr;
  };
  const auto throw_something = [] { throw 1; };  // an exception while the message is built is caught in the same place
  guarded(api, "Nothing", throw_something);
  EXPECT_STREQ(reason, "scm: out of memory");
}

}  // namespace
}  // namespace scm::testing
