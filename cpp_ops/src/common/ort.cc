#include "common/ort.h"

#include <algorithm>
#include <array>
#include <memory>
#include <thread>

namespace scm {

void check(const OrtApi& api, OrtStatus* status) {
  if (!status) return;
  Error error{api.GetErrorMessage(status)};
  api.ReleaseStatus(status);
  throw error;
}

std::int64_t hardware_threads() {
  static const std::int64_t threads = std::max(1u, std::thread::hardware_concurrency());  // 0 if it is unknown
  return threads;
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
  std::vector<std::int64_t> values(64);  // no tensor has more axes
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

Scratch::Scratch(const OrtApi& api, const OrtKernelContext* context, std::size_t bytes) : api_(api) {
  constexpr std::size_t kAlignment = 64;
  OrtMemoryInfo* where = nullptr;
  check(api, api.CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &where));
  const std::unique_ptr<OrtMemoryInfo, decltype(api.ReleaseMemoryInfo)> owner(where, api.ReleaseMemoryInfo);
  check(api, api.KernelContext_GetAllocator(context, where, &allocator_));
  if (OrtStatus* status = api.AllocatorAlloc(allocator_, bytes + kAlignment, &allocated_)) {
    api.ReleaseAllocator(allocator_);
    check(api, status);
  }
  data_ = static_cast<char*>(allocated_) + (kAlignment - reinterpret_cast<std::uintptr_t>(allocated_) % kAlignment) % kAlignment;
}

Scratch::~Scratch() {
  if (OrtStatus* status = api_.AllocatorFree(allocator_, allocated_)) api_.ReleaseStatus(status);
  api_.ReleaseAllocator(allocator_);
}

Memory::~Memory() {
  if (!data_) return;
  if (OrtStatus* status = allocator_->api_.AllocatorFree(allocator_->allocator_, data_)) allocator_->api_.ReleaseStatus(status);
}

Allocator::Allocator(const OrtApi& api, const OrtKernelInfo* info) : api_(api) { check(api, api.KernelInfoGetAllocator(info, OrtMemTypeDefault, &allocator_)); }

Memory Allocator::allocate(std::size_t bytes) const {
  void* data = nullptr;
  check(api_, api_.AllocatorAlloc(allocator_, bytes, &data));
  return {*this, data};
}

Memory Allocator::allocate(const OrtKernelContext* context, std::size_t bytes) const {
  const OrtMemoryInfo* where = nullptr;
  check(api_, api_.AllocatorGetInfo(allocator_, &where));
  void* data = nullptr;
  check(api_, api_.KernelContext_GetScratchBuffer(context, where, bytes, &data));
  return {*this, data};
}

std::unique_ptr<Allocator> Attributes::allocator() const { return info_ ? std::make_unique<Allocator>(api_, info_) : nullptr; }

namespace {

Input read_tensor(const OrtApi& api, const OrtValue* value) {
  OrtTensorTypeAndShapeInfo* info = nullptr;
  check(api, api.GetTensorTypeAndShape(value, &info));
  struct Release {
    const OrtApi& api;
    OrtTensorTypeAndShapeInfo* info;
    ~Release() { api.ReleaseTensorTypeAndShapeInfo(info); }
  } release{api, info};
  std::size_t rank = 0;
  check(api, api.GetDimensionsCount(info, &rank));
  std::array<std::int64_t, 64> sizes;
  if (rank > sizes.size()) throw Error{"a tensor of " + std::to_string(rank) + " axes is not supported"};
  check(api, api.GetDimensions(info, sizes.data(), rank));
  Input input;
  check(api, api.GetTensorElementType(info, &input.type));
  input.shape.dims.resize(rank);
  for (std::size_t i = 0; i < rank; ++i) input.shape.dims[i].value = sizes[i];
  void* data = nullptr;
  check(api, api.GetTensorMutableData(const_cast<OrtValue*>(value), &data));  // API 18 has no getter for const data
  input.data = data;
  return input;
}

}  // namespace

Input Attributes::constant(std::size_t input) const {
  const OrtValue* value = nullptr;
  int is_constant = 0;
  if (info_) check(api_, api_.KernelInfoGetConstantInput_tensor(info_, input, &is_constant, &value));
  return is_constant ? read_tensor(api_, value) : Input{{{}, false}, nullptr, ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED};
}

Input Context::input(std::size_t index) const {
  const OrtValue* value = nullptr;
  check(api_, api_.KernelContext_GetInput(context_, index, &value));
  return read_tensor(api_, value);
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
