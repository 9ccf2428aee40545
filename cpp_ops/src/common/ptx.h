// Wrappers of PTX instructions that have no CUDA C++ intrinsic. Matrix instructions are warp-wide: all lanes of the warp must execute them together.
// tests/cuda_on_cpu has a file of the same name with an emulation on the CPU.
//
// The PTX ISA defines which matrix elements a lane holds (sections "Matrix fragments for mma.m16n8k16" and "mma.m16n8k8", and "ldmatrix"). With
// lane = 4 g + t:
//   16-bit A [16, 16]   a[0]: (g, 2t), (g, 2t + 1)   a[1]: row g + 8   a[2]: columns + 8   a[3]: both     the lower column in the lower half
//   16-bit B [16, 8]    b0: (2t, g), (2t + 1, g)     b1: rows + 8
//   TF32 A [16, 8]      a[0]: (g, t)   a[1]: (g + 8, t)   a[2]: (g, t + 4)   a[3]: (g + 8, t + 4)
//   TF32 B [8, 8]       b0: (t, g)     b1: (t + 4, g)
//   C [16, 8]           c[0], c[1]: (g, 2t), (g, 2t + 1)     c[2], c[3]: row g + 8
#pragma once

#include "common/types.h"

namespace scm {

// Returns the square root to about 1 ulp.
__device__ __forceinline__ float sqrt_approximate(float x) {
  float y;
  asm("sqrt.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Returns 2^x with a relative error of at most 2^-22, or 0 if the result would be denormal.
__device__ __forceinline__ float exp2_approximate(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Rounds both to T and packs them, `low` in the lower half.
template <typename T>
__device__ std::uint32_t pack(float low, float high);

template <>
__device__ __forceinline__ std::uint32_t pack<float16>(float low, float high) {
  std::uint32_t both;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}

template <>
__device__ __forceinline__ std::uint32_t pack<bfloat16>(float low, float high) {
  std::uint32_t both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}

// Returns the dynamic shared memory of the block.
__device__ __forceinline__ unsigned char* dynamic_shared_memory() {
  extern __shared__ __align__(1024) unsigned char memory[];
  return memory;
}

// Starts a copy of 16 bytes from global to shared memory. Writes zeros instead if `valid` is false; then `from` is not read, but must be aligned.
__device__ __forceinline__ void start_copy(void* to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(static_cast<std::uint32_t>(__cvta_generic_to_shared(to))), "l"(__cvta_generic_to_global(from)), "r"(valid ? 16 : 0)
               : "memory");
}

// Makes a group of the copies that the thread has started since the previous group.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most the last kPending groups of the thread are unfinished. The copies of other threads are visible after a barrier.
template <int kPending>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Loads four 8 x 8 matrices of 16-bit elements from shared memory. Lane l passes the address of row l % 8 of matrix l / 8, 16 aligned bytes, and receives
// in r[i] the elements (g, 2t) and (g, 2t + 1) of matrix i.
__device__ __forceinline__ void load_matrices(std::uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(static_cast<std::uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
}

// Same as load_matrices, transposed: r[i] receives the elements (2t, g) and (2t + 1, g) of matrix i.
__device__ __forceinline__ void load_matrices_transposed(std::uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(static_cast<std::uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
}

// Computes C += A B for 16-bit T, m16n8k16.
template <typename T>
__device__ void multiply_add(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1);

template <>
__device__ __forceinline__ void multiply_add<float16>(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ __forceinline__ void multiply_add<bfloat16>(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Computes C += A B for TF32, floats whose lower 13 bits are zero, m16n8k8.
__device__ __forceinline__ void multiply_add_tf32(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// -- Hopper's products of matrices in shared memory, sm_90a only. A warpgroup, 128 neighboring threads, executes them together ------------------------------

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// Returns the descriptor of a matrix of 16 terms in rows of 128 bytes, 64 terms of 16 bits, in which chunk c of row r, 16 bytes, is stored at position
// c ^ r % 8. `rows` is aligned to 1024 bytes, plus 32 bytes for each 16 terms before. ("Matrix-descriptor", 128-byte swizzle, K-major.)
__device__ __forceinline__ std::uint64_t matrix_descriptor(const void* rows) {
  const auto address = static_cast<std::uint32_t>(__cvta_generic_to_shared(rows));
  constexpr std::uint64_t eight_rows = 1024 >> 4, swizzle_of_128_bytes = 1;
  return (address & 0x3ffffu) >> 4 | std::uint64_t{1} << 16 | eight_rows << 32 | swizzle_of_128_bytes << 62;
}

// Makes what the thread wrote to shared memory visible to start_multiply_add, before a barrier.
__device__ __forceinline__ void publish_shared_memory() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Orders the accesses to sums before the products that follow.
__device__ __forceinline__ void publish_sums() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Starts C += A B for 16-bit T with A [64, 16] and B [16, n]; n is 8 times the first dimension of c. The rows of the descriptors are the rows of A and the
// columns of B. Warp w of the warpgroup holds rows 16 w to 16 w + 15 of C, 8 columns in each c[i], as in multiply_add.
template <typename T>
__device__ void start_multiply_add(float (&c)[8][4], std::uint64_t a, std::uint64_t b);
template <typename T>
__device__ void start_multiply_add(float (&c)[16][4], std::uint64_t a, std::uint64_t b);

#define SCM_WGMMA_64(type)                                                                \
  asm volatile(                                                                           \
      "{\n.reg .pred add;\nsetp.ne.b32 add, 1, 0;\n"                                      \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " "                     \
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, " \
      "%32, %33, add, 1, 1, 0, 0;\n}\n"                                                   \
      : "+f"(c[0][0]), "+f"(c[0][1]), "+f"(c[0][2]), "+f"(c[0][3]),                       \
        "+f"(c[1][0]), "+f"(c[1][1]), "+f"(c[1][2]), "+f"(c[1][3]),                       \
        "+f"(c[2][0]), "+f"(c[2][1]), "+f"(c[2][2]), "+f"(c[2][3]),                       \
        "+f"(c[3][0]), "+f"(c[3][1]), "+f"(c[3][2]), "+f"(c[3][3]),                       \
        "+f"(c[4][0]), "+f"(c[4][1]), "+f"(c[4][2]), "+f"(c[4][3]),                       \
        "+f"(c[5][0]), "+f"(c[5][1]), "+f"(c[5][2]), "+f"(c[5][3]),                       \
        "+f"(c[6][0]), "+f"(c[6][1]), "+f"(c[6][2]), "+f"(c[6][3]),                       \
        "+f"(c[7][0]), "+f"(c[7][1]), "+f"(c[7][2]), "+f"(c[7][3])                        \
      : "l"(a), "l"(b))
#define SCM_WGMMA_128(type)                                                               \
  asm volatile(                                                                           \
      "{\n.reg .pred add;\nsetp.ne.b32 add, 1, 0;\n"                                      \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " "                    \
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "  \
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "  \
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, " \
      "%64, %65, add, 1, 1, 0, 0;\n}\n"                                                   \
      : "+f"(c[0][0]), "+f"(c[0][1]), "+f"(c[0][2]), "+f"(c[0][3]),                       \
        "+f"(c[1][0]), "+f"(c[1][1]), "+f"(c[1][2]), "+f"(c[1][3]),                       \
        "+f"(c[2][0]), "+f"(c[2][1]), "+f"(c[2][2]), "+f"(c[2][3]),                       \
        "+f"(c[3][0]), "+f"(c[3][1]), "+f"(c[3][2]), "+f"(c[3][3]),                       \
        "+f"(c[4][0]), "+f"(c[4][1]), "+f"(c[4][2]), "+f"(c[4][3]),                       \
        "+f"(c[5][0]), "+f"(c[5][1]), "+f"(c[5][2]), "+f"(c[5][3]),                       \
        "+f"(c[6][0]), "+f"(c[6][1]), "+f"(c[6][2]), "+f"(c[6][3]),                       \
        "+f"(c[7][0]), "+f"(c[7][1]), "+f"(c[7][2]), "+f"(c[7][3]),                       \
        "+f"(c[8][0]), "+f"(c[8][1]), "+f"(c[8][2]), "+f"(c[8][3]),                       \
        "+f"(c[9][0]), "+f"(c[9][1]), "+f"(c[9][2]), "+f"(c[9][3]),                       \
        "+f"(c[10][0]), "+f"(c[10][1]), "+f"(c[10][2]), "+f"(c[10][3]),                   \
        "+f"(c[11][0]), "+f"(c[11][1]), "+f"(c[11][2]), "+f"(c[11][3]),                   \
        "+f"(c[12][0]), "+f"(c[12][1]), "+f"(c[12][2]), "+f"(c[12][3]),                   \
        "+f"(c[13][0]), "+f"(c[13][1]), "+f"(c[13][2]), "+f"(c[13][3]),                   \
        "+f"(c[14][0]), "+f"(c[14][1]), "+f"(c[14][2]), "+f"(c[14][3]),                   \
        "+f"(c[15][0]), "+f"(c[15][1]), "+f"(c[15][2]), "+f"(c[15][3])                    \
      : "l"(a), "l"(b))

template <>
__device__ __forceinline__ void start_multiply_add<float16>(float (&c)[8][4], std::uint64_t a, std::uint64_t b) {
  SCM_WGMMA_64("f16");
}

template <>
__device__ __forceinline__ void start_multiply_add<bfloat16>(float (&c)[8][4], std::uint64_t a, std::uint64_t b) {
  SCM_WGMMA_64("bf16");
}

template <>
__device__ __forceinline__ void start_multiply_add<float16>(float (&c)[16][4], std::uint64_t a, std::uint64_t b) {
  SCM_WGMMA_128("f16");
}

template <>
__device__ __forceinline__ void start_multiply_add<bfloat16>(float (&c)[16][4], std::uint64_t a, std::uint64_t b) {
  SCM_WGMMA_128("bf16");
}

#undef SCM_WGMMA_64
#undef SCM_WGMMA_128

// Makes a group of the products that were started since the previous group.
__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most the last kPending groups are unfinished.
template <int kPending>
__device__ __forceinline__ void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

#endif

}  // namespace scm
