// Arrays between inaccessible guard pages, so that accesses past the end, or far before the start, crash. The few bytes between the array and the guard pages
// that alignment requires read as NaN, must be unchanged at the end, and are poisoned under AddressSanitizer.
#pragma once

#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, size) static_cast<void>(0)
#define ASAN_UNPOISON_MEMORY_REGION(address, size) static_cast<void>(0)
#endif

namespace scm::testing {

template <typename T>
class Array {
 public:
  // Aligned to 16 but not to 32 bytes, plus `offset` elements.
  explicit Array(std::size_t count, int offset = 0) : count_(count), bytes_(count * sizeof(T)) {
    const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    const std::size_t used = (bytes_ + 64 + page - 1) / page * page;
    mapped_ = used + 2 * page;
    map_ = static_cast<std::uint8_t*>(mmap(nullptr, mapped_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    pages_ = map_ + page;
    end_ = pages_ + used;
    if (map_ == MAP_FAILED || mprotect(pages_, used, PROT_READ | PROT_WRITE) != 0) throw std::bad_alloc();
    std::memset(pages_, 0xff, used);
    std::size_t start = (used - bytes_ - static_cast<std::size_t>(offset) * sizeof(T)) / 16 * 16;
    if (start % 32 == 0) start -= 16;
    start += static_cast<std::size_t>(offset) * sizeof(T);
    data_ = reinterpret_cast<T*>(pages_ + start);
    ASAN_POISON_MEMORY_REGION(pages_, start);
    ASAN_POISON_MEMORY_REGION(pages_ + start + bytes_, used - start - bytes_);
  }

  explicit Array(const std::vector<T>& values, int offset = 0) : Array(values.size(), offset) {
    if (bytes_ > 0) std::memcpy(static_cast<void*>(data_), values.data(), bytes_);
  }

  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;

  ~Array() {
    ASAN_UNPOISON_MEMORY_REGION(pages_, end_ - pages_);
    const auto* start = reinterpret_cast<const std::uint8_t*>(data_);
    for (const std::uint8_t* byte = pages_; byte < end_; ++byte) {
      if (byte >= start && byte < start + bytes_) continue;
      if (*byte != 0xff) {
        ADD_FAILURE() << "a kernel wrote " << byte - start << " bytes from the start of an array of " << bytes_;
        break;
      }
    }
    munmap(map_, mapped_);
  }

  T* data() { return data_; }
  std::vector<T> values() const { return std::vector<T>(data_, data_ + count_); }

 private:
  std::size_t count_, bytes_, mapped_;
  std::uint8_t *map_, *pages_, *end_;
  T* data_;
};

}  // namespace scm::testing
