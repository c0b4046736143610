// AVX2: what its two forms, with and without VNNI, share.
#pragma once

#include "kernels.h"

namespace halfbyte {

Kernels avx2_steps();  // all but the products

void avx2_range(const void* values, Dtype dtype, int64_t count, bool only_absmax, Range* range);
void avx2_encode(const void* values, Dtype dtype, int64_t count, const Encoding& encoding, uint8_t* out);
void avx2_finish(const int32_t* sums, int sum_stride, const Epilogue& epilogue, const Rows& rows);
void avx2_decode(const Nibbles& from, uint8_t* panel);  // shifted int8
void avx2_search(const ScaleSearch& search, uint8_t* work);
Energy avx2_round(const WeightRounding& rounding, uint8_t* work);
void avx2_soften(const Softening& softening);
void avx2_soften_pairs(const Softening& softening);  // to codes of 16 bits
void avx2_gather(const Gathering& gathering);
void avx2_gelu(Dtype dtype, const char* x, int64_t count, char* y);
void avx2_sum_pixels(const Pixels& pixels, float* sums, float* squares);
void avx2_scale_pixels(const Pixels& pixels, const float* gain, const float* offset, bool silu, char* y);
void avx2_geglu(Dtype dtype, const char* values, const char* gates, int64_t count, char* y);

}  // namespace halfbyte
