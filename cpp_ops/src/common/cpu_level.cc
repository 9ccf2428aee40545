#include "common/cpu_level.h"

#include <cstdlib>
#include <string>

#include "common/kernel.h"
#include "common/shape.h"

namespace scm {
namespace {

constexpr const char* kVariable = "SCM_OPS_MAX_ISA";
constexpr const char* kNames[] = {"generic", "avx2", "avx512", "avx512_bf16", "amx"};  // in the order of MaxIsa

struct Limit {
  std::string unknown;  // the variable's value, if it is none of kNames
  MaxIsa isa = MaxIsa::amx;
};

const Limit& limit() {
  static const Limit found = [] {
    const char* const value = std::getenv(kVariable);
    if (!value || !*value) return Limit{};
    for (std::size_t i = 0; i < std::size(kNames); ++i) {
      if (std::string(value) == kNames[i]) return Limit{{}, static_cast<MaxIsa>(i)};
    }
    return Limit{value, MaxIsa::amx};
  }();
  return found;
}

#ifdef SCM_OPS_X86_LEVELS
CpuLevel detect() {
  __builtin_cpu_init();
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
                  __builtin_cpu_supports("f16c") && __builtin_cpu_supports("lzcnt") && __builtin_cpu_supports("movbe");
  const bool v4 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
                  __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (!v3 || max_isa() == MaxIsa::generic) return CpuLevel::generic;
  return v4 && max_isa() != MaxIsa::avx2 ? CpuLevel::v4 : CpuLevel::v3;
}
#else
CpuLevel detect() { return CpuLevel::generic; }
#endif

}  // namespace

MaxIsa max_isa() { return limit().isa; }

void check_max_isa() {
  if (limit().unknown.empty()) return;
  std::string names;
  for (const char* name : kNames) names += (names.empty() ? "" : ", ") + std::string(name);
  throw Error{std::string("the environment variable ") + kVariable + " must be one of " + names + ", or not set, got " + limit().unknown};
}

CpuLevel cpu_level() {
  static const CpuLevel level = detect();
  return level;
}

}  // namespace scm
