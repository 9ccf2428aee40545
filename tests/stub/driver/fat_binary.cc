// Reads for which GPUs a fat binary of nvcc has code. The format is not documented; fatbinary.h of older toolkits and cuobjdump's output agree with this.
#include <cstdint>
#include <cstring>

#include "modules.h"

namespace stub {
namespace {

struct Wrapper {  // what __cudaRegisterFatBinary gets
  std::uint32_t magic, version;
  const void* data;
};
struct Header {
  std::uint32_t magic;
  std::uint16_t version, header_bytes;
  std::uint64_t bytes;  // of all entries
};
struct Entry {
  std::uint16_t kind, version;
  std::uint32_t header_bytes;
  std::uint64_t bytes;  // after the entry's header
  std::uint8_t unused[12];
  std::uint32_t architecture;  // 90 is compute capability 9.0
};
constexpr std::uint32_t kWrapperMagic = 0x466243b1, kHeaderMagic = 0xba55ed50;
constexpr std::uint16_t kPtx = 1, kMachineCode = 2;

template <typename T>
T read(const char* at) {
  T value;
  std::memcpy(&value, at, sizeof value);
  return value;
}

}  // namespace

bool has_code(const void* image, int major, int minor) {
  if (image == nullptr) return true;
  const char* at = static_cast<const char*>(image);
  if (const auto wrapper = read<Wrapper>(at); wrapper.magic == kWrapperMagic) at = static_cast<const char*>(wrapper.data);
  const auto header = read<Header>(at);
  if (header.magic != kHeaderMagic) return true;
  at += header.header_bytes;
  const int here = 10 * major + minor;
  for (const char* end = at + header.bytes; at < end;) {
    const auto entry = read<Entry>(at);
    const auto built = static_cast<int>(entry.architecture);
    if (entry.kind == kMachineCode && built / 10 == major && built <= here) return true;
    if (entry.kind == kPtx && built <= here) return true;
    at += entry.header_bytes + entry.bytes;
  }
  return false;
}

}  // namespace stub
