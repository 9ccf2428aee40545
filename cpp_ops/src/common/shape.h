// Shapes that may be known in part, and the checks on them: the same code runs when a session is opened (shape inference) and when a kernel runs.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace scm {

// What is wrong with a node's inputs or attributes. Thrown inside the library, turned into an OrtStatus at its border.
struct Error {
  std::string reason;
};

struct Dim {
  std::int64_t value = -1;       // -1 while unknown
  const char* symbol = nullptr;  // the name an unknown size goes by, if it has one; belongs to ONNX Runtime

  bool known() const { return value >= 0; }
};

// A tensor's shape; `ranked` is false where not even the number of axes is known.
struct Shape {
  std::vector<Dim> dims;
  bool ranked = true;

  std::size_t rank() const { return dims.size(); }
  const Dim& operator[](std::size_t i) const { return dims[i]; }
  const Dim& back() const { return dims.back(); }
};

std::string to_string(const Shape& shape);

// One more than, or a multiple of, what is not known is not known.
Dim sum(const Dim& a, const Dim& b);

// The checks throw Error with `name`, what was got, and what was expected. What is unknown passes.
void check_rank(const char* name, const Shape& shape, std::size_t rank);
void check_rank_at_least(const char* name, const Shape& shape, std::size_t rank);
void check_same(const char* name_a, const Shape& a, const char* name_b, const Shape& b);
// `a`'s axis must have the size `expected`, described by `what`: check_dim("scale", scale, 1, y.back(), "the channels of y").
void check_dim(const char* name, const Shape& shape, std::size_t axis, const Dim& expected, const char* what);
void check_has_channels(const char* name, const Shape& shape);  // the last axis must not be empty
[[noreturn]] void fail(const char* name, const Shape& shape, const std::string& expected);

// For kernels, where every size is known.
std::int64_t elements(const Shape& shape, std::size_t first_axis, std::size_t end_axis);
inline std::int64_t elements(const Shape& shape) { return elements(shape, 0, shape.rank()); }

}  // namespace scm
