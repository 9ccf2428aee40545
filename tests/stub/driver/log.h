// Settings from the environment, the log, and the failures that a test orders. README.md describes the variables and the kinds of lines.
#pragma once

#define __CUDA_API_VERSION_INTERNAL  // cuda.h then declares the functions under their real names, cuMemAlloc_v2 for example
#include <cuda.h>

#include <cstddef>
#include <mutex>

#define STUB_EXPORT extern "C" __attribute__((visibility("default")))
// A function of the driver's interface.
#define STUB_API(name) STUB_EXPORT CUresult CUDAAPI name

namespace stub {

struct Settings {
  int device_count;
  int driver_version;     // as cuDriverGetVersion returns it: 13050 is 13.5
  size_t memory;          // bytes of each device; 0 for those of the model
  bool strict_capture;    // a forbidden call during a capture is an error
  CUresult unknown;       // what functions return that are not implemented
  bool trace;
};
const Settings& settings();

// Append a line to the log: its number, the thread, milliseconds since the start, the kind, and the formatted details, separated by tabs.
void say(const char* kind, const char* format, ...) __attribute__((format(printf, 2, 3)));
double milliseconds();  // since the start

// Return the error that a test has ordered for a function (scm_stub_fail), or success.
CUresult ordered_failure(const char* function);

// Protects all state of the stub. Recursive, as the functions call each other.
std::recursive_mutex& mutex();
using Lock = std::lock_guard<std::recursive_mutex>;

}  // namespace stub

// Return from a function of the interface if a test has ordered it to fail.
#define STUB_FAIL_IF_ORDERED()                                                      \
  do {                                                                              \
    if (const CUresult ordered = stub::ordered_failure(__func__)) return ordered;   \
  } while (0)
