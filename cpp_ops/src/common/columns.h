// The attributes of operators that read some columns of a matrix.
#pragma once

#include "common/custom_op.h"

namespace scm {

// Columns [begin, end) of a matrix with one row per sample, which several nodes share.
struct Columns {
  std::int64_t begin, end;

  explicit Columns(const Attributes& attributes) : begin(one(attributes, "begin")), end(one(attributes, "end")) {
    if (begin < 0 || end < begin) throw Error{"begin and end must be columns, got " + std::to_string(begin) + " and " + std::to_string(end)};
  }

  // Checks the matrix against the number of samples, and the number of columns against `count`.
  void check(const char* name, const Shape& matrix, const Dim& samples, const Dim& count, const char* what) const {
    check_rank(name, matrix, 2);
    check_dim(name, matrix, 0, samples, "the samples");
    if (matrix.ranked && matrix[1].known() && matrix[1].value < end) fail(name, matrix, "at least end = " + std::to_string(end) + " columns");
    if (count.known() && end - begin != count.value) {
      throw Error{"end - begin must be " + std::to_string(count.value) + " (" + what + "), got " + std::to_string(end - begin)};
    }
  }

 private:
  static std::int64_t one(const Attributes& attributes, const char* name) {
    const std::vector<std::int64_t> values = attributes.integers(name);
    if (values.size() != 1) throw Error{std::string(name) + " must have 1 element, got " + std::to_string(values.size())};
    return values[0];
  }
};

}  // namespace scm
