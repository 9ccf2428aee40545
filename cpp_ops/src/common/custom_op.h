// Turns an operator class into the OrtCustomOp structures that ONNX Runtime registers, one per execution provider and element type.
//
// An operator is a class with
//   kName, kInputs, kOutputs    the operator's name and its arguments, in order
//   kInplace                    pairs (input, output): the output may reuse the input's memory
//   Op(const Attributes&)       reads and validates the attributes
//   infer(inputs) -> outputs    validates the input shapes and returns the output shapes
//   cpu<T>(Context&)            runs the CPU kernel
//   cuda<T>(Context&)           enqueues the CUDA kernel
#pragma once

#include <array>
#include <exception>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/kernel.h"
#include "common/ort.h"

namespace scm {

using Shapes = std::vector<Shape>;

enum class Type { element, float32, int64, uint8 };  // `element` is the kernel's element type T

struct Argument {
  const char* name;
  Type type = Type::element;
  bool optional = false;
};

struct Inplace {
  int input, output;
};

enum class Device { cpu, cuda };

constexpr const char* kCpuProviders[] = {"CPUExecutionProvider"};
// The second is the CUDA provider that is a plugin, a package of its own, and not a part of ONNX Runtime.
constexpr const char* kCudaProviders[] = {"CUDAExecutionProvider", "CudaPluginExecutionProvider"};

template <typename T>
constexpr ONNXTensorElementDataType kElementType = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
template <>
constexpr ONNXTensorElementDataType kElementType<float> = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
template <>
constexpr ONNXTensorElementDataType kElementType<float16> = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
template <>
constexpr ONNXTensorElementDataType kElementType<bfloat16> = ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16;

template <typename T>
constexpr ONNXTensorElementDataType onnx_type(Type type) {
  switch (type) {
    case Type::float32:
      return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
    case Type::int64:
      return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;
    case Type::uint8:
      return ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8;
    case Type::element:
      break;
  }
  return kElementType<T>;
}

// Runs `body` and returns an exception as a status that names the operator: exceptions must not cross the C ABI.
template <typename Body>
OrtStatus* guarded(const OrtApi& api, const char* op, const Body& body) noexcept {
  try {
    try {
      body();
      return nullptr;
    } catch (const Error& error) {
      return api.CreateStatus(ORT_INVALID_ARGUMENT, ("scm::" + std::string(op) + ": " + error.reason).c_str());
    } catch (const std::exception& error) {
      return api.CreateStatus(ORT_FAIL, ("scm::" + std::string(op) + ": " + error.what()).c_str());
    }
  } catch (...) {  // there is no memory for the message
    return api.CreateStatus(ORT_FAIL, "scm: out of memory");
  }
}

// Shapes and element types as far as they are known at shape inference. Dim::symbol pointers live as long as the context.
struct Inferred {
  Shapes shapes;
  std::vector<ONNXTensorElementDataType> types;
};

Inferred infer_inputs(const OrtApi& api, OrtShapeInferContext* context);
void set_outputs(const OrtApi& api, OrtShapeInferContext* context, const Inferred& outputs);

template <class Op, typename T, Device kDevice>
struct CustomOp : OrtCustomOp {
  const OrtApi& api;
  const char* provider;

