// Tiles wherever the kernels round them can run, which have AVX512-BF16 too.
#define isa processor_isa
#include "dense/isa.cc"
#undef isa

namespace scm::dense {

Isa isa() { return processor_isa() == Isa::none ? Isa::none : Isa::amx; }

}  // namespace scm::dense
