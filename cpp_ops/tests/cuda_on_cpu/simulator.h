// A GPU for tests, without a GPU: runs a kernel's blocks one after the other, and a block's threads as fibers of one thread of the CPU.
//
// A fiber runs until it comes to a barrier or to an instruction of its whole warp, and a warp until it comes to a barrier of its whole block: the schedule
// is fixed, and as far from lockstep as a GPU's may be. Running the threads, and the blocks, in the opposite order must not change a bit; where it does,
// a barrier is missing or something is read that nothing wrote.
//
// What it finds: wrong indices, tails, strides and fragments, barriers that not all threads reach, missing barriers (most of them), wrong arithmetic.
// What it cannot find: orders of memory accesses that only a GPU's weaker rules allow, errors in what this machine takes the GPU's instructions to be
// (include/common/ptx.h), limits of registers and memory, speed.
#pragma once

#include <functional>

namespace simulator {

struct Index {
  unsigned x = 1, y = 1, z = 1;
};

// How to run what is launched next.
struct Options {
  bool reversed = false;        // last block and last thread first
  unsigned max_blocks = 0;       // run a grid of at most so many blocks in x and in y, whatever the launch asks for: kernels must loop; 0 for no limit
  unsigned only_blocks = 0;      // of a grid as large as was asked for, run so many; 0 for all
  bool refuse_launches = false;  // every launch is an error
};

extern Options options;
extern unsigned long launches;  // so far

void run(Index grid, Index block, const std::function<void()>& thread);

// For the thread that is running.
void block_barrier(int site);
// All lanes of a warp: each brings `argument`; the last to come performs the instruction on those of lanes 0 to 31.
void warp_instruction(int site, void* argument, void (*perform)(void* const* lanes));

[[noreturn]] void fail(const char* what);  // tells which thread of which block, and ends the program

}  // namespace simulator

extern simulator::Index threadIdx, blockIdx, blockDim, gridDim;
