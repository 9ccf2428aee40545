// Runs a 3x3 convolution (winograd/winograd.h) on the threads of a session.
#pragma once

#include "common/ort.h"
#include "winograd/winograd.h"

namespace scm::winograd {

// True if this processor has fused multiply-adds for vectors: x86-64-v3, x86-64-v4 or AArch64. The kernels are correct on others, but were not timed there.
bool available();

// Chooses how a run on `threads` threads divides its work. V takes at most 64 MiB, or the V of 32 tiles if that is more.
Plan choose_plan(const Sizes& sizes, std::int64_t threads);

// Computes the convolution. Of the parameters, plan, first, count and v need not be set.
template <typename T>
void run(const Context& context, Params<T> p);

}  // namespace scm::winograd
