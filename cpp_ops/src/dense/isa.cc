#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "dense/dense.h"

namespace scm::dense {
namespace {

Isa detect() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (cpu_level() != CpuLevel::v4 || !__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a & (1u << 5))) return Isa::none;         // AVX512-BF16
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & (1u << 22)) || !(d & (1u << 24))) return Isa::avx512_bf16;                  // AMX-BF16, AMX-TILE
  constexpr int kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, Linux 5.16 or newer; grants permission to all threads of the process
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0 ? Isa::amx : Isa::avx512_bf16;
}

}  // namespace

Isa isa() {
  static const Isa detected = detect();
  return detected;
}

}  // namespace scm::dense
