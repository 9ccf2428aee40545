// A fake ONNX Runtime with exactly the API functions that the library calls. Operators run through the library's real entry point and callbacks, whose requests
// are strictly checked. The fake counts the objects that the library must release, and can make any single API call fail.
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
  std::vector<bool> outputs{true};  // the node's outputs; false: an optional output that is not used
  int inplace_input = -1;           // the input whose memory output 0 reuses; -1 for none
  Threads threads = Threads::one;   // for KernelContext_ParallelFor
  int failing_call = kNever;        // the API call that fails, counted from 0
  int constant = -1;                // the input that is constant; -1 for none
  std::string precision;            // "high" or "medium" selects the dense operators of that precision
  int earlier_runs = 0;             // runs of the same kernel before the one whose outcome is returned
  bool no_output_memory = false;    // do not allocate outputs: for kernels that fail before they write
};

struct Outcome {
  std::string error;  // empty on success
  std::vector<Tensor> outputs;
  std::size_t pieces = 0;  // number of pieces passed to ParallelFor; 0 if it was not called
};

// Creates a kernel of the CPU operator that takes these inputs, runs it and destroys it.
Outcome run(const std::string& op, std::vector<Tensor> inputs, const Attributes& attributes = {}, const Options& options = {});
// Same for an operator of any device.
Outcome run(const OrtCustomOp& op, std::vector<Tensor> inputs, const Attributes& attributes = {}, const Options& options = {});

// Runs one kernel from several threads concurrently, `runs` times each, as concurrent runs of one session do: all share the inputs, each has its own outputs.
std::vector<Outcome> run_concurrently(const OrtCustomOp& op, std::vector<Tensor> inputs, const Attributes& attributes, const Options& options, int callers,
                                      int runs);

// Starts threads that wait for one another and then call body(thread index).
void in_parallel(int threads, const std::function<void(int)>& body);

// A type and a shape as text: "[2, H, ?]" has a known, a symbolic and an unknown dimension; "?" is a shape of unknown rank.
struct Spec {
  ONNXTensorElementDataType type;
  std::string shape;

  bool operator==(const Spec& other) const { return type == other.type && shape == other.shape; }
};

Spec spec(const Tensor& tensor);

struct Inference {
  std::string error;
  std::vector<Spec> outputs;  // the shape is "?" if the operator set none
};

// Runs shape inference of the CPU operator that takes these inputs. Expects all variants of the operator to infer the same, because ONNX Runtime calls any one
// of them, whatever the node's types.
Inference infer(const std::string& op, const std::vector<Spec>& inputs, const Attributes& attributes = {}, std::size_t outputs = 1, int failing_call = kNever,
                const std::string& precision = "");
// Same for an operator of any device, alone.
Inference infer(const OrtCustomOp& op, const std::vector<Spec>& inputs, const Attributes& attributes = {}, std::size_t outputs = 1);

const OrtApi& api();

// What the library registers. `failures` are the errors of the registrations that failed: the first API call fails, then the second, and so on until
// registration succeeds.
struct Library {
  std::string domain;
  std::vector<const OrtCustomOp*> ops;
  std::map<std::string, std::vector<const OrtCustomOp*>> dense_ops;  // by precision; empty if the processor does not support them
  // By precision: the dense domains, and how many of them no earlier precision had.
  std::map<std::string, std::size_t> dense_domains, new_domains;
  std::vector<std::string> failures;
};

const Library& library();

const OrtCustomOp* find(const std::string& op, const std::vector<ONNXTensorElementDataType>& inputs, const std::string& precision = "");  // CPU operators only

std::vector<std::pair<int, int>> may_inplace(const OrtCustomOp& op);

// Calls RegisterCustomOps on an ONNX Runtime of this version. Returns the error and the domains added to the session.
std::pair<std::string, std::vector<std::string>> register_with(std::uint32_t newest_api, const char* version, const std::string& precision = "");

// Calls RegisterCustomOps from several threads concurrently. Returns the domain that each session got. May be the first call of the library.
std::vector<const OrtCustomOpDomain*> register_concurrently(int sessions);

int live_objects();  // objects that the API created in this thread and that were not released, except domains

}  // namespace fake_ort
