#include "common/shape.h"

namespace scm {

std::string to_string(const Shape& shape) {
  if (!shape.ranked) return "[?]";
  std::string text = "[";
  for (const Dim& dim : shape.dims) {
    if (text.size() > 1) text += ", ";
    text += dim.known() ? std::to_string(dim.value) : dim.symbol && *dim.symbol ? dim.symbol : "?";
  }
  return text + "]";
}

Dim sum(const Dim& a, const Dim& b) { return a.known() && b.known() ? Dim{a.value + b.value} : Dim{}; }

void fail(const char* name, const Shape& shape, const std::string& expected) {
  throw Error{std::string(name) + " must have " + expected + ", got the shape " + to_string(shape)};
}

void check_rank(const char* name, const Shape& shape, std::size_t rank) {
  if (shape.ranked && shape.rank() != rank) fail(name, shape, std::to_string(rank) + (rank == 1 ? " axis" : " axes"));
}

void check_rank_at_least(const char* name, const Shape& shape, std::size_t rank) {
  if (shape.ranked && shape.rank() < rank) fail(name, shape, "at least " + std::to_string(rank) + (rank == 1 ? " axis" : " axes"));
}

void check_same(const char* name_a, const Shape& a, const char* name_b, const Shape& b) {
  if (!a.ranked || !b.ranked) return;
  bool same = a.rank() == b.rank();
  for (std::size_t i = 0; same && i < a.rank(); ++i) same = !a[i].known() || !b[i].known() || a[i].value == b[i].value;
  if (!same) fail(name_b, b, std::string("the shape of ") + name_a + ", " + to_string(a));
}

void check_dim(const char* name, const Shape& shape, std::size_t axis, const Dim& expected, const char* what) {
  if (!shape.ranked || axis >= shape.rank()) return;
  const Dim& dim = shape[axis];
  if (dim.known() && expected.known() && dim.value != expected.value) {
    fail(name, shape, std::to_string(expected.value) + " (" + what + ") on axis " + std::to_string(axis));
  }
}

void check_has_channels(const char* name, const Shape& shape) {
  if (shape.ranked && shape.rank() > 0 && shape.back().value == 0) fail(name, shape, "at least 1 channel");
}

std::int64_t elements(const Shape& shape, std::size_t first_axis, std::size_t end_axis) {
  std::int64_t count = 1;
  for (std::size_t i = first_axis; i < end_axis; ++i) count *= shape[i].value;
  return count;
}

}  // namespace scm
