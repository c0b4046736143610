// AMX tile instructions, or the same in plain C++ (HALFBYTE_EMULATE_AMX), with which the AMX kernels are tested on any AVX-512
// machine. Macros, because the instructions want the tile's number as a literal.
//
// The compiler knows nothing of what these read and write. TILE_FENCE goes where plain stores must have happened before a tile
// load, and tile stores before plain loads; gcc 12 does not even order the stores to the configuration before its load.
#pragma once

#include <cstdint>
#include <cstring>

#define TILE_FENCE() __asm__ volatile("" ::: "memory")

namespace halfbyte {

struct alignas(64) TileConfig {  // palette 1: 8 tiles of at most 16 rows of 64 bytes
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

}  // namespace halfbyte

#if HALFBYTE_EMULATE_AMX

namespace halfbyte {
namespace emulated {

struct Tile {
  uint8_t bytes[16][64];
};

static thread_local Tile tiles[8];
static thread_local bool configured;

static inline void configure(const TileConfig& config) {
  configured = true;
  for (int t = 0; t < 8; t++) configured = configured && config.rows[t] == 16 && config.row_bytes[t] == 64;
  std::memset(tiles, 0, sizeof tiles);
}
static inline void release() { configured = false; }
static inline void zero(int t) { std::memset(&tiles[t], 0, sizeof(Tile)); }
static inline void load(int t, const void* from, int64_t stride) {
  if (!configured) __builtin_trap();
  for (int row = 0; row < 16; row++) std::memcpy(tiles[t].bytes[row], static_cast<const char*>(from) + row * stride, 64);
}
static inline void store(int t, void* to, int64_t stride) {
  for (int row = 0; row < 16; row++) std::memcpy(static_cast<char*>(to) + row * stride, tiles[t].bytes[row], 64);
}
static inline void dot(int c, int a, int b) {  // tdpbusd: a unsigned, b signed
  if (!configured) __builtin_trap();
  for (int m = 0; m < 16; m++)
    for (int n = 0; n < 16; n++) {
      int32_t sum;
      std::memcpy(&sum, tiles[c].bytes[m] + n * 4, 4);
      for (int k = 0; k < 64; k++) sum += tiles[a].bytes[m][k] * static_cast<int8_t>(tiles[b].bytes[k / 4][n * 4 + k % 4]);
      std::memcpy(tiles[c].bytes[m] + n * 4, &sum, 4);
    }
}

}  // namespace emulated
}  // namespace halfbyte

#define TILE_CONFIGURE(config) emulated::configure(config)
#define TILE_RELEASE() emulated::release()
#define TILE_ZERO(t) emulated::zero(t)
#define TILE_LOAD(t, from, stride) emulated::load(t, from, stride)
#define TILE_STORE(t, to, stride) emulated::store(t, to, stride)
#define TILE_DOT(c, a, b) emulated::dot(c, a, b)

#else

#include <immintrin.h>

#define TILE_CONFIGURE(config)   \
  do {                           \
    TILE_FENCE();                \
    _tile_loadconfig(&(config)); \
  } while (0)
#define TILE_RELEASE() _tile_release()
#define TILE_ZERO(t) _tile_zero(t)
#define TILE_LOAD(t, from, stride) _tile_loadd(t, from, stride)
#define TILE_STORE(t, to, stride) _tile_stored(t, to, stride)
#define TILE_DOT(c, a, b) _tile_dpbusd(c, a, b)

#endif
