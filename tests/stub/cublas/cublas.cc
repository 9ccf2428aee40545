// libcublas without products: each is a line in the log, with its shape and dtypes. What ONNX Runtime's CUDA provider calls, declared here by its ABI: the
// header, in a package of hundreds of megabytes, is not needed for that.
#include <cuda.h>

#include <cstdio>

#define STUB_EXPORT extern "C" __attribute__((visibility("default")))

extern "C" CUresult scm_stub_operation(CUstream stream, const char* description);

namespace {

constexpr int kSuccess = 0, kExecutionFailed = 13;  // cublasStatus_t

struct Handle {
  CUstream stream;
  int math_mode;
};

const char* name_of(int type) {  // a cudaDataType_t
  switch (type) {
    case 0: return "fp32";
    case 1: return "fp64";
    case 2: return "fp16";
    case 14: return "bf16";
    default: return "other";
  }
}

struct Product {
  const char* function;
  int transpose_a, transpose_b, m, n, k, a, b, c, batch, compute;
};

int leave(const Handle* handle, const Product& p) {
  char line[256];
  std::snprintf(line, sizeof line, "cublas%s[m=%d n=%d k=%d batch=%d %c%c %s,%s->%s compute=%d]", p.function, p.m, p.n, p.k, p.batch,
                p.transpose_a != 0 ? 'T' : 'N', p.transpose_b != 0 ? 'T' : 'N', name_of(p.a), name_of(p.b), name_of(p.c), p.compute);
  return scm_stub_operation(handle->stream, line) == CUDA_SUCCESS ? kSuccess : kExecutionFailed;
}

}  // namespace

STUB_EXPORT int cublasCreate_v2(Handle** handle) {
  *handle = new Handle{};
  return kSuccess;
}
STUB_EXPORT int cublasDestroy_v2(Handle* handle) {
  delete handle;
  return kSuccess;
}
STUB_EXPORT int cublasSetStream_v2(Handle* handle, CUstream stream) {
  handle->stream = stream;
  return kSuccess;
}
STUB_EXPORT int cublasSetMathMode(Handle* handle, int mode) {
  handle->math_mode = mode;
  return kSuccess;
}
STUB_EXPORT int cublasGetMathMode(Handle* handle, int* mode) {
  *mode = handle->math_mode;
  return kSuccess;
}
STUB_EXPORT const char* cublasGetStatusName(int) { return "CUBLAS_STATUS"; }
STUB_EXPORT const char* cublasGetStatusString(int) { return "an error of the stub"; }
STUB_EXPORT int cublasSgemm_v2(Handle* handle, int transpose_a, int transpose_b, int m, int n, int k) {
  return leave(handle, {"Sgemm", transpose_a, transpose_b, m, n, k, 0, 0, 0, 1, 0});
}
STUB_EXPORT int cublasSgemmStridedBatched(Handle* handle, int transpose_a, int transpose_b, int m, int n, int k, const float*, const float*, int, long long,
                                          const float*, int, long long, const float*, float*, int, long long, int batch) {
  return leave(handle, {"SgemmStridedBatched", transpose_a, transpose_b, m, n, k, 0, 0, 0, batch, 0});
}
STUB_EXPORT int cublasGemmEx(Handle* handle, int transpose_a, int transpose_b, int m, int n, int k, const void*, const void*, int a, int, const void*, int b,
                             int, const void*, void*, int c, int, int compute, int) {
  return leave(handle, {"GemmEx", transpose_a, transpose_b, m, n, k, a, b, c, 1, compute});
}
STUB_EXPORT int cublasGemmBatchedEx(Handle* handle, int transpose_a, int transpose_b, int m, int n, int k, const void*, const void*, int a, int, const void*,
                                    int b, int, const void*, void*, int c, int, int batch, int compute, int) {
  return leave(handle, {"GemmBatchedEx", transpose_a, transpose_b, m, n, k, a, b, c, batch, compute});
}
STUB_EXPORT int cublasGemmStridedBatchedEx(Handle* handle, int transpose_a, int transpose_b, int m, int n, int k, const void*, const void*, int a, int,
                                           long long, const void*, int b, int, long long, const void*, void*, int c, int, long long, int batch, int compute,
                                           int) {
  return leave(handle, {"GemmStridedBatchedEx", transpose_a, transpose_b, m, n, k, a, b, c, batch, compute});
}
STUB_EXPORT int cublasSgeam(Handle* handle) { return scm_stub_operation(handle->stream, "cublasSgeam") == CUDA_SUCCESS ? kSuccess : kExecutionFailed; }
