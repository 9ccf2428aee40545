// As much of ONNX Runtime as the library calls, and no more: the operators run through the library's real entry point and callbacks, with strict checks on
// what they ask for. It counts the objects that the library must give back, and can let any one call of the API fail.
#pragma once

#include <onnxruntime_c_api.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <variant>
#include <vector>

namespace fake_ort {

struct Tensor {
  ONNXTensorElementDataType type;
  std::vector<std::int64_t> shape;
  std::vector<std::byte> bytes;
};

using Attribute = std::variant<float, std::int64_t, std::vector<std::int64_t>, std::string>;
using Attributes = std::map<std::string, Attribute>;

enum class Threads { one, one_reversed, many };

constexpr int kNever = -1;
constexpr const char* kPrecision = "scm.float32_matmul_precision";  // entry of a session's configuration

struct Options {
  std::vector<bool> outputs{true};      // of the node; false: an optional output without a name
  int inplace_input = -1;                // the input whose memory output 0 takes
  Threads threads = Threads::one;       // of KernelContext_ParallelFor
  int failing_call = kNever;            // the call of the API, counted from 0, that fails
  int constant = -1;                    // the input that the kernel is told of when it is made
  std::string precision;                // "high" or "medium": of the operators that multiply bfloat16
  bool no_output_memory = false;          // outputs have no memory: for tests in which the kernel stops before it writes
};

struct Outcome {
  std::string error;  // empty if all went well
  std::vector<Tensor> outputs;
  std::size_t pieces = 0;  // into which ParallelFor was asked to divide the work; 0 if it was not called
};

// Creates a kernel of the CPU operator that takes these inputs, runs it and destroys it.
Outcome run(const std::string& op, std::vector<Tensor> inputs, const Attributes& attributes = {}, const Options& options = {});

// One kernel that several callers run at once, each `runs` times, as the runs of one session do: all read the same inputs, each has outputs of its own.
std::vector<Outcome> run_concurrently(const OrtCustomOp& op, std::vector<Tensor> inputs, const Attributes& attributes, const Options& options, int callers, int runs);

// Threads that wait for one another, then run the body; it gets their numbers.
void in_parallel(int threads, const std::function<void(int)>& body);

// A type and a shape as text: "[2, H, ?]" has a known, a symbolic and an unknown size, "?" not even a known rank.
struct Spec {
  ONNXTensorElementDataType type;
  std::string shape;

  bool operator==(const Spec& other) const { return type == other.type && shape == other.shape; }
};

Spec spec(const Tensor& tensor);

struct Inference {
  std::string error;
  std::vector<Spec> outputs;  // the shape is "?" where the operator gave none
};

// Shape inference of the CPU operator that takes these inputs. All operators of its name must infer the same: ONNX Runtime asks any one of them, whatever
// the node's types.
Inference infer(const std::string& op, const std::vector<Spec>& inputs, const Attributes& attributes = {}, std::size_t outputs = 1, int failing_call = kNever,
                const std::string& precision = "");

// What the library registers. `failures` are the errors of the attempts before the one that succeeded, with one more call of the API allowed each time.
struct Library {
  std::string domain;
  std::vector<const OrtCustomOp*> ops;
  std::map<std::string, std::vector<const OrtCustomOp*>> dense_ops;  // those that multiply bfloat16, by precision; none where the processor cannot have them
  std::vector<std::string> failures;
};

const Library& library();

const OrtCustomOp* find(const std::string& op, const std::vector<ONNXTensorElementDataType>& inputs, const std::string& precision = "");  // CPU operators only

std::vector<std::pair<int, int>> may_inplace(const OrtCustomOp& op);

// RegisterCustomOps on an ONNX Runtime of this version: the error, or the domains that the session got.
std::pair<std::string, std::vector<std::string>> register_with(std::uint32_t newest_api, const char* version, const std::string& precision = "");

// The domains that sessions got whose options met the library at once; no other call is needed before.
std::vector<const OrtCustomOpDomain*> register_concurrently(int sessions);

int live_objects();  // made by the API in this thread and not given back, apart from domains

}  // namespace fake_ort
