// Copies and fills, which are done: at once, or when the graph that captured them is launched.
#include <cstdint>
#include <cstring>

#include "memory.h"
#include "streams.h"

namespace stub {
namespace {

constexpr size_t kMaxChecked = 65536;  // bytes of a captured copy from the host whose contents are kept, to see changes

template <typename Address>
void* pointer(Address address) {
  return reinterpret_cast<void*>(static_cast<std::uintptr_t>(address));
}

CUresult copy(CopyNode copy, CUstream handle, bool asynchronous) {
  if (copy.width == 0 || copy.height == 0) return CUDA_SUCCESS;
  if (!asynchronous) {
    if (const CUresult error = forbidden_by_capture("a synchronous copy")) return error;
  }
  const Lock lock(mutex());
  CUstream_st* stream = stream_of(handle);
  if (const CUresult error = forbidden_on_legacy_stream(stream, "a copy")) return error;
  const char from = memory_letter(copy.from), to = memory_letter(copy.to);
  const size_t bytes = copy.width * copy.height, last = copy.height - 1;
  say("copy", "%s\t%d\t%c%c\t%zu\t%s", state_of(stream), stream->id, from, to, bytes, asynchronous ? "async" : "sync");
  if (!is_valid(copy.to, last * copy.to_pitch + copy.width) || !is_valid(copy.from, last * copy.from_pitch + copy.width)) return CUDA_ERROR_INVALID_VALUE;
  if (!asynchronous || stream->capture == nullptr) {
    do_copy(copy);
    return CUDA_SUCCESS;
  }
  if (from == 'H' || to == 'H') say("UNSAFE?", "a capture of a copy with pageable memory, %c to %c, %zu bytes", from, to, bytes);
  if (stream->capture->invalidated) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
  if (from != 'D' && copy.height == 1 && bytes <= kMaxChecked) {
    const char* source = static_cast<const char*>(copy.from);
    copy.source.assign(source, source + bytes);
  }
  CUgraphNode_st node{Kind::copy};
  node.copy = copy;
  capture_node(stream, node);
  return CUDA_SUCCESS;
}

CUresult copy_bytes(void* to, const void* from, size_t bytes, CUstream stream, bool asynchronous) {
  return copy({to, from, bytes, 1, bytes, bytes, {}}, stream, asynchronous);
}

CUresult copy_rows(const CUDA_MEMCPY2D& c, CUstream stream, bool asynchronous) {
  if (c.dstMemoryType == CU_MEMORYTYPE_ARRAY || c.srcMemoryType == CU_MEMORYTYPE_ARRAY) return CUDA_ERROR_NOT_SUPPORTED;
  auto* to = static_cast<char*>(c.dstMemoryType == CU_MEMORYTYPE_HOST ? c.dstHost : pointer(c.dstDevice));
  const auto* from = static_cast<const char*>(c.srcMemoryType == CU_MEMORYTYPE_HOST ? c.srcHost : pointer(c.srcDevice));
  to += c.dstY * c.dstPitch + c.dstXInBytes;
  from += c.srcY * c.srcPitch + c.srcXInBytes;
  return copy({to, from, c.WidthInBytes, c.Height, c.dstPitch, c.srcPitch, {}}, stream, asynchronous);
}

CUresult fill(CUdeviceptr to, unsigned value, size_t element, size_t count, CUstream handle, bool asynchronous) {
  if (count == 0) return CUDA_SUCCESS;
  if (!asynchronous) {
    if (const CUresult error = forbidden_by_capture("a synchronous fill")) return error;
  }
  const Lock lock(mutex());
  CUstream_st* stream = stream_of(handle);
  if (const CUresult error = forbidden_on_legacy_stream(stream, "a fill")) return error;
  say("fill", "%s\t%d\t%zu\t%s", state_of(stream), stream->id, count * element, asynchronous ? "async" : "sync");
  if (!is_valid(pointer(to), count * element)) return CUDA_ERROR_INVALID_VALUE;
  const FillNode fill{pointer(to), value, element, count, 1, count * element};
  if (!asynchronous || stream->capture == nullptr) {
    do_fill(fill);
    return CUDA_SUCCESS;
  }
  if (stream->capture->invalidated) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
  CUgraphNode_st node{Kind::fill};
  node.fill = fill;
  capture_node(stream, node);
  return CUDA_SUCCESS;
}

}  // namespace

void do_copy(const CopyNode& copy) {
  for (size_t y = 0; y < copy.height; ++y) {
    std::memmove(static_cast<char*>(copy.to) + y * copy.to_pitch, static_cast<const char*>(copy.from) + y * copy.from_pitch, copy.width);
  }
}

void do_fill(const FillNode& fill) {
  for (size_t y = 0; y < fill.height; ++y) {
    char* row = static_cast<char*>(fill.to) + y * fill.pitch;
    if (fill.element == 1) {
      std::memset(row, static_cast<int>(fill.value), fill.width);
      continue;
    }
    for (size_t x = 0; x < fill.width; ++x) std::memcpy(row + x * fill.element, &fill.value, fill.element);  // little-endian
  }
}

}  // namespace stub

