// Partially known shapes and their validation. The same code runs at shape inference, when a session is created, and in kernels.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace scm {

// An invalid input or attribute of a node. Thrown inside the library; `guarded` converts it to an OrtStatus.
struct Error {
  std::string reason;
};

struct Dim {
  std::int64_t value = -1;       // -1 if unknown
  const char* symbol = nullptr;  // name of a symbolic dimension, or null; owned by ONNX Runtime

  bool known() const { return value >= 0; }
};

// A tensor's shape. `ranked` is false if the number of axes is unknown.
struct Shape {
  std::vector<Dim> dims;
  bool ranked = true;

  std::size_t rank() const { return dims.size(); }
  const Dim& operator[](std::size_t i) const { return dims[i]; }
  const Dim& back() const { return dims.back(); }
};

std::string to_string(const Shape& shape);

// Returns a + b, which is unknown if either is unknown.
Dim sum(const Dim& a, const Dim& b);

// The checks throw Error with `name`, the expectation and the actual shape. Unknown ranks and dimensions pass.
void check_rank(const char* name, const Shape& shape, std::size_t rank);
void check_rank_at_least(const char* name, const Shape& shape, std::size_t rank);
void check_same(const char* name_a, const Shape& a, const char* name_b, const Shape& b);
// The size of `axis` must be `expected`; `what` describes it: check_dim("scale", scale, 1, y.back(), "the channels of y").
void check_dim(const char* name, const Shape& shape, std::size_t axis, const Dim& expected, const char* what);
void check_has_channels(const char* name, const Shape& shape);  // the last axis must not be empty
[[noreturn]] void fail(const char* name, const Shape& shape, const std::string& expected);

// Returns the product of the sizes of axes [first_axis, end_axis). All sizes must be known, as they are in kernels.
std::int64_t elements(const Shape& shape, std::size_t first_axis, std::size_t end_axis);
inline std::int64_t elements(const Shape& shape) { return elements(shape, 0, shape.rank()); }

}  // namespace scm
