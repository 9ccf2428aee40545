#include "common/rows.h"
#include "pixel_norm/op.h"

namespace scm::pixel_norm {

template <typename T>
void SCM_CPU(const Params<T>& p, std::int64_t begin, std::int64_t end) {
  for (std::int64_t row = begin; row < end; ++row) {
    const std::int64_t start = row * p.channels;
    scale_row(p.x + start, p.y + start, p.activated ? p.activated + start : nullptr, p.channels, row_norm_factor(p.x + start, p.channels, p.eps));
  }
}
SCM_INSTANTIATE_CPU

}  // namespace scm::pixel_norm
