// AMX-int8: a tile instruction multiplies 16 rows x 64 of K by 64 of K x 16 channels. 2 x 2 tiles of sums use every loaded tile
// twice. Everything else is AVX-512's: decoding, inputs, outputs, few rows.
#include "dispatch.h"

#if defined(__AVX512VNNI__) && (defined(__AMX_INT8__) || HALFBYTE_EMULATE_AMX)

#include "avx512.h"
#include "tiles.h"

namespace halfbyte {
namespace {

constexpr int tile_rows = 32, half_rows = 16, row_bytes = 2 * block_channels * 4;  // of the sums

void begin() {
  TileConfig config;
  for (int t = 0; t < 8; t++) config.rows[t] = 16, config.row_bytes[t] = 64;
  TILE_CONFIGURE(config);
}

void end() { TILE_RELEASE(); }

// Tiles 0..3 hold sums (row half, channel half), 4 and 5 rows, 6 and 7 weights.
void two_by_two(const uint8_t* const* row, int64_t stride, const Walk& walk, const uint8_t* panel, int64_t panel_stride,
                int32_t* sums) {
  char *top = reinterpret_cast<char*>(sums), *low = top + half_rows * row_bytes;
  if (walk.first) {
    TILE_LOAD(0, top, row_bytes);
    TILE_LOAD(1, top + 64, row_bytes);
    TILE_LOAD(2, low, row_bytes);
    TILE_LOAD(3, low + 64, row_bytes);
  } else {
    TILE_ZERO(0);
    TILE_ZERO(1);
    TILE_ZERO(2);
    TILE_ZERO(3);
  }
  for (int64_t i = walk.first; i < walk.last; i++) {
    const int64_t offset = walk.offsets[i];
    TILE_LOAD(4, row[0] + offset, stride);
    TILE_LOAD(6, panel + i * panel_chunk, 64);
    TILE_LOAD(7, panel + panel_stride + i * panel_chunk, 64);
    TILE_DOT(0, 4, 6);
    TILE_LOAD(5, row[half_rows] + offset, stride);
    TILE_DOT(1, 4, 7);
    TILE_DOT(2, 5, 6);
    TILE_DOT(3, 5, 7);
  }
  TILE_STORE(0, top, row_bytes);
  TILE_STORE(1, top + 64, row_bytes);
  TILE_STORE(2, low, row_bytes);
  TILE_STORE(3, low + 64, row_bytes);
}

void one(const uint8_t* row, int64_t stride, const Walk& walk, const uint8_t* panel, int32_t* sums) {
  if (walk.first) {
    TILE_LOAD(0, sums, row_bytes);
  } else {
    TILE_ZERO(0);
  }
  for (int64_t i = walk.first; i < walk.last; i++) {
    TILE_LOAD(4, row + walk.offsets[i], stride);
    TILE_LOAD(6, panel + i * panel_chunk, 64);
    TILE_DOT(0, 4, 6);
  }
  TILE_STORE(0, sums, row_bytes);
}

// Rows are evenly spaced and complete halves: see `gather`.
void tile(const uint8_t* const* row, int count, const Walk& walk, const uint8_t* panel, int64_t panel_stride, int channels,
          int32_t* sums) {
  const int64_t stride = row[1] - row[0];
  TILE_FENCE();
  if (count > half_rows && channels > block_channels) {
    two_by_two(row, stride, walk, panel, panel_stride, sums);
  } else {
    for (int half = 0; half * half_rows < count; half++)
      for (int b = 0; b * block_channels < channels; b++)
        one(row[half * half_rows], stride, walk, panel + b * panel_stride,
            sums + half * half_rows * 2 * block_channels + b * block_channels);
  }
  TILE_FENCE();
}

}  // namespace

const Kernels* amx_kernels() {
  static const Kernels kernels = [] {
    Kernels k = *avx512_kernels();
    k.rows = tile_rows, k.tile = tile, k.even_rows = half_rows, k.panel_budget = 1024 * 1024, k.part_rows = 2048, k.step = 12,
    k.begin = begin, k.end = end;
    return k;
  }();
  return &kernels;
}

double amx_rounds(int64_t rounds) {
  begin();
  TILE_FENCE();
  TILE_ZERO(0);
  TILE_ZERO(1);
  TILE_ZERO(2);
  TILE_ZERO(3);
  TILE_ZERO(4);
  TILE_ZERO(6);
  for (int64_t i = 0; i < rounds; i++) {
    TILE_DOT(0, 4, 6);
    TILE_DOT(1, 4, 6);
    TILE_DOT(2, 4, 6);
    TILE_DOT(3, 4, 6);
  }
  end();
  return static_cast<double>(rounds) * 4 * 16 * 16 * 64;
}

}  // namespace halfbyte

#else

namespace halfbyte {
const Kernels* amx_kernels() { return nullptr; }
double amx_rounds(int64_t) { return 0; }
}  // namespace halfbyte

#endif
