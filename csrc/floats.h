// float32 from and to the 16-bit types, by bits; round to nearest even, one NaN.
#pragma once

#include <cstdint>
#include <cstring>

#include "halfbyte.h"

namespace halfbyte {

static inline float float_of_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

static inline uint32_t bits_of_float(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

static inline float from_float16(uint16_t half) {
  const uint32_t sign = (half & 0x8000u) << 16, rest = half & 0x7fffu;
  if (rest >= 0x7c00) return float_of_bits(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  if (rest >= 0x400) return float_of_bits(sign | ((rest << 13) + (112u << 23)));
  return float_of_bits(sign | bits_of_float(static_cast<float>(rest) * 0x1p-24f));  // subnormal: exact
}

// The bfloat16 whose bits, those of negative values turned round so that integers are in the order of the values, are `key`.
static inline float from_order(int32_t key) {
  return float_of_bits(static_cast<uint32_t>((key ^ (key >> 15 & 0x7fff)) & 0xffff) << 16);
}

static inline uint16_t to_float16(float value) {
  const uint32_t bits = bits_of_float(value), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
  if (rest > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
  if (rest >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // 65520 and more round to infinity
  if (rest < 0x38800000) {  // below the smallest normal: adding 0.5 leaves units of 2**-24 in the low bits, rounded to even
    return static_cast<uint16_t>(sign | (bits_of_float(float_of_bits(rest) + 0.5f) - 0x3f000000));
  }
  return static_cast<uint16_t>(sign | (rest - (112u << 23) + 0xfff + (rest >> 13 & 1)) >> 13);
}

static inline uint16_t to_bfloat16(float value) {
  const uint32_t bits = bits_of_float(value);
  if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static inline float load(const void* values, Dtype dtype, int64_t index) {
  if (dtype == Dtype::float32) {
    float value;
    std::memcpy(&value, static_cast<const char*>(values) + index * 4, 4);
    return value;
  }
  uint16_t half;
  std::memcpy(&half, static_cast<const char*>(values) + index * 2, 2);
  return dtype == Dtype::bfloat16 ? float_of_bits(static_cast<uint32_t>(half) << 16) : from_float16(half);
}

static inline void store(void* values, Dtype dtype, int64_t index, float value) {
  if (dtype == Dtype::float32) {
    std::memcpy(static_cast<char*>(values) + index * 4, &value, 4);
    return;
  }
  const uint16_t half = dtype == Dtype::bfloat16 ? to_bfloat16(value) : to_float16(value);
  std::memcpy(static_cast<char*>(values) + index * 2, &half, 2);
}

static constexpr int64_t size_of(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

}  // namespace halfbyte
