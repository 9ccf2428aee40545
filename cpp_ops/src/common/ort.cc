#include "common/ort.h"

#include <array>

namespace scm {

void check(const OrtApi& api, OrtStatus* status) {
  if (!status) return;
  Error error{api.GetErrorMessage(status)};
  api.ReleaseStatus(status);
  throw error;
}

void Attributes::read(const char* name, OrtOpAttrType type, void* data, std::size_t bytes, std::size_t* got) const {
  const OrtOpAttr* attribute = nullptr;
  check(api_, api_.ShapeInferContext_GetAttribute(context_, name, &attribute));
  check(api_, api_.ReadOpAttr(attribute, type, data, bytes, got));
}

float Attributes::real(const char* name) const {
  float value = 0;
  std::size_t got = 0;
  if (context_) {
    read(name, ORT_OP_ATTR_FLOAT, &value, sizeof value, &got);
  } else {
    check(api_, api_.KernelInfoGetAttribute_float(info_, name, &value));
  }
  return value;
}

std::int64_t Attributes::integer(const char* name) const {
  std::int64_t value = 0;
  std::size_t got = 0;
  if (context_) {
    read(name, ORT_OP_ATTR_INT, &value, sizeof value, &got);
  } else {
    check(api_, api_.KernelInfoGetAttribute_int64(info_, name, &value));
  }
  return value;
}

std::vector<std::int64_t> Attributes::integers(const char* name) const {
  std::vector<std::int64_t> values(64);  // as many axes as any tensor has
  std::size_t got = 0;
  if (context_) {
    read(name, ORT_OP_ATTR_INTS, values.data(), values.size() * sizeof values[0], &got);
    got /= sizeof values[0];
  } else {
    got = values.size();
    check(api_, api_.KernelInfoGetAttributeArray_int64(info_, name, values.data(), &got));
  }
  values.resize(got);
  return values;
}

Input Context::input(std::size_t index) const {
  const OrtValue* value = nullptr;
  check(api_, api_.KernelContext_GetInput(context_, index, &value));
  OrtTensorTypeAndShapeInfo* info = nullptr;
  check(api_, api_.GetTensorTypeAndShape(value, &info));
  struct Release {
    const OrtApi& api;
    OrtTensorTypeAndShapeInfo* info;
    ~Release() { api.ReleaseTensorTypeAndShapeInfo(info); }
  } release{api_, info};
  std::size_t rank = 0;
  check(api_, api_.GetDimensionsCount(info, &rank));
  std::array<std::int64_t, 64> sizes;
  if (rank > sizes.size()) throw Error{"a tensor of " + std::to_string(rank) + " axes is not supported"};
  check(api_, api_.GetDimensions(info, sizes.data(), rank));
  Input input;
  input.shape.dims.resize(rank);
  for (std::size_t i = 0; i < rank; ++i) input.shape.dims[i].value = sizes[i];
  void* data = nullptr;
  check(api_, api_.GetTensorMutableData(const_cast<OrtValue*>(value), &data));  // there is no getter for constant data in this API version
  input.data = data;
  return input;
}

void* Context::raw_output(std::size_t index, const Shape& shape) {
  std::size_t count = 0;
  check(api_, api_.KernelContext_GetOutputCount(context_, &count));
  if (index >= count) return nullptr;
  std::array<std::int64_t, 64> sizes;
  if (shape.rank() > sizes.size()) throw Error{"a tensor of " + std::to_string(shape.rank()) + " axes is not supported"};
  for (std::size_t i = 0; i < shape.rank(); ++i) sizes[i] = shape[i].value;
  OrtValue* value = nullptr;
  check(api_, api_.KernelContext_GetOutput(context_, index, sizes.data(), shape.rank(), &value));
  if (!value) return nullptr;
  void* data = nullptr;
  check(api_, api_.GetTensorMutableData(value, &data));
  return data;
}

void* Context::cuda_stream() const {
  void* stream = nullptr;
  check(api_, api_.KernelContext_GetGPUComputeStream(context_, &stream));
  return stream;
}

void Context::parallel_for(void (*run)(void*, std::size_t), std::size_t pieces, void* data) const {
  check(api_, api_.KernelContext_ParallelFor(context_, run, pieces, 0, data));
}

}  // namespace scm
