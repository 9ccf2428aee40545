// The environment variable SCM_OPS_MAX_ISA, which limits the instruction sets of the CPU kernels: for debugging, tests and benchmarks.
#pragma once

namespace scm {

enum class MaxIsa { generic, avx2, avx512, avx512_bf16, amx };

// Returns the variable's value; amx, no limit, if it is unset, empty or unknown. It is read once.
MaxIsa max_isa();

// Throws Error if the variable has an unknown value.
void check_max_isa();

}  // namespace scm
