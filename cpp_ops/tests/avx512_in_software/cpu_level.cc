// In place of common/cpu_level.cc: a processor with AVX-512.
#include "common/cpu_level.h"

#include "common/kernel.h"

namespace scm {

MaxIsa max_isa() { return MaxIsa::amx; }
void check_max_isa() {}
CpuLevel cpu_level() { return CpuLevel::v4; }

}  // namespace scm
