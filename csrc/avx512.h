// AVX-512: inputs to bytes, and sums to outputs.
#pragma once

#include "kernels.h"

namespace halfbyte {

void avx512_range(const void* values, Dtype dtype, int64_t count, bool only_absmax, Range* range);
void avx512_encode(const void* values, Dtype dtype, int64_t count, const Encoding& encoding, uint8_t* out);

void avx512_finish(const int32_t* sums, int sum_stride, const Epilogue& epilogue, const Rows& rows);
void avx512_search(const ScaleSearch& search, uint8_t* work);
Energy avx512_round(const WeightRounding& rounding, uint8_t* work);
void avx512_soften(const Softening& softening);
void avx512_gather(const Gathering& gathering);
void avx512_gelu(Dtype dtype, const char* x, int64_t count, char* y);
void avx512_sum_pixels(const Pixels& pixels, float* sums, float* squares);
void avx512_scale_pixels(const Pixels& pixels, const float* gain, const float* offset, bool silu, char* y);
void avx512_geglu(Dtype dtype, const char* values, const char* gates, int64_t count, char* y);

}  // namespace halfbyte
