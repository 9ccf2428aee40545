// The environment variable SCM_OPS_MAX_ISA, which has an effect on x86. It is read once, so each value has a process of its own.
#ifdef SCM_OPS_X86_LEVELS
#include "common/cpu_level.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>

#include "common/kernel.h"
#include "common/shape.h"
#include "support.h"

namespace scm::testing {
namespace {

// Prints what runs with a value of the variable, and exits.
[[noreturn]] void print_with(const char* value) {
  setenv("SCM_OPS_MAX_ISA", value, 1);
  std::string precisions;
  for (const auto& dense : fake_ort::library().dense_ops) precisions += " " + dense.first;
  std::fprintf(stderr, "level %d, precisions%s.", static_cast<int>(cpu_level()), precisions.c_str());
  std::exit(0);
}

class CpuLevelDeathTest : public ::testing::Test {
 protected:
  CpuLevelDeathTest() { ::testing::GTEST_FLAG(death_test_style) = "threadsafe"; }
};

TEST_F(CpuLevelDeathTest, IsLimitedByTheEnvironment) {
  // Nothing here may call cpu_level() before print_with() does.
  const int highest = __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") ? 2 : __builtin_cpu_supports("avx2") ? 1 : 0;
  const auto at_most = [&](int limit) { return "level " + std::to_string(std::min(highest, limit)) + ", precisions"; };
  EXPECT_EXIT(print_with("generic"), ::testing::ExitedWithCode(0), at_most(0) + "\\.");
  const std::string precisions = highest >= 1 ? " high medium" : "";
  EXPECT_EXIT(print_with("avx2"), ::testing::ExitedWithCode(0), at_most(1) + precisions + "\\.");
  for (const char* limit : {"avx512", "avx512_bf16", "amx", ""}) EXPECT_EXIT(print_with(limit), ::testing::ExitedWithCode(0), at_most(2) + precisions + "\\.");
}

// Prints the error for a value of the variable, and exits.
[[noreturn]] void print_error_with(const char* value) {
  setenv("SCM_OPS_MAX_ISA", value, 1);
  try {
    check_max_isa();
  } catch (const Error& error) {
    std::fprintf(stderr, "%s.", error.reason.c_str());
  }
  std::exit(0);
}

TEST_F(CpuLevelDeathTest, RejectsAnUnknownValue) {
  EXPECT_EXIT(print_error_with("AVX3"), ::testing::ExitedWithCode(0), "SCM_OPS_MAX_ISA must be one of generic, avx2, avx512, avx512_bf16, amx, or not set, got AVX3\\.");
}

}  // namespace
}  // namespace scm::testing
#endif