  CustomOp(const OrtApi& ort, const char* execution_provider) : OrtCustomOp{}, api(ort), provider(execution_provider) {
    OrtCustomOp::version = SCM_OPS_ORT_API;
    GetName = [](const OrtCustomOp*) { return Op::kName; };
    GetExecutionProviderType = [](const OrtCustomOp* op) { return static_cast<const CustomOp*>(op)->provider; };
    GetInputTypeCount = [](const OrtCustomOp*) { return std::size(Op::kInputs); };
    GetInputType = [](const OrtCustomOp*, std::size_t i) { return onnx_type<T>(Op::kInputs[i].type); };
    GetInputCharacteristic = [](const OrtCustomOp*, std::size_t) { return INPUT_OUTPUT_REQUIRED; };
    GetInputMemoryType = [](const OrtCustomOp*, std::size_t) { return OrtMemTypeDefault; };
    GetOutputTypeCount = [](const OrtCustomOp*) { return std::size(Op::kOutputs); };
    GetOutputType = [](const OrtCustomOp*, std::size_t i) { return onnx_type<T>(Op::kOutputs[i].type); };
    GetOutputCharacteristic = [](const OrtCustomOp*, std::size_t i) { return Op::kOutputs[i].optional ? INPUT_OUTPUT_OPTIONAL : INPUT_OUTPUT_REQUIRED; };
    GetVariadicInputMinArity = [](const OrtCustomOp*) { return 1; };
    GetVariadicInputHomogeneity = [](const OrtCustomOp*) { return 1; };
    GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 1; };
    GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 1; };
    GetStartVersion = [](const OrtCustomOp*) { return 1; };
    GetEndVersion = [](const OrtCustomOp*) { return 1; };
    CreateKernelV2 = [](const OrtCustomOp* op, const OrtApi* ort, const OrtKernelInfo* info, void** kernel) {
      (void)op;
      return guarded(*ort, Op::kName, [&] { *kernel = new Kernel{*ort, Op(Attributes(*ort, info))}; });
    };
    KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
      const Kernel& self = *static_cast<const Kernel*>(kernel);
      return guarded(self.api, Op::kName, [&] {
        Context run(self.api, context);
        try {
          if constexpr (kDevice == Device::cuda) {
            self.op.template cuda<T>(run);
          } else {
            self.op.template cpu<T>(run);
          }
        } catch (const std::exception& error) {  // not an invalid input, but the sizes may be the cause: add them to the message
          std::string shapes;
          for (std::size_t i = 0; i < std::size(Op::kInputs); ++i) shapes += (i ? ", " : "") + to_string(run.input(i).shape);
          throw std::runtime_error(error.what() + (" with input shapes " + shapes));
        }
      });
    };
    KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
    InferOutputShapeFn = [](const OrtCustomOp* op, OrtShapeInferContext* context) {
      const OrtApi& ort = static_cast<const CustomOp*>(op)->api;
      return guarded(ort, Op::kName, [&] {
        const Inferred inputs = infer_inputs(ort, context);
        // ONNX Runtime calls the inference function of one registered variant for every element type. The node's type is that of its inputs.
        ONNXTensorElementDataType element = kElementType<T>;
        for (std::size_t i = 0; i < std::size(Op::kInputs); ++i) {
          if (Op::kInputs[i].type == Type::element && inputs.types[i] != ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED) element = inputs.types[i];
        }
        const Op self{Attributes(ort, context)};
        Inferred outputs{self.infer(inputs.shapes), {}};
        for (const Argument& output : Op::kOutputs) outputs.types.push_back(output.type == Type::element ? element : onnx_type<T>(output.type));
        set_outputs(ort, context, outputs);
      });
    };
    GetMayInplace = [](int** inputs, int** outputs) -> std::size_t {
      constexpr std::size_t count = std::size(Op::kInplace);
      if (count == 0) return 0;  // ONNX Runtime then does not call ReleaseMayInplace
      *inputs = new (std::nothrow) int[count];
      *outputs = new (std::nothrow) int[count];
      if (!*inputs || !*outputs) {
        delete[] *inputs;
        delete[] *outputs;
        return 0;
      }
      for (std::size_t i = 0; i < count; ++i) {
        (*inputs)[i] = Op::kInplace[i].input;
        (*outputs)[i] = Op::kInplace[i].output;
      }
      return count;
    };
    ReleaseMayInplace = [](int* inputs, int* outputs) {
      delete[] inputs;
      delete[] outputs;
    };
  }

  struct Kernel {
    const OrtApi& api;
    Op op;
  };
};

// Runs a CPU kernel over `count` units (rows, elements or samples, as the kernel defines) on the session's threads, in pieces of `grain` units.
template <typename Params>
void run_on_cpu(const Context& run, const Params& params, CpuKernel<Params> kernel, std::int64_t count, std::int64_t grain) {
  run.parallel(count, grain, [&](std::int64_t begin, std::int64_t end) { kernel(params, begin, end); });
}

inline void check_launch(const char* error) {
  if (error) throw std::runtime_error(std::string("CUDA: ") + error);
}

using CustomOps = std::vector<std::unique_ptr<OrtCustomOp, void (*)(OrtCustomOp*)>>;

template <class Op, typename T, Device kDevice, std::size_t kCount>
void add(CustomOps& ops, const OrtApi& api, const char* const (&providers)[kCount]) {
  for (const char* provider : providers) {
    ops.emplace_back(new CustomOp<Op, T, kDevice>(api, provider), [](OrtCustomOp* op) { delete static_cast<CustomOp<Op, T, kDevice>*>(op); });
  }
}

// Adds an operator for every provider and for the element types T and Types. bfloat16 has no CPU kernels.
template <class Op, typename T, typename... Types>
void add_all(CustomOps& ops, const OrtApi& api) {
  if constexpr (kElementType<T> != ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16) add<Op, T, Device::cpu>(ops, api, kCpuProviders);
#ifdef SCM_OPS_CUDA
  add<Op, T, Device::cuda>(ops, api, kCudaProviders);
#endif
  if constexpr (sizeof...(Types) > 0) add_all<Op, Types...>(ops, api);
}

}  // namespace scm
