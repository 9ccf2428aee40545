// Primary contexts, and the stack of contexts that each thread has.
#include <vector>

#include "devices.h"
#include "memory.h"

namespace stub {
namespace {

thread_local std::vector<CUctx_st*> stack;

}  // namespace

CUctx_st* primary_context(int device) {
  static CUctx_st contexts[kMaxDevices] = {{0, 0, 0}, {1, 0, 0}, {2, 0, 0}, {3, 0, 0}, {4, 0, 0}, {5, 0, 0}, {6, 0, 0}, {7, 0, 0}};
  return &contexts[device];
}

CUctx_st* current_context() { return stack.empty() ? nullptr : stack.back(); }

int current_device() { return current_context() == nullptr ? 0 : current_context()->device; }

}  // namespace stub

using stub::current_context;
using stub::is_device;
using stub::primary_context;

STUB_API(cuDevicePrimaryCtxRetain)(CUcontext* context, CUdevice device) {
  STUB_FAIL_IF_ORDERED();
  if (!is_device(device)) return CUDA_ERROR_INVALID_DEVICE;
  const stub::Lock lock(stub::mutex());
  *context = primary_context(device);
  ++(*context)->retained;
  return CUDA_SUCCESS;
}
STUB_API(cuDevicePrimaryCtxRelease_v2)(CUdevice device) {
  const stub::Lock lock(stub::mutex());
  --primary_context(device)->retained;
  return CUDA_SUCCESS;
}
STUB_API(cuDevicePrimaryCtxGetState)(CUdevice device, unsigned* flags, int* active) {
  *flags = primary_context(device)->flags;
  *active = primary_context(device)->retained > 0;
  return CUDA_SUCCESS;
}
STUB_API(cuDevicePrimaryCtxSetFlags_v2)(CUdevice device, unsigned flags) {
  primary_context(device)->flags = flags;
  return CUDA_SUCCESS;
}
STUB_API(cuCtxPushCurrent_v2)(CUcontext context) {
  stub::stack.push_back(context);
  return CUDA_SUCCESS;
}
STUB_API(cuCtxPopCurrent_v2)(CUcontext* context) {
  if (stub::stack.empty()) return CUDA_ERROR_INVALID_CONTEXT;
  if (context != nullptr) *context = stub::stack.back();
  stub::stack.pop_back();
  return CUDA_SUCCESS;
}
STUB_API(cuCtxSetCurrent)(CUcontext context) {
  if (!stub::stack.empty()) stub::stack.pop_back();
  if (context != nullptr) stub::stack.push_back(context);
  return CUDA_SUCCESS;
}
STUB_API(cuCtxGetCurrent)(CUcontext* context) {
  *context = current_context();
  return CUDA_SUCCESS;
}
STUB_API(cuCtxGetDevice)(CUdevice* device) {
  if (current_context() == nullptr) return CUDA_ERROR_INVALID_CONTEXT;
  *device = current_context()->device;
  return CUDA_SUCCESS;
}
STUB_API(cuCtxGetDevice_v2)(CUdevice* device, CUcontext context) {
  *device = context == nullptr ? stub::current_device() : context->device;
  return CUDA_SUCCESS;
}
STUB_API(cuCtxGetFlags)(unsigned* flags) {
  *flags = primary_context(stub::current_device())->flags;
  return CUDA_SUCCESS;
}
STUB_API(cuCtxGetId)(CUcontext context, unsigned long long* id) {
  *id = 1ULL + static_cast<unsigned>(context == nullptr ? stub::current_device() : context->device);
  return CUDA_SUCCESS;
}
STUB_API(cuCtxGetApiVersion)(CUcontext, unsigned* version) {
  *version = 3020;
  return CUDA_SUCCESS;
}
STUB_API(cuCtxGetStreamPriorityRange)(int* least, int* greatest) {
  if (least != nullptr) *least = 0;
  if (greatest != nullptr) *greatest = -5;
  return CUDA_SUCCESS;
}
