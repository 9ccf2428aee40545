#include "log.h"

#include <sys/syscall.h>
#include <unistd.h>

#include <chrono>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>

namespace stub {
namespace {

using Clock = std::chrono::steady_clock;

const char* variable(const char* name) {
  const char* value = std::getenv(name);
  return value != nullptr && *value != '\0' ? value : nullptr;
}

template <typename T>
T number(const char* name, T fallback) {
  const char* value = variable(name);
  return value == nullptr ? fallback : static_cast<T>(std::strtoull(value, nullptr, 10));
}

struct Log {
  std::FILE* file = nullptr;
  unsigned long lines = 0;
  const Clock::time_point start = Clock::now();

  Log() {
    if (const char* path = variable("SCM_STUB_LOG")) file = std::fopen(path, "a");
    // A line each with SCM_STUB_TRACE, to have the last one before a crash. Otherwise scm_stub_mark and the end of the process write the buffer.
    if (file != nullptr) std::setvbuf(file, nullptr, settings().trace ? _IOLBF : _IOFBF, 1 << 16);
  }
};

Log& log() {
  static Log* const log = new Log;  // never destroyed: libraries call the driver while the process ends
  return *log;
}

struct Failure {
  CUresult error;
  int times;
};

std::map<std::string, Failure>& failures() {
  static auto* const failures = new std::map<std::string, Failure>;
  return *failures;
}

// Opens the log when the library is loaded, so that its first line tells that the stub is used.
[[maybe_unused]] const bool started = (say("start", "pid %d", getpid()), true);

}  // namespace

std::recursive_mutex& mutex() {
  static auto* const mutex = new std::recursive_mutex;
  return *mutex;
}

const Settings& settings() {
  static const Settings settings = {
      number("SCM_STUB_DEVICES", 1),
      number("SCM_STUB_DRIVER", 13050),
      number<size_t>("SCM_STUB_MEMORY", 0),
      variable("SCM_STUB_LAX_CAPTURE") == nullptr,
      static_cast<CUresult>(number("SCM_STUB_UNKNOWN", static_cast<int>(CUDA_ERROR_NOT_SUPPORTED))),
      number("SCM_STUB_TRACE", 0) != 0,
  };
  return settings;
}

double milliseconds() { return std::chrono::duration<double, std::milli>(Clock::now() - log().start).count(); }

void say(const char* kind, const char* format, ...) {
  if (log().file == nullptr) return;
  const Lock lock(mutex());
  std::va_list arguments;
  va_start(arguments, format);
  std::fprintf(log().file, "%lu\t%ld\t%.3f\t%s\t", log().lines++, syscall(SYS_gettid), milliseconds(), kind);
  std::vfprintf(log().file, format, arguments);
  std::fputc('\n', log().file);
  va_end(arguments);
}

CUresult ordered_failure(const char* function) {
  const Lock lock(mutex());
  const auto found = failures().find(function);
  if (found == failures().end() || found->second.times == 0) return CUDA_SUCCESS;
  --found->second.times;
  say("ordered", "%s fails with %d", function, static_cast<int>(found->second.error));
  return found->second.error;
}

}  // namespace stub

// For tests, through ctypes: a line of their own. Everything before it is in the file afterwards.
STUB_EXPORT void scm_stub_mark(const char* text) {
  stub::say("mark", "%s", text);
  const stub::Lock lock(stub::mutex());
  if (stub::log().file != nullptr) std::fflush(stub::log().file);
}

// For tests: let the next calls of a function, named as in STUB_API, return an error.
STUB_EXPORT void scm_stub_fail(const char* function, int error, int times) {
  const stub::Lock lock(stub::mutex());
  stub::failures()[function] = {static_cast<CUresult>(error), times};
}

// For the generated functions and the other libraries of the stub.
STUB_EXPORT int scm_stub_unknown(const char* function) {
  stub::say("UNKNOWN", "%s called: %d", function, static_cast<int>(stub::settings().unknown));
  return stub::settings().unknown;
}
STUB_EXPORT void scm_stub_say(const char* kind, const char* text) { stub::say(kind, "%s", text); }
