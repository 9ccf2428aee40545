#undef _FORTIFY_SOURCE  // its checked longjmp rejects jumps to other stacks
#include "simulator.h"

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <new>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

simulator::Index threadIdx, blockIdx, blockDim, gridDim;

namespace simulator {

Options options;
unsigned long launches = 0, bank_conflicts = 0;

namespace {

constexpr std::size_t kStack = 256 * 1024;
constexpr unsigned kWarp = 32;

enum class State { ready, at_barrier, at_instruction, done };

// A point of execution to switch back to. swapcontext makes a system call to save the signal mask, so it is used only for the first entry of a fiber; later
// switches use longjmp. AddressSanitizer intercepts longjmp, so its builds always use swapcontext.
struct Continuation {
  ucontext_t context = {};
  jmp_buf jump = {};
  bool entered = false;
};

void switch_to(Continuation& from, Continuation& to) {
#ifndef __SANITIZE_ADDRESS__
  if (_setjmp(from.jump) != 0) return;
  from.entered = true;
  if (to.entered) _longjmp(to.jump, 1);
  to.entered = true;
#endif
  swapcontext(&from.context, &to.context);
}

struct Copy {
  void* to;
  const void* from;  // null: zeros

  void perform() const {
    if (from) {
      std::memcpy(to, from, 16);
    } else {
      std::memset(to, 0, 16);
    }
  }
};

struct Fiber {
  Continuation continuation;
  std::unique_ptr<char[]> stack{new char[kStack]};
  State state = State::done;
  int site = 0;
  void* argument = nullptr;
  bool value = false;                        // of block_or
  std::deque<std::vector<Copy>> copies;      // groups that are not finished
  std::vector<Copy> uncommitted;
  bool published = true;
};

std::vector<std::unique_ptr<Fiber>> fibers;  // reused by later launches
Continuation scheduler;
unsigned current = 0, threads = 0;
const std::function<void()>* body = nullptr;

// Dynamic shared memory: the last bytes before a page that is not accessible.
constexpr std::size_t kShared = 256 * 1024;
unsigned char *shared_end = nullptr, *shared = nullptr;

void set_shared_size(std::size_t bytes) {
  if (!shared_end) {
    auto* memory = static_cast<unsigned char*>(mmap(nullptr, 2 * kShared, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (memory == MAP_FAILED || mprotect(memory, kShared, PROT_READ | PROT_WRITE) != 0) throw std::bad_alloc();
    shared_end = memory + kShared;
  }
  if (bytes > kShared || bytes % 1024 != 0) fail("has a size of shared memory that the simulator does not support");
  shared = shared_end - bytes;
}

// AddressSanitizer must be told which stack is in use.
void enter(unsigned index) {
  current = index;
  threadIdx = {index % blockDim.x, index / blockDim.x, 0};
#ifdef __SANITIZE_ADDRESS__
  void* own = nullptr;
  __sanitizer_start_switch_fiber(&own, fibers[index]->stack.get(), kStack);
#endif
  switch_to(scheduler, fibers[index]->continuation);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(own, nullptr, nullptr);
#endif
}

#ifdef __SANITIZE_ADDRESS__
const void* scheduler_stack = nullptr;
std::size_t scheduler_size = 0;
#endif

void leave() {
#ifdef __SANITIZE_ADDRESS__
  void* own = nullptr;
  __sanitizer_start_switch_fiber(&own, scheduler_stack, scheduler_size);
#endif
  switch_to(fibers[current]->continuation, scheduler);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(own, &scheduler_stack, &scheduler_size);
#endif
}

void fiber_main() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_size);
#endif
  for (;;) {  // a finished fiber is reused for a thread of the next block
    (*body)();
    fibers[current]->state = State::done;
    leave();
  }
}

// Runs a warp until all its lanes wait for the rest of the block or are done. Returns false if no lane could run.
bool run_warp(unsigned first) {
  bool any = false;
  for (bool progress = true; progress; any |= progress) {
    progress = false;
    for (unsigned lane = 0; lane < kWarp; ++lane) {
      const unsigned index = first + (options.reversed ? kWarp - 1 - lane : lane);
      if (fibers[index]->state != State::ready) continue;
      enter(index);
      progress = true;
    }
  }
  return any;
}

void run_block() {
  for (unsigned i = 0; i < threads; ++i) fibers[i]->state = State::ready;
  std::memset(shared, 0xff, static_cast<std::size_t>(shared_end - shared));
  for (bool progress = true; progress;) {
    progress = false;
    for (unsigned i = 0; i < threads; i += kWarp) {
      if (run_warp(options.reversed ? threads - kWarp - i : i)) progress = true;
    }
  }
  for (unsigned i = 0; i < threads; ++i) {
    current = i;
    if (fibers[i]->state == State::at_barrier) fail("waits at a barrier that other threads of the block do not reach");
    if (fibers[i]->state == State::at_instruction) fail("waits at an instruction of its warp that other lanes do not reach");
    if (!fibers[i]->copies.empty() || !fibers[i]->uncommitted.empty()) fail("ends before its copies are finished");
  }
}

}  // namespace

void fail(const char* what) {
  std::fprintf(stderr, "cuda_on_cpu: thread %u of block (%u, %u) %s\n", current, blockIdx.x, blockIdx.y, what);
  std::fflush(stderr);
  std::abort();
}

void run(Index grid, Index block, std::size_t shared_bytes, const std::function<void()>& thread) {
  ++launches;
  set_shared_size(shared_bytes);
  threads = block.x;
  if (block.y != 1 || block.z != 1 || grid.z != 1 || threads == 0 || threads > 1024 || threads % kWarp != 0) fail("has a block shape that the simulator does not support");
  while (fibers.size() < threads) {
    fibers.push_back(std::make_unique<Fiber>());
    Fiber& fiber = *fibers.back();
    ucontext_t& context = fiber.continuation.context;
    getcontext(&context);
    context.uc_stack.ss_sp = fiber.stack.get();
    context.uc_stack.ss_size = kStack;
    makecontext(&context, fiber_main, 0);
  }
  if (options.max_blocks > 0) {
    if (grid.x > options.max_blocks) grid.x = options.max_blocks;
    if (grid.y > options.max_blocks) grid.y = options.max_blocks;
  }
  body = &thread;
  blockDim = block;
  gridDim = grid;
  const unsigned blocks = options.only_blocks > 0 ? options.only_blocks : grid.x * grid.y;
  for (unsigned i = 0; i < blocks; ++i) {
    const unsigned index = options.reversed ? blocks - 1 - i : i;
    blockIdx = {index % grid.x, index / grid.x, 0};
    run_block();
  }
}

void block_barrier(int site) {
  Fiber& self = *fibers[current];
  self.state = State::at_barrier;
  self.site = site;
  for (unsigned i = 0; i < threads; ++i) {
    if (fibers[i]->state == State::done) fail("comes to a barrier after another thread of the block has ended");
    if (fibers[i]->state != State::at_barrier) {
      leave();
      return;
    }
  }
  for (unsigned i = 0; i < threads; ++i) {
    if (fibers[i]->site != site) fail("is at another barrier than the rest of its block");
    fibers[i]->state = State::ready;
  }
}

bool block_or(int site, bool value) {
  fibers[current]->value = value;
  block_barrier(site);
  bool any = false;
  for (unsigned i = 0; i < threads; ++i) any |= fibers[i]->value;
  block_barrier(-site);  // no thread sets its next value before all have read this one
  return any;
}

unsigned char* shared_memory() { return shared; }

void start_copy(void* to, const void* from, bool valid) {
  if (reinterpret_cast<std::uintptr_t>(to) % 16 != 0 || reinterpret_cast<std::uintptr_t>(from) % 16 != 0) fail("copies from or to an address that is not aligned");
  const Copy copy{to, valid ? from : nullptr};
  if (options.reversed) {
    copy.perform();
  } else {
    fibers[current]->uncommitted.push_back(copy);
  }
}

void commit_copies() {
  Fiber& self = *fibers[current];
  self.copies.push_back(std::move(self.uncommitted));
  self.uncommitted.clear();
}

void wait_for_copies(std::size_t pending) {
  auto& groups = fibers[current]->copies;
  for (; groups.size() > pending; groups.pop_front()) {
    for (const Copy& copy : groups.front()) copy.perform();
    fibers[current]->published = false;
  }
}

void publish_copies() { fibers[current]->published = true; }

bool copies_published() { return fibers[current]->published; }

void warp_instruction(int site, void* argument, void (*perform)(void* const* lanes)) {
  Fiber& self = *fibers[current];
  self.state = State::at_instruction;
  self.site = site;
  self.argument = argument;
  const unsigned first = current / kWarp * kWarp;
  void* arguments[kWarp];
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    const Fiber& other = *fibers[first + lane];
    if (other.state == State::done) fail("comes to an instruction of its warp after another lane has ended");
    if (other.state != State::at_instruction) {
      leave();
      return;
    }
    if (other.site != site) fail("is at another instruction than the rest of its warp");
    arguments[lane] = other.argument;
  }
  perform(arguments);
  for (unsigned lane = 0; lane < kWarp; ++lane) fibers[first + lane]->state = State::ready;
}

}  // namespace simulator
