// What the parts of the engine tell each other.
#pragma once

#include <cstring>

#include "kernels.h"

namespace halfbyte {

// A product, resolved: where everything lies.
struct Problem {
  const uint8_t* quantized;
  const uint8_t* packed;
  QuantizedHeader inputs;
  PackedHeader weights;
  const float* scales;
  const int32_t* zeros;
  const float* weight_scale;
  const float* bias;
  int64_t out_height, out_width, rows;  // rows: output pixels of all images
};

void scalar_range(const void* values, Dtype dtype, int64_t count, bool only_absmax, Range* range);
void scalar_encode(const void* values, Dtype dtype, int64_t count, const Encoding& encoding, uint8_t* out);
void scalar_finish(const int32_t* sums, int sum_stride, const Epilogue& epilogue, const Rows& rows);
void scalar_search(const ScaleSearch& search, uint8_t* work);
Energy scalar_round(const WeightRounding& rounding, uint8_t* work);
void scalar_product(const Run& run, const Problem& problem, const Output& output);

// Memory of this thread that outlives the call, aligned to 64; contents are left from earlier uses. Slots are independent.
enum class Slot { input, panel, rows, sums, weights };
constexpr int slot_count = 5;
uint8_t* scratch(Slot slot, size_t bytes);

}  // namespace halfbyte
