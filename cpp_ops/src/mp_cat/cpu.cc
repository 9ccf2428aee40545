#include "common/rows.h"
#include "mp_cat/op.h"

namespace scm::mp_cat {

template <typename T>
void SCM_CPU(const Params<T>& p, std::int64_t begin, std::int64_t end) {
  for (std::int64_t row = begin; row < end; ++row) {
    const std::int64_t offset = row * (p.channels_a + p.channels_b);
    T* activated = p.activated ? p.activated + offset : nullptr;
    scale_row(p.a + row * p.channels_a, p.y + offset, activated, p.channels_a, p.scale_a);
    scale_row(p.b + row * p.channels_b, p.y + offset + p.channels_a, activated ? activated + p.channels_a : nullptr, p.channels_b, p.scale_b);
  }
}
SCM_INSTANTIATE_CPU

}  // namespace scm::mp_cat
