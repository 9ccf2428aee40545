// GPU simulator for tests. Runs a kernel's blocks one after another, and a block's threads as fibers of one CPU thread.
//
// A fiber runs until it reaches a block barrier or a warp-wide instruction, and a warp runs until it reaches a block barrier. The schedule is deterministic and
// as far from lockstep as a GPU permits. Running threads and blocks in reversed order must not change any bit; if it does, a barrier is missing or
// uninitialized memory is read.
//
// Finds: wrong indices, tails, strides and fragments, barriers that not all threads reach, most missing barriers, wrong arithmetic.
// Does not find: memory orderings that only a GPU's weaker memory model permits, errors in the emulated instructions themselves (include/common/ptx.h), limits
// of registers and memory, slow code.
#pragma once

#include <functional>

namespace simulator {

struct Index {
  unsigned x = 1, y = 1, z = 1;
};

// Options for the next launches.
struct Options {
  bool reversed = false;         // run the last block and the last thread first
  unsigned max_blocks = 0;       // limit the grid to this many blocks in x and in y, so that kernels must loop; 0 for no limit
  unsigned only_blocks = 0;      // run only the first blocks of the grid, without changing its size; 0 for all
  bool refuse_launches = false;  // every launch fails
};

extern Options options;
extern unsigned long launches;  // number of launches so far

void run(Index grid, Index block, const std::function<void()>& thread);

// Called by the running thread.
void block_barrier(int site);
// A warp-wide instruction. Every lane passes its `argument`; the last lane to arrive performs the instruction on the arguments of lanes 0 to 31.
void warp_instruction(int site, void* argument, void (*perform)(void* const* lanes));

[[noreturn]] void fail(const char* what);  // reports the thread and block, and aborts

}  // namespace simulator

extern simulator::Index threadIdx, blockIdx, blockDim, gridDim;
