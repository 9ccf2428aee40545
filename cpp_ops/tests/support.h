// Helpers for the operator tests: element types, tensors, sizes, and comparisons with references in double.
#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "common/kernel.h"
#include "fake_ort.h"

namespace scm::testing {

using fake_ort::Attributes;
using fake_ort::Options;
using fake_ort::Outcome;
using fake_ort::Spec;
using fake_ort::Tensor;
using fake_ort::Threads;
using Values = std::vector<double>;
using Sizes = std::vector<std::int64_t>;

constexpr auto kFloat = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
constexpr auto kHalf = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
constexpr auto kInt64 = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;
constexpr auto kUint8 = ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8;

// -- Element types ----------------------------------------------------------------------------------------------------

using Elements = ::testing::Types<float, float16>;

struct ElementNames {
  template <typename T>
  static std::string GetName(int) {
    return sizeof(T) == 2 ? "float16" : "float";
  }
};

template <typename T>
constexpr ONNXTensorElementDataType kType = kFloat;
template <>
inline constexpr ONNXTensorElementDataType kType<float16> = kHalf;
template <>
inline constexpr ONNXTensorElementDataType kType<std::int64_t> = kInt64;
template <>
inline constexpr ONNXTensorElementDataType kType<std::uint8_t> = kUint8;

// Conversions of float16 by its definition, independent of the library's.
double half_to_double(std::uint16_t bits);
std::uint16_t double_to_half(double x);  // ties to even

// -- Tensors ----------------------------------------------------------------------------------------------------------

std::int64_t elements(const Sizes& shape);
std::string text(const Sizes& shape);

Tensor tensor(ONNXTensorElementDataType type, const Sizes& shape, const Values& values);
Tensor scalar(float value);
Tensor integers(const Sizes& shape, const std::vector<std::int64_t>& values);
Tensor empty_like(ONNXTensorElementDataType type, const Sizes& shape);  // an output for a kernel, filled with implausible values
// Returns normally distributed values, the same for the same shape and seed.
Tensor random(ONNXTensorElementDataType type, const Sizes& shape, double scale = 1, unsigned seed = 0);
Tensor slice(const Tensor& tensor, std::int64_t begin, std::int64_t end);  // along the first axis
Values values(const Tensor& tensor);

template <typename T>
T* data(Tensor& tensor) {
  EXPECT_EQ(tensor.type, kType<T>);
  return reinterpret_cast<T*>(tensor.bytes.data());
}

template <typename T>
const T* data(const Tensor& tensor) {
  EXPECT_EQ(tensor.type, kType<T>);
  return reinterpret_cast<const T*>(tensor.bytes.data());
}

// -- Sizes ------------------------------------------------------------------------------------------------------------

inline const std::vector<std::int64_t> kChannels{1, 3, 7, 64, 65, 448};

// Returns shapes [N, ..., C] with batches of 0, 1 and 3, and zero to two spatial axes, some of them empty.
std::vector<Sizes> feature_maps(std::int64_t channels);

// -- References and comparisons -----------------------------------------------------------------------------------------

double mp_silu(double x);
Values mp_silu(const Values& x);
// x consists of rows of `channels` values.
Values pixel_norm(const Values& x, std::int64_t channels, double eps);

// The tolerance is one rounding to the tensor's type, plus a relative 2e-6, plus `absolute`. NaN equals NaN.
void expect_close(const Tensor& actual, const Sizes& shape, const Values& expected, double absolute = 1e-20);
void expect_same_bits(const Tensor& actual, const Tensor& expected);

// Expects the operator to reject these inputs, both at shape inference and when it runs, with an error that contains its name and all of `fragments`.
void expect_rejected(const std::string& op, const std::vector<Tensor>& inputs, const Attributes& attributes, const std::vector<std::string>& fragments);
// Same for a scalar, which shape inference cannot distinguish from a tensor of unknown rank: only the run is rejected.
void expect_scalar_rejected(const std::string& op, const std::vector<Tensor>& inputs, const Attributes& attributes, const std::vector<std::string>& fragments);

// Returns the shapes that the operator infers, "?" for an unknown shape.
std::vector<std::string> inferred(const std::string& op, const std::vector<Spec>& inputs, const Attributes& attributes, std::size_t outputs = 1);

// Expects the same bits with output 0 in place of each input that GetMayInplace permits, with the pieces in reversed order, on several threads, and for each
// sample alone instead of in its batch. Inputs whose first axis has another size than the batch belong to all samples.
void expect_reproducible(const std::string& op, const std::vector<Tensor>& inputs, const Attributes& attributes, std::size_t outputs = 1);

inline Options with_outputs(std::vector<bool> outputs) {
  Options options;
  options.outputs = std::move(outputs);
  return options;
}

// -- Kernels of the individual x86-64 levels ------------------------------------------------------------------------------

// Returns an operator's kernels for the levels that this processor supports. Use: SCM_LEVELS(pixel_norm, float).
template <typename Params>
std::vector<std::pair<const char*, CpuKernel<Params>>> supported(const std::vector<CpuKernel<Params>>& kernels) {
  static constexpr const char* kNames[] = {"generic", "v3", "v4"};
  std::vector<std::pair<const char*, CpuKernel<Params>>> levels;
  for (std::size_t i = 0; i < kernels.size() && i <= static_cast<std::size_t>(cpu_level()); ++i) levels.emplace_back(kNames[i], kernels[i]);
  return levels;
}

#ifdef SCM_OPS_X86_LEVELS
#define SCM_LEVELS(op, T) ::scm::testing::supported<op::Params<T>>({op::cpu_generic<T>, op::cpu_v3<T>, op::cpu_v4<T>})
#else
#define SCM_LEVELS(op, T) ::scm::testing::supported<op::Params<T>>({op::cpu_generic<T>})
#endif

using Cuts = std::vector<std::int64_t>;

// Runs a kernel piecewise between the cuts, the last piece first.
template <typename Params>
void run_in_pieces(CpuKernel<Params> kernel, const Params& params, const Cuts& cuts) {
  for (std::size_t i = cuts.size() - 1; i > 0; --i) kernel(params, cuts[i - 1], cuts[i]);
}

}  // namespace scm::testing
