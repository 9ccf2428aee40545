// The compiler's <immintrin.h> with AMX tiles emulated in thread-local memory. As on a processor, tiles can be used only between _tile_loadconfig and
// _tile_release. AddressSanitizer checks the memory accesses of tile loads and stores.
#pragma once

#include_next <immintrin.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace amx_in_software {

struct Tile {
  std::size_t rows = 0, row_bytes = 0;
  alignas(64) unsigned char bytes[16][64];
};

inline thread_local Tile tiles[8];

inline Tile& tile(int i) {
  if (tiles[i].rows == 0) std::abort();  // an illegal instruction on a processor: the tiles are not configured
  return tiles[i];
}

inline void load_shapes(const void* from) {
  const auto* shapes = static_cast<const unsigned char*>(from);
  if (shapes[0] != 1) std::abort();  // the only palette
  for (int i = 0; i < 8; ++i) {
    std::uint16_t row_bytes;
    std::memcpy(&row_bytes, shapes + 16 + 2 * i, sizeof row_bytes);
    tiles[i].row_bytes = row_bytes;
    tiles[i].rows = shapes[48 + i];
    if (tiles[i].rows > 16 || row_bytes > 64) std::abort();
    std::memset(tiles[i].bytes, 0, sizeof tiles[i].bytes);
  }
}

inline void release() {
  for (Tile& one : tiles) one.rows = 0;
}

inline void zero(int i) { std::memset(tile(i).bytes, 0, sizeof tiles[i].bytes); }

inline void load(int i, const void* from, std::int64_t stride) {
  zero(i);
  for (std::size_t row = 0; row < tile(i).rows; ++row) {
    std::memcpy(tiles[i].bytes[row], static_cast<const unsigned char*>(from) + static_cast<std::int64_t>(row) * stride, tiles[i].row_bytes);
  }
}

inline void store(int i, void* to, std::int64_t stride) {
  for (std::size_t row = 0; row < tile(i).rows; ++row) {
    std::memcpy(static_cast<unsigned char*>(to) + static_cast<std::int64_t>(row) * stride, tiles[i].bytes[row], tiles[i].row_bytes);
  }
}

inline float bfloat16(const unsigned char* from) {
  unsigned char bytes[4] = {0, 0, from[0], from[1]};
  float value;
  std::memcpy(&value, bytes, sizeof value);
  return value;
}

using Floats = float __attribute__((vector_size(64)));
using Pairs = std::uint32_t __attribute__((vector_size(64)));

// sums[m][n] += x[m][2 k] * y[k][2 n] + x[m][2 k + 1] * y[k][2 n + 1], for all 16 columns n at once: columns beyond a tile's width are never stored
inline void multiply(int sums, int x, int y) {
  for (std::size_t m = 0; m < tile(sums).rows; ++m) {
    Floats sum;
    std::memcpy(&sum, tiles[sums].bytes[m], sizeof sum);
    for (std::size_t k = 0; k < tile(x).row_bytes / 4; ++k) {
      const unsigned char* const a = tiles[x].bytes[m] + 4 * k;
      Pairs b;
      std::memcpy(&b, tile(y).bytes[k], sizeof b);
      sum += bfloat16(a) * reinterpret_cast<Floats>(b << 16) + bfloat16(a + 2) * reinterpret_cast<Floats>(b & 0xffff0000u);
    }
    std::memcpy(tiles[sums].bytes[m], &sum, sizeof sum);
  }
}

}  // namespace amx_in_software

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig ::amx_in_software::load_shapes
#define _tile_release ::amx_in_software::release
#define _tile_zero ::amx_in_software::zero
#define _tile_loadd ::amx_in_software::load
#define _tile_stored ::amx_in_software::store
#define _tile_dpbf16ps ::amx_in_software::multiply
