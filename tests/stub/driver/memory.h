// Memory of the devices and pinned memory of the host: ranges of addresses of their own, so that an address tells what it is. Addresses are never used twice,
// freed pages fault, and between two blocks lies a page that faults.
#pragma once

#include <cstddef>
#include <vector>

#include "log.h"

namespace stub {

struct Block {
  char* start;
  size_t size;    // as it was asked for
  size_t mapped;  // in whole pages
  bool live;
};

class Region {
 public:
  Region(const char* name, size_t span) : name_(name), span_(span) {}

  // Return a zeroed block, or nullptr if more than `limit` bytes would be in use.
  void* allocate(size_t size, size_t limit);
  bool free(void* address);  // false if no block starts there
  const Block* find(const void* address) const;
  bool contains(const void* address) const;  // of the range, in a block or not
  const char* name() const { return name_; }
  size_t in_use() const { return in_use_; }

 private:
  const char* name_;
  size_t span_;
  char* base_ = nullptr;
  char* next_ = nullptr;
  size_t in_use_ = 0;
  std::vector<Block> blocks_;  // in the order of their addresses
};

constexpr int kMaxDevices = 8;
constexpr size_t kUnlimited = static_cast<size_t>(-1);

Region& device_memory(int device);
Region& pinned_memory();

// The region of an address, or nullptr if it is ordinary memory of the host.
Region* region_of(const void* address);
// The device of an address, or -1.
int device_of(const void* address);
// 'D' for memory of a device, 'P' for pinned, 'H' for ordinary memory of the host.
char memory_letter(const void* address);
// Return false, with a line in the log, if a range begins in a region of the stub and is not in one live block.
bool is_valid(const void* address, size_t size);

}  // namespace stub
