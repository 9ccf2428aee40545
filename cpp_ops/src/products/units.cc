#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "products/product.h"

namespace scm::products {
namespace {

Units found() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (cpu_level() != CpuLevel::v4 || !__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a & (1u << 5))) return Units::none;         // AVX512-BF16
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & (1u << 22)) || !(d & (1u << 24))) return Units::dots;                  // AMX-BF16, AMX-TILE
  constexpr int kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, of Linux 5.16; for all threads of the process
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0 ? Units::tiles : Units::dots;
}

}  // namespace

Units units() {
  static const Units are = found();
  return are;
}

}  // namespace scm::products
