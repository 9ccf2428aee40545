#include "common/kernel.h"

namespace scm {

CpuLevel cpu_level() {
#ifdef SCM_OPS_X86_LEVELS
  static const CpuLevel level = [] {
    __builtin_cpu_init();
    const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
                    __builtin_cpu_supports("f16c") && __builtin_cpu_supports("lzcnt") && __builtin_cpu_supports("movbe");
    const bool v4 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    return v3 && v4 ? CpuLevel::v4 : v3 ? CpuLevel::v3 : CpuLevel::generic;
  }();
  return level;
#else
  return CpuLevel::generic;
#endif
}

}  // namespace scm
