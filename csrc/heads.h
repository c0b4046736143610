// Keys and values of attention as panels of int8 for the kernels' tiles, made once for all queries.
#pragma once

#include "internal.h"

namespace halfbyte {

// Where the parts of a head lie, behind each other: panels of its keys, 64 (a block) behind each other, and of its values.
struct HeadPlan {
  int64_t code_bytes, key_chunks, value_blocks, key_blocks;  // chunks of a query's channels, blocks of 16 of a value's, of 64 keys
  int64_t panel;                                             // bytes of a chunk's
  int64_t keys, corrections, scales, values, value_corrections, value_scales, bytes;

  HeadPlan(const Attention& call, int code_bytes);
};

// Writes a head, `plan.bytes` aligned to 64; false where a key or a value is no finite number.
bool take_head(const Attention& call, const Kernels& kernels, const HeadPlan& plan, int64_t image, int64_t head, uint8_t* to);

// Values to integers plus 128.
void encode_int8(const Kernels& kernels, const void* values, Dtype dtype, int64_t count, float reciprocal, uint8_t* codes);

// Of a finite magnitude in bits.
float int8_scale(uint32_t absmax);

}  // namespace halfbyte
