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

#include <cstddef>
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
  int major_capability = 8;      // the GPU's compute capability
};

extern Options options;
extern unsigned long launches;        // number of launches so far
extern unsigned long bank_conflicts;  // number of 8-row reads by load_matrices so far in which two rows are in the same banks

void run(Index grid, Index block, std::size_t shared_bytes, const std::function<void()>& thread);

// Called by the running thread.
void block_barrier(int site);
bool block_or(int site, bool value);  // a barrier that returns whether any thread passed true
// A warp-wide instruction. Every lane passes its `argument`; the last lane to arrive performs the instruction on the arguments of lanes 0 to 31.
void warp_instruction(int site, void* argument, void (*perform)(void* const* lanes));

// The block's dynamic shared memory, filled with NaN before each block and followed by an inaccessible page.
unsigned char* shared_memory();
// Copies of 16 bytes to shared memory that the thread waits for in groups. In the usual order of threads they are made as late as permitted, when the thread
// waits, and in reversed order at once: a missing wait and memory that is still being read both show.
void start_copy(void* to, const void* from, bool valid);
void commit_copies();
void wait_for_copies(std::size_t pending);  // until at most `pending` groups are unfinished
// Hopper's fence between copies that the thread has waited for and instructions that read shared memory by themselves.
void publish_copies();
bool copies_published();

[[noreturn]] void fail(const char* what);  // reports the thread and block, and aborts

}  // namespace simulator

extern simulator::Index threadIdx, blockIdx, blockDim, gridDim;
