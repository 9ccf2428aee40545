// Tiles wherever the kernels round them can run, which have AVX512-BF16 too.
#define units processor_units
#include "products/units.cc"
#undef units

namespace scm::products {

Units units() { return processor_units() == Units::none ? Units::none : Units::tiles; }

}  // namespace scm::products
