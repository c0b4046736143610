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
void scalar_gelu(Dtype dtype, const char* x, int64_t count, char* y);
void scalar_sum_pixels(const Pixels& pixels, float* sums, float* squares);
void scalar_scale_pixels(const Pixels& pixels, const float* gain, const float* offset, bool silu, char* y);
void scalar_geglu(Dtype dtype, const char* values, const char* gates, int64_t count, char* y);
void scalar_product(const Run& run, const Problem& problem, const Output& output);

// A call of `attend`.
struct Attention {
  int64_t images, heads;
  const Heads &queries, &keys, &values, &output;
  float factor;
  const ScoreBias& bias;

  const float* bias_of(int64_t image, int64_t head, int64_t query) const {
    if (!bias.data) return nullptr;
    return bias.data + image * bias.image_stride + head * bias.head_stride + query * bias.query_stride;
  }
  static const char* at(const Heads& of, int64_t image, int64_t head, int64_t token) {
    const int64_t index = image * of.image_stride + head * of.head_stride + token * of.token_stride;
    return static_cast<const char*>(of.data) + index * (of.dtype == Dtype::float32 ? 4 : 2);
  }
};

void scalar_attend(const Run& run, const Attention& call);

// Memory of this thread that outlives the call, aligned to 64; contents are left from earlier uses. Slots are independent.
enum class Slot { input, panel, rows, sums, weights, heads };
constexpr int slot_count = 6;
uint8_t* scratch(Slot slot, size_t bytes);

}  // namespace halfbyte
