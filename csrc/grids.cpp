#include "grids.h"

#include <algorithm>
#include <stdexcept>

namespace halfbyte {

#define E2M1 0, 1, 2, 3, 4, 6, 8, 12
#define E1M2 0, 1, 2, 3, 4, 5, 6, 7
#define E3M0 0, 1, 2, 4, 8, 16, 32, 64
#define MINUS_E2M1 0, -1, -2, -3, -4, -6, -8, -12
#define MINUS_E1M2 0, -1, -2, -3, -4, -5, -6, -7
#define MINUS_E3M0 0, -1, -2, -4, -8, -16, -32, -64

const GridTable grid_tables[10] = {
    // name  bits signed contiguous bottom top count magnitudes levels
    {"int4", 4, true, true, -8, 7, 8, {E1M2}, {E1M2, -8, -7, -6, -5, -4, -3, -2, -1}},
    {"lzs4", 4, true, true, -7, 7, 8, {E1M2}, {E1M2, MINUS_E1M2}},
    {"e2m1", 4, true, false, -12, 12, 8, {E2M1}, {E2M1, MINUS_E2M1}},
    {"e1m2", 4, true, true, -7, 7, 8, {E1M2}, {E1M2, MINUS_E1M2}},
    {"e3m0", 4, true, false, -64, 64, 8, {E3M0}, {E3M0, MINUS_E3M0}},
    {"ue2m2", 4, false, false, 0, 28, 16, {0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28}, {}},
    {"ue1m3", 4, false, true, 0, 15, 16, {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}, {}},
    {"ue3m1", 4, false, false, 0, 192, 16, {0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192}, {}},
    {"int8", 8, true, true, -128, 127, 0, {}, {}},
    {"uint8", 8, false, true, 0, 255, 0, {}, {}},
};

Grid grid_of(const std::string& name) {
  for (int i = 0; i < 10; i++)
    if (name == grid_tables[i].name) return static_cast<Grid>(i);
  if (name == "uint4") return Grid::ue1m3;
  throw std::invalid_argument("the engine knows no grid '" + name + "'");
}

void check_weights(const WeightFormat& format) {
  const GridTable& grid = table_of(format.grid);
  const std::string weights = std::string("weights of grid ") + grid.name;
  if (!grid.is_signed) throw std::invalid_argument(std::string("weights need a signed grid, not ") + grid.name);
  const bool no_shifts = grid.bits != 4 || grid.bottom != -grid.top;
  if (format.max_shift < 0 || grid.top << format.max_shift > 127 || (format.max_shift && no_shifts))
    throw std::invalid_argument(weights + " cannot carry shifts up to " + std::to_string(format.max_shift));
  const bool fits = grid.bits == 4 && !format.max_shift && 2 <= format.max_multiple && format.max_multiple <= 16;
  if (format.max_multiple && (!fits || grid.top * format.max_multiple > 127))
    throw std::invalid_argument(weights + " cannot carry multiples up to " + std::to_string(format.max_multiple));
  if (format.subgroup < 1 || format.subgroup > 1024) throw std::invalid_argument("a subgroup of weights holds 1 to 1024 values");
}

int round_to_grid(float units, const GridTable& grid) {
  if (grid.contiguous)
    return static_cast<int>(std::clamp(std::nearbyintf(units), static_cast<float>(grid.bottom), static_cast<float>(grid.top)));
  const float magnitude = grid.is_signed ? std::fabs(units) : std::max(units, 0.0f);
  int index = 0;
  for (; index + 1 < grid.count; index++) {
    const float middle = 0.5f * static_cast<float>(grid.magnitudes[index] + grid.magnitudes[index + 1]);
    if (magnitude < middle || (magnitude == middle && index % 2 == 0)) break;
  }
  return units < 0 ? -grid.magnitudes[index] : grid.magnitudes[index];
}

}  // namespace halfbyte
