#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "common/cpu_level.h"
#include "dense/dense.h"

namespace scm::dense {
namespace {

Isa detect() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  const bool has_avx512_bf16 = cpu_level() == CpuLevel::v4 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && a & (1u << 5);
  if (!has_avx512_bf16 || max_isa() < MaxIsa::avx512_bf16) return Isa::none;
  const bool has_amx = __get_cpuid_count(7, 0, &a, &b, &c, &d) && d & (1u << 22) && d & (1u << 24);  // AMX-BF16, AMX-TILE
  if (!has_amx || max_isa() < MaxIsa::amx) return Isa::avx512_bf16;
  constexpr int kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, Linux 5.16 or newer; grants permission to all threads of the process
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0 ? Isa::amx : Isa::avx512_bf16;
}

}  // namespace

Isa isa() {
  static const Isa detected = detect();
  return detected;
}

}  // namespace scm::dense
