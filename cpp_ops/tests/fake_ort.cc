#include "fake_ort.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <sstream>
#include <set>
#include <thread>

extern "C" OrtStatus* ORT_API_CALL RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base);

// Definitions of the C API's opaque types.

struct OrtStatus {
  OrtErrorCode code;
  std::string text;
};

struct OrtTensorTypeAndShapeInfo {
  ONNXTensorElementDataType type = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
  std::vector<std::int64_t> sizes;
  std::vector<std::string> symbols;
  bool borrowed = false;  // owned by a context: the library must not release it
};

struct OrtValue {
  ONNXTensorElementDataType type;
  std::vector<std::int64_t> shape;
  std::byte* data;
};

struct OrtOpAttr {
  fake_ort::Attribute value;
};

struct OrtKernelInfo {
  const fake_ort::Attributes& attributes;
  std::vector<OrtValue> constants;  // one per input; no data if the input is not constant
};

struct OrtMemoryInfo {};

struct OrtShapeInferContext {
  std::map<std::string, OrtOpAttr> attributes;
  std::vector<std::unique_ptr<OrtTensorTypeAndShapeInfo>> inputs;  // null if nothing is known
  std::vector<std::unique_ptr<OrtTensorTypeAndShapeInfo>> outputs;
};

struct OrtKernelContext {
  const OrtCustomOp& op;
  const fake_ort::Options& options;
  std::vector<OrtValue> inputs;
  std::vector<std::vector<std::byte>*> input_bytes;
  std::vector<OrtValue> outputs;
  std::vector<std::vector<std::byte>> output_bytes;
  mutable std::size_t pieces = 0;
};

struct OrtCustomOpDomain {
  std::string name;
  std::vector<const OrtCustomOp*> ops;
};

struct OrtSessionOptions {
  std::map<std::string, std::string> entries;
  std::vector<const OrtCustomOpDomain*> domains;
};

