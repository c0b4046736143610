// AVX-512: inputs to bytes.
#pragma once

#include "kernels.h"

namespace halfbyte {

void avx512_range(const void* values, Dtype dtype, int64_t count, Range* range);
void avx512_encode(const void* values, Dtype dtype, int64_t count, const Encoding& encoding, uint8_t* out);

}  // namespace halfbyte
