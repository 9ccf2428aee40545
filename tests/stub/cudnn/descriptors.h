// Descriptors of cuDNN's backend interface, and the text of what they describe.
#pragma once

#include <cuda.h>
#include <cudnn.h>

#include <map>
#include <string>
#include <vector>

#define STUB_CUDNN(name) extern "C" __attribute__((visibility("default"))) cudnnStatus_t name

extern "C" CUresult scm_stub_operation(CUstream stream, const char* description);
extern "C" void scm_stub_say(const char* kind, const char* text);
extern "C" int scm_stub_unknown(const char* function);

namespace stub {

struct Handle {
  CUstream stream;
};

struct Value {
  std::int64_t count;
  std::vector<char> bytes;
};

class Descriptor {
 public:
  explicit Descriptor(cudnnBackendDescriptorType_t type) : type(type) {}

  cudnnBackendDescriptorType_t type;
  const Value* find(int attribute) const;
  void set(int attribute, cudnnBackendAttributeType_t type, std::int64_t count, const void* elements);
  // The attribute as descriptors, 64-bit numbers or an enumerator; nullptr, nothing or -1 if it is not set.
  Descriptor* descriptor(int attribute, std::int64_t index = 0) const;
  std::vector<std::int64_t> numbers(int attribute) const;
  int enumerator(int attribute) const;

 private:
  std::map<int, Value> values_;
};

size_t size_of(cudnnBackendAttributeType_t type);  // of an element, bytes
std::string join(const std::vector<std::int64_t>& dimensions);  // "1x64x32x32"
const char* name_of(int dtype);                                  // of a cudnnDataType_t
std::string describe_graph(const Descriptor* graph);

}  // namespace stub