using stub::copy_bytes;
using stub::pointer;

STUB_API(cuMemcpy)(CUdeviceptr to, CUdeviceptr from, size_t bytes) { return copy_bytes(pointer(to), pointer(from), bytes, nullptr, false); }
STUB_API(cuMemcpyAsync)(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream stream) {
  STUB_FAIL_IF_ORDERED();
  return copy_bytes(pointer(to), pointer(from), bytes, stream, true);
}
STUB_API(cuMemcpyHtoD_v2)(CUdeviceptr to, const void* from, size_t bytes) { return copy_bytes(pointer(to), from, bytes, nullptr, false); }
STUB_API(cuMemcpyDtoH_v2)(void* to, CUdeviceptr from, size_t bytes) { return copy_bytes(to, pointer(from), bytes, nullptr, false); }
STUB_API(cuMemcpyDtoD_v2)(CUdeviceptr to, CUdeviceptr from, size_t bytes) { return copy_bytes(pointer(to), pointer(from), bytes, nullptr, false); }
STUB_API(cuMemcpyHtoDAsync_v2)(CUdeviceptr to, const void* from, size_t bytes, CUstream stream) { return copy_bytes(pointer(to), from, bytes, stream, true); }
STUB_API(cuMemcpyDtoHAsync_v2)(void* to, CUdeviceptr from, size_t bytes, CUstream stream) { return copy_bytes(to, pointer(from), bytes, stream, true); }
STUB_API(cuMemcpyDtoDAsync_v2)(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream stream) {
  return copy_bytes(pointer(to), pointer(from), bytes, stream, true);
}
STUB_API(cuMemcpy2D_v2)(const CUDA_MEMCPY2D* parameters) { return stub::copy_rows(*parameters, nullptr, false); }
STUB_API(cuMemcpy2DAsync_v2)(const CUDA_MEMCPY2D* parameters, CUstream stream) { return stub::copy_rows(*parameters, stream, true); }

STUB_API(cuMemsetD8_v2)(CUdeviceptr to, unsigned char value, size_t count) { return stub::fill(to, value, 1, count, nullptr, false); }
STUB_API(cuMemsetD32_v2)(CUdeviceptr to, unsigned value, size_t count) { return stub::fill(to, value, 4, count, nullptr, false); }
STUB_API(cuMemsetD8Async)(CUdeviceptr to, unsigned char value, size_t count, CUstream stream) { return stub::fill(to, value, 1, count, stream, true); }
STUB_API(cuMemsetD16Async)(CUdeviceptr to, unsigned short value, size_t count, CUstream stream) { return stub::fill(to, value, 2, count, stream, true); }
STUB_API(cuMemsetD32Async)(CUdeviceptr to, unsigned value, size_t count, CUstream stream) { return stub::fill(to, value, 4, count, stream, true); }
