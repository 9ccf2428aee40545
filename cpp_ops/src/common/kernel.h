// Declarations shared by an operator's op.h, cpu.cc and cuda.cu.
//
// CPU kernels are compiled once per x86-64 level and dispatched at run time, so that one binary serves old and new processors. op.h defines
// `template <typename T> struct Params` in the operator's namespace and declares its kernels with SCM_DECLARE_KERNELS. cpu.cc defines
//   template <typename T> void SCM_CPU(const Params<T>&, std::int64_t begin, std::int64_t end);
// and cuda.cu defines
//   template <typename T> const char* cuda(const Params<T>&, void* stream);
// each with explicit instantiations. [begin, end) is a range of the operator's units of work: rows, elements or samples.
//
// cpu.cc must not include ONNX Runtime's headers or call templates of the standard library: the linker keeps one copy of such a function, which may be
// compiled for instructions that this processor does not have.
#pragma once

#include <cstdint>

#include "common/types.h"

#define SCM_PASTE_EXPANDED(a, b) a##b
#define SCM_PASTE(a, b) SCM_PASTE_EXPANDED(a, b)
#define SCM_CPU SCM_PASTE(cpu_, SCM_ISA)

#define SCM_INSTANTIATE_CPU                                                               \
  template void SCM_CPU<float>(const Params<float>&, std::int64_t, std::int64_t);         \
  template void SCM_CPU<float16>(const Params<float16>&, std::int64_t, std::int64_t);
#define SCM_INSTANTIATE_CUDA                                   \
  template const char* cuda<float>(const Params<float>&, void*);     \
  template const char* cuda<float16>(const Params<float16>&, void*); \
  template const char* cuda<bfloat16>(const Params<bfloat16>&, void*);

#define SCM_DECLARE_CPU_KERNELS                                         \
  template <typename T>                                                 \
  void cpu_generic(const Params<T>&, std::int64_t begin, std::int64_t end); \
  template <typename T>                                                 \
  void cpu_v3(const Params<T>&, std::int64_t begin, std::int64_t end);  \
  template <typename T>                                                 \
  void cpu_v4(const Params<T>&, std::int64_t begin, std::int64_t end);  \
  template <typename T>                                                 \
  CpuKernel<Params<T>> cpu_kernel() {                                   \
    return SCM_CHOOSE_KERNEL(T);                                        \
  }

// `cuda` returns null, or CUDA's error message if the launch failed.
#define SCM_DECLARE_KERNELS                                             \
  SCM_DECLARE_CPU_KERNELS                                               \
  template <typename T>                                                 \
  const char* cuda(const Params<T>&, void* stream);

#ifdef SCM_OPS_X86_LEVELS
#define SCM_CHOOSE_KERNEL(T) cpu_level() == CpuLevel::v4 ? cpu_v4<T> : cpu_level() == CpuLevel::v3 ? cpu_v3<T> : cpu_generic<T>
#else
#define SCM_CHOOSE_KERNEL(T) cpu_generic<T>
#endif

namespace scm {

template <typename Params>
using CpuKernel = void (*)(const Params&, std::int64_t begin, std::int64_t end);

enum class CpuLevel { generic, v3, v4 };  // x86-64 microarchitecture levels of the psABI: v3 has AVX2 and FMA, v4 has AVX-512

CpuLevel cpu_level();  // the highest level that the processor and the operating system support and SCM_OPS_MAX_ISA admits

// Number of elements per piece of work: small enough to balance the threads, large enough that scheduling costs little.
constexpr std::int64_t kGrain = 32768;

// The same in rows of `row` elements.
constexpr std::int64_t grain_in_rows(std::int64_t row) { return row >= kGrain || row < 1 ? 1 : kGrain / row; }

}  // namespace scm
