// Launches of kernels, which compute nothing, and of host functions, which are called.
#include "devices.h"
#include "modules.h"
#include "streams.h"

namespace stub {
namespace {

bool fits(const KernelNode& kernel) {
  const auto& [function, grid, block, shared] = kernel;
  const bool some = grid[0] > 0 && grid[1] > 0 && grid[2] > 0 && block[0] > 0 && block[1] > 0 && block[2] > 0;
  return some && block[0] * block[1] * block[2] <= 1024 && grid[0] <= 2147483647 && grid[1] <= 65535 && grid[2] <= 65535 && block[2] <= 64;
}

CUresult launch(const KernelNode& kernel, CUstream handle) {
  CUfunc_st* function = kernel.function;
  if (function == nullptr) return CUDA_ERROR_INVALID_HANDLE;
  const char* name = function->name.c_str();
  if (!function->module->runs_here) {
    say("NO CODE", "for %s", name);
    return CUDA_ERROR_NO_BINARY_FOR_GPU;
  }
  if (!fits(kernel)) {
    const auto& [_, grid, block, shared] = kernel;
    say("BAD", "launch of %s with grid %u %u %u block %u %u %u", name, grid[0], grid[1], grid[2], block[0], block[1], block[2]);
    return CUDA_ERROR_INVALID_VALUE;
  }
  int most = 0;
  cuFuncGetAttribute(&most, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, function);
  if (kernel.shared > static_cast<unsigned>(most)) {
    say("BAD", "launch of %s with %u bytes of shared memory, of %d", name, kernel.shared, most);
    return CUDA_ERROR_INVALID_VALUE;
  }
  const Lock lock(mutex());
  CUstream_st* stream = stream_of(handle);
  if (const CUresult error = forbidden_on_legacy_stream(stream, "launch")) return error;
  log_kernel(state_of(stream), stream->id, kernel);
  if (stream->capture == nullptr) return CUDA_SUCCESS;
  if (stream->capture->invalidated) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
  CUgraphNode_st node{Kind::kernel};
  node.kernel = kernel;
  capture_node(stream, node);
  return CUDA_SUCCESS;
}

}  // namespace

void log_kernel(const char* state, int stream, const KernelNode& kernel) {
  const auto& [function, grid, block, shared] = kernel;
  say("kernel", "%s\t%d\t%s\t%u %u %u\t%u %u %u\t%u", state, stream, function->name.c_str(), grid[0], grid[1], grid[2], block[0], block[1], block[2], shared);
}

}  // namespace stub

STUB_API(cuLaunchKernel)
(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared, CUstream stream,
 void**, void**) {
  STUB_FAIL_IF_ORDERED();
  return stub::launch({function, {grid_x, grid_y, grid_z}, {block_x, block_y, block_z}, shared}, stream);
}
STUB_API(cuLaunchKernelEx)(const CUlaunchConfig* config, CUfunction function, void**, void**) {
  STUB_FAIL_IF_ORDERED();
  const unsigned grid[] = {config->gridDimX, config->gridDimY, config->gridDimZ}, block[] = {config->blockDimX, config->blockDimY, config->blockDimZ};
  return stub::launch({function, {grid[0], grid[1], grid[2]}, {block[0], block[1], block[2]}, config->sharedMemBytes}, config->hStream);
}
STUB_API(cuLaunchHostFunc)(CUstream handle, CUhostFn function, void* data) {
  CUstream_st* stream = stub::stream_of(handle);
  stub::say("hostfunc", "%s stream %d", stub::state_of(stream), stream->id);
  if (stream->capture == nullptr) {
    function(data);
    return CUDA_SUCCESS;
  }
  CUgraphNode_st node{stub::Kind::host};
  node.host_function = function;
  node.host_data = data;
  stub::capture_node(stream, node);
  return CUDA_SUCCESS;
}

// For the stubs of NVIDIA's libraries: an operation, which would be one kernel or several, is one line and one node.
STUB_EXPORT CUresult scm_stub_operation(CUstream stream, const char* description) {
  return stub::launch({stub::get_operation(description), {1, 1, 1}, {1, 1, 1}, 0}, stream);
}
