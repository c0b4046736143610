// The number grids as tables, and the one rounding rule: ties go to the neighbour whose magnitude index is even.
#pragma once

#include <cmath>
#include <cstdint>

#include "halfbyte.h"

namespace halfbyte {

struct GridTable {
  const char* name;
  int bits;
  bool is_signed;
  bool contiguous;  // all integers from bottom to top: rounding alone encodes
  int bottom, top;
  int count;               // of magnitudes
  uint8_t magnitudes[16];  // ascending; empty for the 8-bit grids
  int8_t levels[16];       // by code; of signed 4-bit grids only
};

extern const GridTable grid_tables[10];

static inline const GridTable& table_of(Grid grid) { return grid_tables[static_cast<int>(grid)]; }

// Number of bits of a non-negative integer: 0 for 0.
static inline int bit_length(int value) { return value ? 32 - __builtin_clz(static_cast<unsigned>(value)) : 0; }

// The level nearest to a finite value in units of the scale.
int round_to_grid(float units, const GridTable& grid);

// Weight integer of a code.
static inline int decode_code(int code, const GridTable& grid) {
  return grid.bits == 8 ? static_cast<int8_t>(code) : grid.levels[code];
}

// What the levels of a subgroup of weights are multiplied with: a power of two, or a whole number. Stored as a nibble.
static inline bool has_multipliers(const WeightFormat& format) { return format.max_shift || format.max_multiple; }
static inline int multiplier_of(const WeightFormat& format, int nibble) { return format.max_multiple ? nibble + 1 : 1 << nibble; }
static inline int largest_nibble(const WeightFormat& format) {
  return format.max_multiple ? format.max_multiple - 1 : format.max_shift;
}

// Throws for a format that weights cannot have.
void check_weights(const WeightFormat& format);

// Whether inputs are rounded to whole numbers first, then by subgroups.
static inline bool rounds_twice(const InputFormat& format) { return format.max_shift || format.max_multiple; }

static inline int nibble(const uint8_t* bytes, int64_t index) { return bytes[index / 2] >> (index % 2 * 4) & 15; }

}  // namespace halfbyte