namespace fake_ort {
namespace {

// Thread-local, so that the fake does not synchronize threads, which would hide data races of the library from ThreadSanitizer.
thread_local int live = 0;
thread_local int calls_before_failure = kNever;
std::atomic<int> domains{0};

OrtStatus* ORT_API_CALL create_status(OrtErrorCode code, const char* text) noexcept {
  ++live;
  return new OrtStatus{code, text};
}

const char* ORT_API_CALL error_message(const OrtStatus* status) noexcept { return status->text.c_str(); }

void ORT_API_CALL release_status(OrtStatus* status) noexcept {
  if (status) --live;
  delete status;
}

OrtStatus* failure(const std::string& text) { return create_status(ORT_FAIL, text.c_str()); }

constexpr char kInjectedFailure[] = "injected failure";

// Every API function that can fail starts with MAYBE_FAIL.
OrtStatus* injected_failure() {
  if (calls_before_failure == kNever) return nullptr;
  return calls_before_failure-- == 0 ? failure(kInjectedFailure) : nullptr;
}

#define MAYBE_FAIL                                 \
  do {                                                  \
    if (OrtStatus* status = injected_failure()) return status;   \
  } while (false)

// Makes one API call of this thread fail, as long as the object exists.
class InjectFailure {
 public:
  explicit InjectFailure(int call) { calls_before_failure = call; }
  ~InjectFailure() { calls_before_failure = kNever; }
};

std::string take(OrtStatus* status) {
  if (!status) return "";
  std::string text = status->text;
  EXPECT_FALSE(text.empty()) << "an error without a message";
  release_status(status);
  return text;
}

std::size_t width(ONNXTensorElementDataType type) {
  switch (type) {
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8:
      return 1;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16:
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16:
      return 2;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT:
      return 4;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64:
      return 8;
    default:
      ADD_FAILURE() << "element type " << type;
      return 1;
  }
}

// -- Attributes -------------------------------------------------------------------------------------------------------

template <typename Value>
OrtStatus* attribute(const OrtKernelInfo* info, const char* name, const Value** value) {
  const auto found = info->attributes.find(name);
  if (found == info->attributes.end()) return failure(std::string("No attribute with name:'") + name + "'is defined.");
  *value = std::get_if<Value>(&found->second);
  return *value ? nullptr : failure(std::string("Requested attribute: ") + name + " has another type");
}

OrtStatus* ORT_API_CALL attribute_float(const OrtKernelInfo* info, const char* name, float* out) noexcept {
  MAYBE_FAIL;
  const float* value = nullptr;
  OrtStatus* status = attribute(info, name, &value);
  if (!status) *out = *value;
  return status;
}

OrtStatus* ORT_API_CALL attribute_int64(const OrtKernelInfo* info, const char* name, std::int64_t* out) noexcept {
  MAYBE_FAIL;
  const std::int64_t* value = nullptr;
  OrtStatus* status = attribute(info, name, &value);
  if (!status) *out = *value;
  return status;
}

OrtStatus* ORT_API_CALL attribute_int64s(const OrtKernelInfo* info, const char* name, std::int64_t* out, std::size_t* size) noexcept {
  MAYBE_FAIL;
  const std::vector<std::int64_t>* value = nullptr;
  if (OrtStatus* status = attribute(info, name, &value)) return status;
  const std::size_t room = *size;
  *size = value->size();
  if (!out) return nullptr;
  if (room < value->size()) return failure("Result buffer is not large enough");
  std::copy(value->begin(), value->end(), out);
  return nullptr;
}

OrtStatus* ORT_API_CALL constant_input(const OrtKernelInfo* info, std::size_t i, int* is_constant, const OrtValue** out) noexcept {
  MAYBE_FAIL;
  if (i >= info->constants.size()) return failure("input index out of range");
  *is_constant = info->constants[i].data != nullptr;
  *out = *is_constant ? &info->constants[i] : nullptr;
  return nullptr;
}

OrtStatus* ORT_API_CALL inference_attribute(const OrtShapeInferContext* context, const char* name, const OrtOpAttr** out) noexcept {
  MAYBE_FAIL;
  const auto found = context->attributes.find(name);
  if (found == context->attributes.end()) return failure(std::string("Attribute ") + name + " does not exist.");
  *out = &found->second;
  return nullptr;
}

OrtStatus* ORT_API_CALL read_attribute(const OrtOpAttr* attribute, OrtOpAttrType type, void* data, std::size_t room, std::size_t* out) noexcept {
  MAYBE_FAIL;
  const auto copy = [&](const void* from, std::size_t bytes) -> OrtStatus* {
    *out = bytes;
    if (room < bytes) return failure("Size of data not large enough to hold the attribute.");
    if (bytes > 0) std::memcpy(data, from, bytes);
    return nullptr;
  };
  if (const auto* real = std::get_if<float>(&attribute->value); real && type == ORT_OP_ATTR_FLOAT) return copy(real, sizeof *real);
  if (const auto* integer = std::get_if<std::int64_t>(&attribute->value); integer && type == ORT_OP_ATTR_INT) return copy(integer, sizeof *integer);
  if (const auto* integers = std::get_if<std::vector<std::int64_t>>(&attribute->value); integers && type == ORT_OP_ATTR_INTS) {
    return copy(integers->data(), integers->size() * sizeof(std::int64_t));
  }
  return failure("Attribute has no value of this type.");
}

// -- Types and shapes -------------------------------------------------------------------------------------------------

OrtStatus* ORT_API_CALL create_info(OrtTensorTypeAndShapeInfo** out) noexcept {
  MAYBE_FAIL;
  ++live;
  *out = new OrtTensorTypeAndShapeInfo;
  return nullptr;
}

void ORT_API_CALL release_info(OrtTensorTypeAndShapeInfo* info) noexcept {
  if (!info) return;
  EXPECT_FALSE(info->borrowed) << "released an object that is owned by the context";
  if (info->borrowed) return;
  --live;
  delete info;
}

OrtStatus* ORT_API_CALL dimension_count(const OrtTensorTypeAndShapeInfo* info, std::size_t* out) noexcept {
  MAYBE_FAIL;
  *out = info->sizes.size();
  return nullptr;
}

OrtStatus* ORT_API_CALL dimensions(const OrtTensorTypeAndShapeInfo* info, std::int64_t* out, std::size_t count) noexcept {
  MAYBE_FAIL;
  std::copy_n(info->sizes.begin(), std::min(count, info->sizes.size()), out);
  return nullptr;
}

OrtStatus* ORT_API_CALL symbolic_dimensions(const OrtTensorTypeAndShapeInfo* info, const char** out, std::size_t count) noexcept {
  MAYBE_FAIL;
  for (std::size_t i = 0; i < std::min(count, info->symbols.size()); ++i) out[i] = info->symbols[i].c_str();
  return nullptr;
}

OrtStatus* ORT_API_CALL element_type(const OrtTensorTypeAndShapeInfo* info, ONNXTensorElementDataType* out) noexcept {
  MAYBE_FAIL;
  *out = info->type;
  return nullptr;
}

OrtStatus* ORT_API_CALL set_element_type(OrtTensorTypeAndShapeInfo* info, ONNXTensorElementDataType type) noexcept {
  MAYBE_FAIL;
  info->type = type;
  return nullptr;
}

OrtStatus* ORT_API_CALL set_dimensions(OrtTensorTypeAndShapeInfo* info, const std::int64_t* sizes, std::size_t count) noexcept {
  MAYBE_FAIL;
  info->sizes.assign(sizes, sizes + count);
  return nullptr;
}

OrtStatus* ORT_API_CALL set_symbolic_dimensions(OrtTensorTypeAndShapeInfo* info, const char** symbols, std::size_t count) noexcept {
  MAYBE_FAIL;
  info->symbols.assign(symbols, symbols + count);
  return nullptr;
}

OrtStatus* ORT_API_CALL inference_input_count(const OrtShapeInferContext* context, std::size_t* out) noexcept {
  MAYBE_FAIL;
  *out = context->inputs.size();
  return nullptr;
}

OrtStatus* ORT_API_CALL inference_input(const OrtShapeInferContext* context, std::size_t i, OrtTensorTypeAndShapeInfo** out) noexcept {
  MAYBE_FAIL;
  if (i >= context->inputs.size() || !context->inputs[i]) return failure("Failed to fetch type shape info for the index.");
  *out = context->inputs[i].get();
  return nullptr;
}

OrtStatus* ORT_API_CALL set_inference_output(const OrtShapeInferContext* context, std::size_t i, const OrtTensorTypeAndShapeInfo* info) noexcept {
  MAYBE_FAIL;
  if (i >= context->outputs.size()) return failure("the node has no such output");
  *const_cast<OrtShapeInferContext*>(context)->outputs[i] = *info;
  return nullptr;
}

// -- Tensors and threads ----------------------------------------------------------------------------------------------

OrtStatus* ORT_API_CALL get_input(const OrtKernelContext* context, std::size_t i, const OrtValue** out) noexcept {
  MAYBE_FAIL;
  if (i >= context->inputs.size()) return failure("input index out of range");
  *out = &context->inputs[i];
  return nullptr;
}

OrtStatus* ORT_API_CALL output_count(const OrtKernelContext* context, std::size_t* out) noexcept {
  MAYBE_FAIL;
  *out = context->options.outputs.size();
  return nullptr;
}

OrtStatus* ORT_API_CALL get_output(OrtKernelContext* context, std::size_t i, const std::int64_t* sizes, std::size_t rank, OrtValue** out) noexcept {
  MAYBE_FAIL;
  if (i >= context->outputs.size()) return failure("output index out of range");
  if (!context->options.outputs[i]) {
    *out = nullptr;
    return nullptr;
  }
  OrtValue& output = context->outputs[i];
  EXPECT_EQ(output.data, nullptr) << "requested an output twice";
  output.type = context->op.GetOutputType(&context->op, i);
  output.shape.assign(sizes, sizes + rank);
  std::int64_t bytes = static_cast<std::int64_t>(width(output.type));
  for (const std::int64_t size : output.shape) {
    EXPECT_GE(size, 0) << "output " << i << " has an unknown size";
    if (size < 0 || __builtin_mul_overflow(bytes, size, &bytes)) return failure("the shape has a negative size or too many elements");
  }
  static std::byte nothing;
  if (context->options.no_output_memory) {
    output.data = &nothing;
  } else if (bytes > std::int64_t{1} << 30) {
    return failure("cannot allocate " + std::to_string(bytes) + " bytes");
  } else if (i == 0 && context->options.inplace_input >= 0) {
    auto& taken = *context->input_bytes[static_cast<std::size_t>(context->options.inplace_input)];
    EXPECT_EQ(taken.size(), static_cast<std::size_t>(bytes)) << "an in-place output of another size than the input";
    output.data = taken.empty() ? &nothing : taken.data();
  } else {
    context->output_bytes[i].assign(static_cast<std::size_t>(bytes), std::byte{0xa5});  // neither zeros nor a plausible result
    output.data = bytes ? context->output_bytes[i].data() : &nothing;
  }
  *out = &output;
  return nullptr;
}

OrtStatus* ORT_API_CALL type_and_shape(const OrtValue* value, OrtTensorTypeAndShapeInfo** out) noexcept {
  MAYBE_FAIL;
  ++live;
  *out = new OrtTensorTypeAndShapeInfo{value->type, value->shape, std::vector<std::string>(value->shape.size()), false};
  return nullptr;
}

OrtStatus* ORT_API_CALL tensor_data(OrtValue* value, void** out) noexcept {
  MAYBE_FAIL;
  *out = value->data;
  return nullptr;
}

OrtStatus* ORT_API_CALL parallel_for(const OrtKernelContext* context, void (*run)(void*, std::size_t), std::size_t total, std::size_t, void* data) noexcept {
  MAYBE_FAIL;
  context->pieces += total;
  if (context->options.threads == Threads::one) {
    for (std::size_t i = 0; i < total; ++i) run(data, i);
  } else if (context->options.threads == Threads::one_reversed) {
    for (std::size_t i = total; i-- > 0;) run(data, i);
  } else {
    // Pieces are assigned statically: every thread gets some, however short they are, and no shared counter synchronizes the threads.
    constexpr std::size_t kThreads = 4;
    std::vector<std::thread> threads;
    for (std::size_t thread = 0; thread < kThreads; ++thread) {
      threads.emplace_back([&, thread] {
        for (std::size_t i = thread; i < total; i += kThreads) run(data, i);
      });
    }
    for (std::thread& thread : threads) thread.join();
  }
  return nullptr;
}

// -- Memory -----------------------------------------------------------------------------------------------------------

OrtStatus* ORT_API_CALL create_memory_info(OrtAllocatorType, OrtMemType, OrtMemoryInfo** out) noexcept {
  MAYBE_FAIL;
  ++live;
  *out = new OrtMemoryInfo;
  return nullptr;
}

void ORT_API_CALL release_memory_info(OrtMemoryInfo* info) noexcept {
  if (info) --live;
  delete info;
}

OrtStatus* ORT_API_CALL get_allocator(const OrtKernelContext*, const OrtMemoryInfo*, OrtAllocator** out) noexcept {
  MAYBE_FAIL;
  ++live;
  *out = new OrtAllocator{};
  return nullptr;
}

void ORT_API_CALL release_allocator(OrtAllocator* allocator) noexcept {
  if (allocator) --live;
  delete allocator;
}

OrtStatus* ORT_API_CALL allocate(OrtAllocator*, std::size_t bytes, void** out) noexcept {
  MAYBE_FAIL;
  ++live;
  *out = std::malloc(bytes);
  if (*out) std::memset(*out, 0xff, bytes);  // NaN in every element type
  return nullptr;
}

OrtStatus* ORT_API_CALL kernel_allocator(const OrtKernelInfo*, OrtMemType type, OrtAllocator** out) noexcept {
  MAYBE_FAIL;
  EXPECT_EQ(type, OrtMemTypeDefault);
  ++live;
  *out = new OrtAllocator{};
  return nullptr;
}

OrtStatus* ORT_API_CALL allocator_info(const OrtAllocator*, const OrtMemoryInfo** out) noexcept {
  MAYBE_FAIL;
  static const OrtMemoryInfo where;
  *out = &where;
  return nullptr;
}

OrtStatus* ORT_API_CALL scratch_buffer(const OrtKernelContext*, const OrtMemoryInfo*, std::size_t bytes, void** out) noexcept { return allocate(nullptr, bytes, out); }

OrtStatus* ORT_API_CALL compute_stream(const OrtKernelContext*, void** out) noexcept {
  MAYBE_FAIL;
  *out = nullptr;
  return nullptr;
}

OrtStatus* ORT_API_CALL deallocate(OrtAllocator*, void* data) noexcept {
  --live;
  std::free(data);
  return nullptr;
}

// -- Registration -----------------------------------------------------------------------------------------------------

OrtStatus* ORT_API_CALL create_domain(const char* name, OrtCustomOpDomain** out) noexcept {
  MAYBE_FAIL;
  ++domains;
  *out = new OrtCustomOpDomain{name, {}};
  return nullptr;
}

void ORT_API_CALL release_domain(OrtCustomOpDomain* domain) noexcept {
  if (domain) --domains;
  delete domain;
}

OrtStatus* ORT_API_CALL add_op(OrtCustomOpDomain* domain, const OrtCustomOp* op) noexcept {
  MAYBE_FAIL;
  domain->ops.push_back(op);
  return nullptr;
}

OrtStatus* ORT_API_CALL add_domain(OrtSessionOptions* options, OrtCustomOpDomain* domain) noexcept {
  MAYBE_FAIL;
  options->domains.push_back(domain);
  return nullptr;
}

OrtStatus* ORT_API_CALL has_entry(const OrtSessionOptions* options, const char* key, int* out) noexcept {
  MAYBE_FAIL;
  *out = options->entries.count(key) > 0;
  return nullptr;
}

OrtStatus* ORT_API_CALL get_entry(const OrtSessionOptions* options, const char* key, char* out, std::size_t* size) noexcept {
  MAYBE_FAIL;
  const std::string& value = options->entries.at(key);
  const std::size_t room = *size;
  *size = value.size() + 1;
  if (room < *size) return failure("Result buffer is not large enough");
  std::memcpy(out, value.c_str(), *size);
  return nullptr;
}

OrtApi make_api() {
  OrtApi api{};  // the library must not call functions that are not set here
  api.CreateStatus = create_status;
  api.GetErrorMessage = error_message;
  api.ReleaseStatus = release_status;
  api.KernelInfoGetAttribute_float = attribute_float;
  api.KernelInfoGetAttribute_int64 = attribute_int64;
  api.KernelInfoGetAttributeArray_int64 = attribute_int64s;
  api.ShapeInferContext_GetAttribute = inference_attribute;
  api.ReadOpAttr = read_attribute;
  api.CreateTensorTypeAndShapeInfo = create_info;
  api.ReleaseTensorTypeAndShapeInfo = release_info;
  api.GetDimensionsCount = dimension_count;
  api.GetDimensions = dimensions;
  api.GetSymbolicDimensions = symbolic_dimensions;
  api.GetTensorElementType = element_type;
  api.SetTensorElementType = set_element_type;
  api.SetDimensions = set_dimensions;
  api.SetSymbolicDimensions = set_symbolic_dimensions;
  api.ShapeInferContext_GetInputCount = inference_input_count;
  api.ShapeInferContext_GetInputTypeShape = inference_input;
  api.ShapeInferContext_SetOutputTypeShape = set_inference_output;
  api.KernelContext_GetInput = get_input;
  api.KernelContext_GetOutputCount = output_count;
  api.KernelContext_GetOutput = get_output;
  api.GetTensorTypeAndShape = type_and_shape;
  api.GetTensorMutableData = tensor_data;
  api.KernelContext_ParallelFor = parallel_for;
  api.CreateCustomOpDomain = create_domain;
  api.ReleaseCustomOpDomain = release_domain;
  api.CustomOpDomain_Add = add_op;
  api.AddCustomOpDomain = add_domain;
  api.HasSessionConfigEntry = has_entry;
  api.GetSessionConfigEntry = get_entry;
  api.KernelInfoGetConstantInput_tensor = constant_input;
  api.CreateCpuMemoryInfo = create_memory_info;
  api.ReleaseMemoryInfo = release_memory_info;
  api.KernelContext_GetAllocator = get_allocator;
  api.ReleaseAllocator = release_allocator;
  api.AllocatorAlloc = allocate;
  api.AllocatorFree = deallocate;
  api.KernelInfoGetAllocator = kernel_allocator;
  api.AllocatorGetInfo = allocator_info;
  api.KernelContext_GetScratchBuffer = scratch_buffer;
  api.KernelContext_GetGPUComputeStream = compute_stream;
  return api;
}

const OrtApi the_api = make_api();  // trivially destructible: the library also uses it during static destruction

std::uint32_t offered_api = 18;
const char* offered_version = "1.18.0";

const OrtApi* ORT_API_CALL get_api(std::uint32_t version) noexcept { return version <= offered_api ? &the_api : nullptr; }
const char* ORT_API_CALL get_version() noexcept { return offered_version; }

const OrtApiBase base{get_api, get_version};

// -- Text -------------------------------------------------------------------------------------------------------------

std::unique_ptr<OrtTensorTypeAndShapeInfo> parse(const Spec& spec) {
  auto info = std::make_unique<OrtTensorTypeAndShapeInfo>();
  info->type = spec.type;
  info->borrowed = true;
  if (spec.shape == "?") return info;  // as in ONNX Runtime: no axes, like a scalar
  std::string text = spec.shape.substr(1, spec.shape.size() - 2);
  std::replace(text.begin(), text.end(), ',', ' ');
  std::istringstream words(text);
  for (std::string word; words >> word;) {
    const bool known = std::isdigit(static_cast<unsigned char>(word[0])) != 0;
    info->sizes.push_back(known ? std::stoll(word) : -1);
    info->symbols.push_back(known || word == "?" ? "" : word);
  }
  return info;
}

Spec to_spec(const OrtTensorTypeAndShapeInfo& info) {
  if (info.type == ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED) return {info.type, "?"};
  std::string text = "[";
  for (std::size_t i = 0; i < info.sizes.size(); ++i) {
    const std::string symbol = i < info.symbols.size() ? info.symbols[i] : "";
    EXPECT_TRUE(info.sizes[i] < 0 || symbol.empty()) << "a dimension with both a size and a name";
    text += (i ? ", " : "") + (info.sizes[i] >= 0 ? std::to_string(info.sizes[i]) : symbol.empty() ? "?" : symbol);
  }
  return {info.type, text + "]"};
}

// Returns the context of one run. The inputs must outlive it; with `inplace_input` the run writes to that input.
OrtKernelContext context_of(const OrtCustomOp& op, std::vector<Tensor>& inputs, const Options& options) {
  static std::byte nothing;
  OrtKernelContext context{op, options, {}, {}, {}, {}, 0};
  for (Tensor& input : inputs) {
    context.inputs.push_back({input.type, input.shape, input.bytes.empty() ? &nothing : input.bytes.data()});
    context.input_bytes.push_back(&input.bytes);
  }
  context.outputs.resize(options.outputs.size(), OrtValue{ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED, {}, nullptr});
  context.output_bytes.resize(options.outputs.size());
  return context;
}

std::vector<Tensor> outputs_of(const OrtKernelContext& context) {
  std::vector<Tensor> outputs;
  for (std::size_t i = 0; i < context.outputs.size(); ++i) {
    const OrtValue& output = context.outputs[i];
    EXPECT_EQ(output.data != nullptr, context.options.outputs[i]) << "output " << i;
    const bool over = i == 0 && context.options.inplace_input >= 0;
    const auto& bytes = over ? *context.input_bytes[static_cast<std::size_t>(context.options.inplace_input)] : context.output_bytes[i];
    outputs.push_back({output.type, output.shape, bytes});
  }
  return outputs;
}

}  // namespace

Spec spec(const Tensor& tensor) {
  OrtTensorTypeAndShapeInfo info;
  info.type = tensor.type;
  info.sizes = tensor.shape;
  return to_spec(info);
}

int live_objects() { return live; }

const OrtApi& api() { return the_api; }

namespace {

// Registers with API call 0 failing, then call 1, and so on until registration succeeds.
std::vector<const OrtCustomOpDomain*> register_despite_failures(const std::map<std::string, std::string>& entries, std::vector<std::string>& failures) {
  for (int call = 0;; ++call) {
    OrtSessionOptions options{entries, {}};
    OrtStatus* status = nullptr;
    {
      const InjectFailure inject_failure(call);
      status = RegisterCustomOps(&options, &base);
    }
    EXPECT_EQ(live, status ? 1 : 0) << "a failed registration leaked objects";
    if (!status) return options.domains;
    failures.push_back(take(status));
  }
}

}  // namespace

const Library& library() {
  static const Library registered = [] {
    Library result;
    const auto plain = register_despite_failures({}, result.failures);
    EXPECT_EQ(plain.size(), 1u);
    EXPECT_EQ(domains, 1);
    result.domain = plain.at(0)->name;
    result.ops = plain.at(0)->ops;
    std::set<const OrtCustomOpDomain*> distinct;  // two precisions may share their domains
    for (const char* precision : {"high", "medium"}) {
      const auto found = register_despite_failures({{kPrecision, precision}}, result.failures);
      for (std::size_t i = 1; i < found.size(); ++i) {
        ++result.dense_domains[precision];
        result.new_domains[precision] += distinct.insert(found[i]).second ? 1 : 0;
        auto& ops = result.dense_ops[precision];
        ops.insert(ops.end(), found[i]->ops.begin(), found[i]->ops.end());
      }
    }
    EXPECT_EQ(domains, 1 + static_cast<int>(distinct.size()));
    return result;
  }();
  return registered;
}

const OrtCustomOp* find(const std::string& name, const std::vector<ONNXTensorElementDataType>& inputs, const std::string& precision) {
  const OrtCustomOp* found = nullptr;
  const auto dense_ops = library().dense_ops.find(precision);
  for (const OrtCustomOp* op : dense_ops == library().dense_ops.end() ? library().ops : dense_ops->second) {
    bool fits = op->GetName(op) == name && op->GetExecutionProviderType(op) == std::string("CPUExecutionProvider");
    fits = fits && op->GetInputTypeCount(op) == inputs.size();
    for (std::size_t i = 0; fits && i < inputs.size(); ++i) fits = op->GetInputType(op, i) == inputs[i];
    if (!fits) continue;
    EXPECT_EQ(found, nullptr) << name << " is registered twice for one type";
    found = op;
  }
  return found;
}

std::vector<std::pair<int, int>> may_inplace(const OrtCustomOp& op) {
  int *inputs = nullptr, *outputs = nullptr;
  const std::size_t count = op.GetMayInplace(&inputs, &outputs);
  std::vector<std::pair<int, int>> pairs;
  for (std::size_t i = 0; i < count; ++i) pairs.emplace_back(inputs[i], outputs[i]);
  if (count > 0) op.ReleaseMayInplace(inputs, outputs);  // as ONNX Runtime does: not called if there are no pairs
  return pairs;
}

std::pair<std::string, std::vector<std::string>> register_with(std::uint32_t newest_api, const char* version, const std::string& precision) {
  library();
  offered_api = newest_api;
  offered_version = version;
  OrtSessionOptions options;
  if (!precision.empty()) options.entries[kPrecision] = precision;
  std::pair<std::string, std::vector<std::string>> result;
  result.first = take(RegisterCustomOps(&options, &base));
  for (const OrtCustomOpDomain* domain : options.domains) result.second.push_back(domain->name);
  offered_api = 18;
  offered_version = "1.18.0";
  return result;
}

Outcome run(const std::string& name, std::vector<Tensor> inputs, const Attributes& attributes, const Options& options) {
  std::vector<ONNXTensorElementDataType> types;
  for (const Tensor& input : inputs) types.push_back(input.type);
  const OrtCustomOp* op = find(name, types, options.precision);
  if (!op) return {"there is no operator " + name + " for these types", {}, 0};
  return run(*op, std::move(inputs), attributes, options);
}

Outcome run(const OrtCustomOp& op, std::vector<Tensor> inputs, const Attributes& attributes, const Options& options) {
  const std::string name = op.GetName(&op);
  const std::size_t declared = op.GetOutputTypeCount(&op);
  EXPECT_LE(options.outputs.size(), declared);
  for (std::size_t i = 0; i < declared; ++i) {
    const bool present = i < options.outputs.size() && options.outputs[i];
    EXPECT_TRUE(present || op.GetOutputCharacteristic(&op, i) == INPUT_OUTPUT_OPTIONAL) << "output " << i << " is not optional";
  }
  if (options.inplace_input >= 0) {
    const auto allowed = may_inplace(op);
    const std::pair<int, int> asked{options.inplace_input, 0};
    EXPECT_NE(std::find(allowed.begin(), allowed.end(), asked), allowed.end()) << "GetMayInplace does not permit this";
  }

  const std::vector<Tensor> before = inputs;
  OrtKernelContext context = context_of(op, inputs, options);
  const int live_before = live;
  Outcome outcome;
  try {
    const InjectFailure inject_failure(options.failing_call);
    OrtKernelInfo info{attributes, context.inputs};
    for (std::size_t i = 0; i < inputs.size(); ++i) {
      if (static_cast<int>(i) != options.constant) info.constants[i].data = nullptr;
    }
    void* kernel = nullptr;
    outcome.error = take(op.CreateKernelV2(&op, &the_api, &info, &kernel));
    EXPECT_EQ(outcome.error.empty(), kernel != nullptr) << outcome.error;
    if (outcome.error.empty()) {
      for (int i = 0; i < options.earlier_runs; ++i) {
        OrtKernelContext earlier = context_of(op, inputs, options);
        EXPECT_EQ(take(op.KernelComputeV2(kernel, &earlier)), "");
      }
      outcome.error = take(op.KernelComputeV2(kernel, &context));
      op.KernelDestroy(kernel);
    }
  } catch (...) {
    ADD_FAILURE() << name << " threw an exception across the C ABI";
  }
  EXPECT_EQ(live, live_before) << name << " leaked objects or released too many";
  outcome.pieces = context.pieces;
  for (std::size_t i = 0; i < inputs.size(); ++i) {
    const bool kept = inputs[i].bytes == before[i].bytes || static_cast<int>(i) == options.inplace_input;
    EXPECT_TRUE(kept) << name << " wrote to input " << i;
  }
  if (!outcome.error.empty() || options.no_output_memory) return outcome;
  outcome.outputs = outputs_of(context);
  return outcome;
}

std::vector<Outcome> run_concurrently(const OrtCustomOp& op, std::vector<Tensor> inputs, const Attributes& attributes, const Options& options, int callers,
                                      int runs) {
  const std::vector<Tensor> before = inputs;
  const OrtKernelInfo info{attributes, std::vector<OrtValue>(inputs.size(), OrtValue{ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED, {}, nullptr})};
  void* kernel = nullptr;
  const std::string error = take(op.CreateKernelV2(&op, &the_api, &info, &kernel));
  if (!kernel) return {{error, {}, 0}};
  std::vector<Outcome> outcomes(static_cast<std::size_t>(callers * runs));
  in_parallel(callers, [&](int caller) {
    const int live_before = live;
    for (int run = 0; run < runs; ++run) {
      OrtKernelContext context = context_of(op, inputs, options);
      Outcome& outcome = outcomes[static_cast<std::size_t>(caller * runs + run)];
      outcome.error = take(op.KernelComputeV2(kernel, &context));
      outcome.pieces = context.pieces;
      if (outcome.error.empty() && !options.no_output_memory) outcome.outputs = outputs_of(context);
    }
    EXPECT_EQ(live, live_before) << "leaked objects or released too many";
  });
  op.KernelDestroy(kernel);
  for (std::size_t i = 0; i < inputs.size(); ++i) EXPECT_TRUE(inputs[i].bytes == before[i].bytes) << "wrote to input " << i;
  return outcomes;
}

std::vector<const OrtCustomOpDomain*> register_concurrently(int sessions) {
  std::vector<const OrtCustomOpDomain*> registered(static_cast<std::size_t>(sessions));
  in_parallel(sessions, [&](int session) {
    OrtSessionOptions options;
    EXPECT_EQ(take(RegisterCustomOps(&options, &base)), "");
    EXPECT_EQ(options.domains.size(), 1u);
    if (!options.domains.empty()) registered[static_cast<std::size_t>(session)] = options.domains[0];
  });
  EXPECT_EQ(domains, 1);
  return registered;
}

void in_parallel(int threads, const std::function<void(int)>& body) {
  std::atomic<int> missing{threads};
  std::vector<std::thread> running;
  for (int thread = 0; thread < threads; ++thread) {
    running.emplace_back([&, thread] {
      for (--missing; missing > 0;) std::this_thread::yield();
      body(thread);
    });
  }
  for (std::thread& thread : running) thread.join();
}

namespace {

Inference infer(const OrtCustomOp* op, const std::vector<Spec>& inputs, const Attributes& attributes, std::size_t outputs, int failing_call) {
  OrtShapeInferContext context;
  for (const auto& [key, value] : attributes) context.attributes[key] = {value};
  for (const Spec& input : inputs) context.inputs.push_back(parse(input));
  for (std::size_t i = 0; i < outputs; ++i) context.outputs.push_back(std::make_unique<OrtTensorTypeAndShapeInfo>());
  const int live_before = live;
  Inference result;
  try {
    const InjectFailure inject_failure(failing_call);
    result.error = take(op->InferOutputShapeFn(op, &context));
  } catch (...) {
    ADD_FAILURE() << op->GetName(op) << " threw an exception across the C ABI";
  }
  EXPECT_EQ(live, live_before) << op->GetName(op) << " leaked objects or released too many";
  if (!result.error.empty()) return result;
  for (const auto& output : context.outputs) result.outputs.push_back(to_spec(*output));
  return result;
}

}  // namespace

Inference infer(const OrtCustomOp& op, const std::vector<Spec>& inputs, const Attributes& attributes, std::size_t outputs) {
  return infer(&op, inputs, attributes, outputs, kNever);
}

Inference infer(const std::string& name, const std::vector<Spec>& inputs, const Attributes& attributes, std::size_t outputs, int failing_call,
                const std::string& precision) {
  std::vector<ONNXTensorElementDataType> types;
  for (const Spec& input : inputs) types.push_back(input.type);
  const OrtCustomOp* own = find(name, types, precision);
  if (!own) return {"there is no operator " + name + " for these types", {}};
  const Inference result = infer(own, inputs, attributes, outputs, failing_call);
  for (const OrtCustomOp* op : library().ops) {
    if (op == own || op->GetName(op) != name || failing_call != kNever) continue;
    const Inference other = infer(op, inputs, attributes, outputs, kNever);
    EXPECT_EQ(other.error, result.error);
    EXPECT_TRUE(other.outputs == result.outputs) << name << " infers other shapes or types for type " << op->GetInputType(op, 0);
  }
  return result;
}

}  // namespace fake_ort
