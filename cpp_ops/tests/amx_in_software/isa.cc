// Replaces isa(): reports AMX if the processor has AVX512-BF16, which the code around the tiles requires.
#define isa processor_isa
#include "dense/isa.cc"
#undef isa

namespace scm::dense {

Isa isa() { return processor_isa() == Isa::none ? Isa::none : Isa::amx; }

}  // namespace scm::dense
