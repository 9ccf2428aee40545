#include "memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>

namespace stub {
namespace {

constexpr size_t kPage = 4096;
constexpr size_t kDeviceSpan = size_t{2} << 40, kPinnedSpan = size_t{4} << 40;  // address space, not memory
constexpr int kReserved = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;

}  // namespace

void* Region::allocate(size_t size, size_t limit) {
  const Lock lock(mutex());
  if (base_ == nullptr) {
    void* range = mmap(nullptr, span_, PROT_NONE, kReserved, -1, 0);
    if (range == MAP_FAILED) {
      std::perror("the stub cannot reserve addresses");
      std::abort();
    }
    base_ = next_ = static_cast<char*>(range);
  }
  const size_t mapped = (std::max<size_t>(size, 1) + kPage - 1) / kPage * kPage;
  if (in_use_ + size > limit || next_ + mapped + kPage > base_ + span_) return nullptr;
  if (mmap(next_, mapped, PROT_READ | PROT_WRITE, kReserved | MAP_FIXED, -1, 0) == MAP_FAILED) return nullptr;
  blocks_.push_back({next_, size, mapped, true});
  in_use_ += size;
  next_ += mapped + kPage;
  return blocks_.back().start;
}

const Block* Region::find(const void* address) const {
  const Lock lock(mutex());
  const auto* at = static_cast<const char*>(address);
  auto after = std::upper_bound(blocks_.begin(), blocks_.end(), at, [](const char* a, const Block& b) { return a < b.start; });
  if (after == blocks_.begin()) return nullptr;
  const Block& block = *--after;
  return block.live && at < block.start + block.mapped ? &block : nullptr;
}

bool Region::free(void* address) {
  const Lock lock(mutex());
  const Block* found = find(address);
  if (found == nullptr || found->start != address) return false;
  Block& block = blocks_[static_cast<size_t>(found - blocks_.data())];
  block.live = false;
  in_use_ -= block.size;
  mmap(block.start, block.mapped, PROT_NONE, kReserved | MAP_FIXED, -1, 0);
  return true;
}

bool Region::contains(const void* address) const {
  const auto* at = static_cast<const char*>(address);
  return base_ != nullptr && at >= base_ && at < base_ + span_;
}

Region& device_memory(int device) {
  static auto* const regions = [] {
    auto* created = new std::vector<Region>;
    for (int i = 0; i < kMaxDevices; ++i) created->emplace_back("device", kDeviceSpan);
    return created;
  }();
  return (*regions)[static_cast<size_t>(device)];
}

Region& pinned_memory() {
  static auto* const region = new Region("pinned", kPinnedSpan);
  return *region;
}

int device_of(const void* address) {
  for (int device = 0; device < kMaxDevices; ++device) {
    if (device_memory(device).contains(address)) return device;
  }
  return -1;
}

Region* region_of(const void* address) {
  if (const int device = device_of(address); device >= 0) return &device_memory(device);
  return pinned_memory().contains(address) ? &pinned_memory() : nullptr;
}

char memory_letter(const void* address) {
  const Region* region = region_of(address);
  return region == nullptr ? 'H' : region == &pinned_memory() ? 'P' : 'D';
}

bool is_valid(const void* address, size_t size) {
  const Lock lock(mutex());
  const Region* region = region_of(address);
  if (region == nullptr) return true;
  const Block* block = region->find(address);
  if (block != nullptr && static_cast<const char*>(address) + size <= block->start + block->mapped) return true;
  say("BAD", "%s address %p size %zu is in no live block", region->name(), address, size);
  return false;
}

}  // namespace stub
