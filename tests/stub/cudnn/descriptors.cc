#include "descriptors.h"

#include <cstring>

namespace stub {
namespace {

template <typename T>
T element(const Value& value, std::int64_t index) {
  T found;
  std::memcpy(&found, value.bytes.data() + static_cast<size_t>(index) * sizeof found, sizeof found);
  return found;
}

std::string describe_tensor(const Descriptor* tensor) {
  if (tensor == nullptr) return "none";
  const auto dimensions = tensor->numbers(CUDNN_ATTR_TENSOR_DIMENSIONS), strides = tensor->numbers(CUDNN_ATTR_TENSOR_STRIDES);
  std::string text = join(dimensions) + " " + name_of(tensor->enumerator(CUDNN_ATTR_TENSOR_DATA_TYPE));
  if (dimensions.size() >= 4) text += strides[1] == 1 && (dimensions[1] > 1 || strides[3] == dimensions[1]) ? " NHWC" : " NCHW";
  const Value* is_virtual = tensor->find(CUDNN_ATTR_TENSOR_IS_VIRTUAL);
  return text + (is_virtual != nullptr && is_virtual->bytes[0] != 0 ? " virtual" : "");
}

std::string describe_operation(const Descriptor* operation) {
  const auto tensor = [&](int attribute) { return describe_tensor(operation->descriptor(attribute)); };
  switch (operation->type) {
    case CUDNN_BACKEND_OPERATION_CONVOLUTION_FORWARD_DESCRIPTOR: {
      const Descriptor* convolution = operation->descriptor(CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_CONV_DESC);
      const int compute = convolution == nullptr ? -1 : convolution->enumerator(CUDNN_ATTR_CONVOLUTION_COMP_TYPE);
      return "conv x=" + tensor(CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_X) + " w=" + tensor(CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_W) +
             " y=" + tensor(CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_Y) + " compute=" + name_of(compute);
    }
    case CUDNN_BACKEND_OPERATION_POINTWISE_DESCRIPTOR: {
      const Descriptor* pointwise = operation->descriptor(CUDNN_ATTR_OPERATION_POINTWISE_PW_DESCRIPTOR);
      const int mode = pointwise == nullptr ? -1 : pointwise->enumerator(CUDNN_ATTR_POINTWISE_MODE);
      return "pointwise mode=" + std::to_string(mode) + " x=" + tensor(CUDNN_ATTR_OPERATION_POINTWISE_XDESC) +
             " b=" + tensor(CUDNN_ATTR_OPERATION_POINTWISE_BDESC) + " y=" + tensor(CUDNN_ATTR_OPERATION_POINTWISE_YDESC);
    }
    default: return "operation " + std::to_string(operation->type);
  }
}

}  // namespace

const Value* Descriptor::find(int attribute) const {
  const auto found = values_.find(attribute);
  return found == values_.end() ? nullptr : &found->second;
}

void Descriptor::set(int attribute, cudnnBackendAttributeType_t type, std::int64_t count, const void* elements) {
  const char* bytes = static_cast<const char*>(elements);
  values_[attribute] = {count, {bytes, bytes + static_cast<size_t>(count) * size_of(type)}};
}

Descriptor* Descriptor::descriptor(int attribute, std::int64_t index) const {
  const Value* value = find(attribute);
  return value == nullptr || index >= value->count ? nullptr : element<Descriptor*>(*value, index);
}

std::vector<std::int64_t> Descriptor::numbers(int attribute) const {
  std::vector<std::int64_t> numbers;
  if (const Value* value = find(attribute)) {
    for (std::int64_t i = 0; i < value->count; ++i) numbers.push_back(element<std::int64_t>(*value, i));
  }
  return numbers;
}

int Descriptor::enumerator(int attribute) const {
  const Value* value = find(attribute);
  return value == nullptr ? -1 : element<int>(*value, 0);
}

size_t size_of(cudnnBackendAttributeType_t type) {
  switch (type) {
    case CUDNN_TYPE_HANDLE:
    case CUDNN_TYPE_VOID_PTR:
    case CUDNN_TYPE_INT64:
    case CUDNN_TYPE_DOUBLE:
    case CUDNN_TYPE_BACKEND_DESCRIPTOR: return 8;
    case CUDNN_TYPE_BOOLEAN:
    case CUDNN_TYPE_CHAR: return 1;
    case CUDNN_TYPE_FRACTION: return 16;
    default: return 4;  // enumerators, int32 and float
  }
}

std::string join(const std::vector<std::int64_t>& dimensions) {
  std::string text;
  for (const std::int64_t size : dimensions) text += (text.empty() ? "" : "x") + std::to_string(size);
  return text;
}

const char* name_of(int dtype) {
  switch (dtype) {
    case CUDNN_DATA_FLOAT: return "fp32";
    case CUDNN_DATA_DOUBLE: return "fp64";
    case CUDNN_DATA_HALF: return "fp16";
    case CUDNN_DATA_BFLOAT16: return "bf16";
    default: return "other";
  }
}

std::string describe_graph(const Descriptor* graph) {
  const Value* operations = graph == nullptr ? nullptr : graph->find(CUDNN_ATTR_OPERATIONGRAPH_OPS);
  if (operations == nullptr) return "no operations";
  std::string text;
  for (std::int64_t i = 0; i < operations->count; ++i) {
    text += (i > 0 ? " + " : "") + describe_operation(graph->descriptor(CUDNN_ATTR_OPERATIONGRAPH_OPS, i));
  }
  return text;
}

}  // namespace stub
