// Vectors of 16-bit numbers, with what the compiler has no operators for. In an unnamed namespace, as lanes.h.
#pragma once

#include "lanes.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace halfbyte {
namespace {

// Two numbers for each of W floats.
//   high         the upper halves of products
//   shift_right  by 6 to 16
//   half         rounded up
template <int W>
struct Shorts;

#if defined(__AVX512BW__)
template <>
struct Shorts<16> {
  typedef uint16_t V __attribute__((vector_size(64)));
  typedef int16_t Signed __attribute__((vector_size(64)));
  static inline V high(V a, V b) { return (V)_mm512_mulhi_epu16((__m512i)a, (__m512i)b); }
  static inline V half(V a) { return (V)_mm512_avg_epu16((__m512i)a, _mm512_setzero_si512()); }
  static inline V shift_right(V a, V by) { return (V)_mm512_srlv_epi16((__m512i)a, (__m512i)by); }
};
#endif

#if defined(__AVX2__)
template <>
struct Shorts<8> {
  typedef uint16_t V __attribute__((vector_size(32)));
  typedef int16_t Signed __attribute__((vector_size(32)));
  static inline V high(V a, V b) { return (V)_mm256_mulhi_epu16((__m256i)a, (__m256i)b); }
  static inline V half(V a) { return (V)_mm256_avg_epu16((__m256i)a, _mm256_setzero_si256()); }
  // There is no such instruction: the upper half of a product with a power of two, whose two bytes are looked up.
  static inline V shift_right(V a, V by) {
    const __m256i powers = _mm256_broadcastsi128_si256(_mm_setr_epi8(1, 2, 4, 8, 16, 32, 64, -128, 0, 0, 0, 0, 0, 0, 0, 0));
    const V bytes = (16 - by) * 257 - 0x800;  // below 0, above 7: no bit in this byte
    return high(a, (V)_mm256_shuffle_epi8(powers, (__m256i)bytes));
  }
};
#endif

#if defined(__aarch64__)
template <>
struct Shorts<4> {
  typedef uint16_t V __attribute__((vector_size(16)));
  typedef int16_t Signed __attribute__((vector_size(16)));
  static inline V high(V a, V b) {
    const uint32x4_t low = vmull_u16(vget_low_u16((uint16x8_t)a), vget_low_u16((uint16x8_t)b));
    return (V)vuzp2q_u16(vreinterpretq_u16_u32(low), vreinterpretq_u16_u32(vmull_high_u16((uint16x8_t)a, (uint16x8_t)b)));
  }
  static inline V half(V a) { return (V)vrshrq_n_u16((uint16x8_t)a, 1); }
  static inline V shift_right(V a, V by) { return (V)vshlq_u16((uint16x8_t)a, vnegq_s16((int16x8_t)by)); }
};
#endif

}  // namespace
}  // namespace halfbyte
