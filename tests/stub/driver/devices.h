// The devices: how many there are, their model, and their contexts.
#pragma once

#include "log.h"

// The driver's opaque type. A device has one primary context; others are not supported.
struct CUctx_st {
  int device;
  int retained;
  unsigned flags;
};

namespace stub {

// What the models differ in.
struct Model {
  const char* setting;  // value of SCM_STUB_DEVICE
  const char* name;
  int major, minor;     // compute capability
  size_t memory;        // bytes
  int multiprocessors;
  int shared_per_multiprocessor, shared_per_block;  // bytes
  int clock_khz, memory_clock_khz, bus_bits, l2_bytes;
};
const Model& model();

size_t total_memory();  // of each device
bool is_device(int device);
CUctx_st* primary_context(int device);
// The context that is current in the calling thread, or nullptr.
CUctx_st* current_context();
// Its device; 0 if there is none.
int current_device();

}  // namespace stub
