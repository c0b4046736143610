// AVX-512: inputs to bytes, and sums to outputs.
#include "avx512.h"

#if defined(__AVX512VNNI__)

#include <immintrin.h>

#include <algorithm>
#include <cmath>

#include "floats.h"
#include "internal.h"
#include "multiples.h"
#include "shifted.h"

namespace halfbyte {
namespace {

static inline __mmask16 first(int64_t count) { return static_cast<__mmask16>(count >= 16 ? 0xffff : (1u << count) - 1); }

template <Dtype D>
static inline __m512 load16(const void* values, int64_t index, __mmask16 valid) {
  const char* from = static_cast<const char*>(values) + index * size_of(D);
  if (D == Dtype::float32) return _mm512_maskz_loadu_ps(valid, from);
  const __m256i half = _mm256_maskz_loadu_epi16(valid, from);
  if (D == Dtype::float16) return _mm512_cvtph_ps(half);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

template <Dtype D>
void range(const void* values, int64_t count, Range* range) {
  __m512 low = _mm512_setzero_ps(), high = low;
  __m512i most = _mm512_setzero_si512();
  for (int64_t i = 0; i < count; i += 16) {
    const __m512 x = load16<D>(values, i, first(count - i));
    low = _mm512_min_ps(x, low), high = _mm512_max_ps(x, high);  // a NaN yields the second operand
    most = _mm512_max_epu32(most, _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fffffff)));
  }
  range->low = std::min(range->low, _mm512_reduce_min_ps(low));
  range->high = std::max(range->high, _mm512_reduce_max_ps(high));
  range->absmax = std::max(range->absmax, static_cast<uint32_t>(_mm512_reduce_max_epu32(most)));
}

// On the bits: those of magnitudes are in the order of the magnitudes, NaN last.
void absmax_bfloat16(const void* values, int64_t count, Range* range) {
  __m512i most = _mm512_setzero_si512(), more = most;
  const auto* from = static_cast<const uint16_t*>(values);
  int64_t i = 0;
  const __m512i no_sign = _mm512_set1_epi16(0x7fff);
  for (; i + 64 <= count; i += 64) {
    most = _mm512_max_epu16(most, _mm512_and_si512(_mm512_loadu_si512(from + i), no_sign));
    more = _mm512_max_epu16(more, _mm512_and_si512(_mm512_loadu_si512(from + i + 32), no_sign));
  }
  for (; i < count; i += 32) {
    const __mmask32 valid = count - i >= 32 ? ~0u : (1u << (count - i)) - 1;
    most = _mm512_max_epu16(most, _mm512_and_si512(_mm512_maskz_loadu_epi16(valid, from + i), no_sign));
  }
  most = _mm512_max_epu16(most, more);
  const __m512i wide = _mm512_max_epu32(_mm512_slli_epi32(most, 16), _mm512_andnot_si512(_mm512_set1_epi32(0xffff), most));
  range->absmax = std::max(range->absmax, static_cast<uint32_t>(_mm512_reduce_max_epu32(wide)));
}

// Bits of bfloat16 as integers in the order of the values; from_order is the way back.
static inline __m512i in_order(__m512i bits) {
  return _mm512_xor_si512(bits, _mm512_srli_epi16(_mm512_srai_epi16(bits, 15), 1));
}

// NaN and infinities may show in `low` and `high`, but always in `absmax` too.
void range_bfloat16(const void* values, int64_t count, Range* range) {
  absmax_bfloat16(values, count, range);
  const auto* from = static_cast<const uint16_t*>(values);
  __m512i low = _mm512_setzero_si512(), high = low;
  for (int64_t i = 0; i < count; i += 32) {
    const __mmask32 valid = count - i >= 32 ? ~0u : (1u << (count - i)) - 1;
    const __m512i keys = in_order(_mm512_maskz_loadu_epi16(valid, from + i));
    low = _mm512_min_epi16(low, keys), high = _mm512_max_epi16(high, keys);
  }
  const auto even = [](__m512i v) { return _mm512_srai_epi32(_mm512_slli_epi32(v, 16), 16); };
  const auto odd = [](__m512i v) { return _mm512_srai_epi32(v, 16); };
  range->low = std::min(range->low, from_order(_mm512_reduce_min_epi32(_mm512_min_epi32(even(low), odd(low)))));
  range->high = std::max(range->high, from_order(_mm512_reduce_max_epi32(_mm512_max_epi32(even(high), odd(high)))));
}

// ---- first rounding: floats to bytes ----------------------------------------------------------------------------------------

// Magnitudes of a minifloat table that holds every integer below 2**bits: round to that many digits, but no finer than 1.
static inline __m512 round_minifloat(__m512 m, __m512 step_of_power) {
  const __m512 power = _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(m), _mm512_set1_epi32(0x7f800000)));
  const __m512 step = _mm512_max_ps(_mm512_mul_ps(power, step_of_power), _mm512_set1_ps(1.0f));
  const __m512 magic = _mm512_mul_ps(step, _mm512_set1_ps(0x1.8p23f));  // adding it leaves no digits below step
  return _mm512_sub_ps(_mm512_add_ps(m, magic), magic);
}

// Powers of two (no digit to be even): the midpoint below an even index belongs to it, the one below an odd index to the one
// beneath.
static inline __m512 round_powers(__m512 m, const GridTable& grid) {
  __m512 level = _mm512_setzero_ps();
  for (int i = 1; i < grid.count; i++) {
    const __m512 middle = _mm512_set1_ps(0.5f * static_cast<float>(grid.magnitudes[i - 1] + grid.magnitudes[i]));
    const __mmask16 above = i % 2 ? _mm512_cmp_ps_mask(m, middle, _CMP_GT_OQ) : _mm512_cmp_ps_mask(m, middle, _CMP_GE_OQ);
    level = _mm512_mask_mov_ps(level, above, _mm512_set1_ps(grid.magnitudes[i]));
  }
  return level;
}

enum class Steps { whole, minifloat, powers };  // between the levels of a table

struct FirstRounding {
  __m512 reciprocal, zero, low, high, step_of_power;
  __m512i offset;
  const GridTable& grid;
  Steps steps = Steps::whole;

  explicit FirstRounding(const Encoding& e) : grid(*e.grid) {
    const bool is_signed = grid.is_signed;
    const int top = rounds_twice(*e.format) ? e.format->top : grid.top,
              bottom = rounds_twice(*e.format) ? (is_signed ? -top : 0) : grid.bottom;
    reciprocal = _mm512_set1_ps(e.reciprocal), zero = _mm512_set1_ps(is_signed ? 0.0f : e.zero);
    low = _mm512_set1_ps(static_cast<float>(bottom)), high = _mm512_set1_ps(static_cast<float>(top));
    offset = _mm512_set1_epi32(e.offset);
    const int bits = whole_bits(grid);
    if (!grid.contiguous && !rounds_twice(*e.format)) steps = bits > 1 ? Steps::minifloat : Steps::powers;
    step_of_power = _mm512_set1_ps(std::ldexp(1.0f, 1 - bits));
  }

  // 32-bit integers 0..255.
  template <Steps S>
  __m512i apply(__m512 x) const {
    __m512 units = _mm512_mul_ps(x, reciprocal);
    units = _mm512_fixupimm_ps(units, units, _mm512_set1_epi32(0x11881188), 0);  // infinities and NaN to 0
    units = _mm512_add_ps(units, zero);
    units = _mm512_min_ps(_mm512_max_ps(units, low), high);
    if (S != Steps::whole) {
      const __m512 m = _mm512_abs_ps(units), sign = _mm512_andnot_ps(_mm512_castsi512_ps(_mm512_set1_epi32(0x7fffffff)), units);
      units = _mm512_or_ps(S == Steps::minifloat ? round_minifloat(m, step_of_power) : round_powers(m, grid), sign);
    }
    return _mm512_add_epi32(_mm512_cvtps_epi32(units), offset);
  }
};

// `round` by value: stores through a byte pointer may alias what is in memory.
template <Dtype D, Steps S>
void round_once(const void* values, int64_t start, int64_t count, const FirstRounding round, uint8_t* out) {
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  int64_t i = 0;
  for (; i + 64 <= count; i += 64) {
    __m512i four[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) four[j] = round.template apply<S>(load16<D>(values, start + i + j * 16, 0xffff));
    const __m512i bytes = _mm512_packus_epi16(_mm512_packs_epi32(four[0], four[1]), _mm512_packs_epi32(four[2], four[3]));
    _mm512_storeu_si512(out + i, _mm512_permutexvar_epi32(order, bytes));
  }
  for (; i < count; i += 16) {
    const __mmask16 valid = first(count - i);
    _mm_mask_storeu_epi8(out + i, valid, _mm512_cvtepi32_epi8(round.template apply<S>(load16<D>(values, start + i, valid))));
  }
}

template <Dtype D>
void first_rounding(const void* values, int64_t start, int64_t count, const FirstRounding& round, uint8_t* out) {
  if (round.steps == Steps::whole) return round_once<D, Steps::whole>(values, start, count, round, out);
  if (round.steps == Steps::minifloat) return round_once<D, Steps::minifloat>(values, start, count, round, out);
  round_once<D, Steps::powers>(values, start, count, round, out);
}

// ---- second rounding --------------------------------------------------------------------------------------------------------

struct Bytes {
  __m512i v;

  static Bytes repeat(const uint8_t* sixteen) {
    return {_mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(sixteen)))};
  }
  static Bytes all(uint8_t value) { return {_mm512_set1_epi8(static_cast<char>(value))}; }
  Bytes abs() const { return {_mm512_abs_epi8(v)}; }
  Bytes look_up(Bytes index) const { return {_mm512_shuffle_epi8(v, index.v)}; }
  Bytes plus(Bytes o) const { return {_mm512_adds_epu8(v, o.v)}; }
  Bytes minus(Bytes o) const { return {_mm512_subs_epu8(v, o.v)}; }
  Bytes minus_wrapping(Bytes o) const { return {_mm512_sub_epi8(v, o.v)}; }
  Bytes where_reaches(Bytes a, Bytes limit) const { return {_mm512_maskz_mov_epi8(_mm512_cmpge_epu8_mask(a.v, limit.v), v)}; }
  Bytes either(Bytes o) const { return {_mm512_or_si512(v, o.v)}; }
  Bytes both(Bytes o) const { return {_mm512_and_si512(v, o.v)}; }
  Bytes least(Bytes o) const { return {_mm512_min_epu8(v, o.v)}; }
  Bytes most(Bytes o) const { return {_mm512_max_epu8(v, o.v)}; }
  bool any() const { return _mm512_test_epi8_mask(v, v) != 0; }
  Bytes with_sign(Bytes x) const { return {_mm512_mask_sub_epi8(v, _mm512_movepi8_mask(x.v), _mm512_setzero_si512(), v)}; }
  template <int N>
  Bytes shift_right() const {
    return {_mm512_and_si512(_mm512_srli_epi16(v, N), _mm512_set1_epi8(static_cast<char>(0xff >> N)))};
  }
  template <int Size>
  Bytes group_max() const {
    const __m512i swapped = _mm512_broadcast_i32x4(_mm_setr_epi8(1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14));
    __m512i m = _mm512_max_epu8(v, _mm512_shuffle_epi8(v, swapped));
    m = _mm512_max_epu8(m, _mm512_rol_epi32(m, 16));
    m = _mm512_max_epu8(m, _mm512_shuffle_epi32(m, _MM_PERM_CDAB));
    if (Size >= 16) m = _mm512_max_epu8(m, _mm512_shuffle_epi32(m, _MM_PERM_BADC));
    if (Size >= 32) m = _mm512_max_epu8(m, _mm512_shuffle_i64x2(m, m, 0xb1));
    if (Size >= 64) m = _mm512_max_epu8(m, _mm512_shuffle_i64x2(m, m, 0x4e));
    return {m};
  }
  // Where a subgroup's squared error against `exact` is less for `higher` than for `lower`, the one, else the other.
  template <int Size>
  static Bytes better(Bytes lower, Bytes higher, Bytes exact) {
    __m512i gain = _mm512_sub_epi32(squares(lower, exact), squares(higher, exact));
    gain = _mm512_add_epi32(gain, _mm512_shuffle_epi32(gain, _MM_PERM_CDAB));
    if (Size >= 16) gain = _mm512_add_epi32(gain, _mm512_shuffle_epi32(gain, _MM_PERM_BADC));
    if (Size >= 32) gain = _mm512_add_epi32(gain, _mm512_shuffle_i64x2(gain, gain, 0xb1));
    if (Size >= 64) gain = _mm512_add_epi32(gain, _mm512_shuffle_i64x2(gain, gain, 0x4e));
    return {_mm512_mask_mov_epi32(lower.v, _mm512_cmpgt_epi32_mask(gain, _mm512_setzero_si512()), higher.v)};
  }
  static __m512i squares(Bytes a, Bytes b) {  // sums of 4
    const __m512i d =
        _mm512_or_si512(_mm512_subs_epu8(a.v, b.v), _mm512_subs_epu8(b.v, a.v));  // below 128, see the callers' tables
    return _mm512_madd_epi16(_mm512_maddubs_epi16(d, d), _mm512_set1_epi16(1));
  }
};

template <int Size, typename Rounder>
void second_rounding(const Rounder rounder, int offset, int64_t count, const uint8_t* in, uint8_t* out) {
  const __m512i flip = _mm512_set1_epi8(static_cast<char>(offset));  // adding 128 to a byte is flipping its top bit
  for (int64_t i = 0; i < count; i += 64) {
    const __m512i u = _mm512_xor_si512(rounder.template round<Size>({_mm512_xor_si512(_mm512_load_si512(in + i), flip)}).v, flip);
    _mm512_mask_storeu_epi8(out + i, count - i >= 64 ? ~0ull : (1ull << (count - i)) - 1, u);
  }
}

constexpr int piece = 1024;  // values rounded twice while in L1

template <Dtype D, typename Rounder>
void encode_twice(const void* values, int64_t count, const Encoding& e, const FirstRounding& round, const Rounder& rounder,
                  uint8_t* out) {
  const int size = e.format->subgroup;
  const auto again = size == 8    ? second_rounding<8, Rounder>
                     : size == 16 ? second_rounding<16, Rounder>
                     : size == 32 ? second_rounding<32, Rounder>
                                  : second_rounding<64, Rounder>;
  alignas(64) uint8_t bytes[piece];
  for (int64_t start = 0; start < count; start += piece) {
    const int64_t some = std::min<int64_t>(piece, count - start);
    if (some % 64) _mm512_store_si512(bytes + some / 64 * 64, _mm512_set1_epi8(static_cast<char>(e.offset)));
    first_rounding<D>(values, start, some, round, bytes);
    again(rounder, e.offset, some, bytes, out + start);
  }
}

template <Dtype D>
void encode(const void* values, int64_t count, const Encoding& e, uint8_t* out) {
  const FirstRounding round(e);
  if (e.format->max_multiple)
    return encode_twice<D>(values, count, e, round, MultipleRounder<Bytes>(MultipleTables(*e.format, *e.grid)), out);
  if (e.format->max_shift)
    return encode_twice<D>(values, count, e, round, ShiftRounder<Bytes>(ShiftTables(*e.format, *e.grid)), out);
  first_rounding<D>(values, 0, count, round, out);
}

// ---- sums to outputs --------------------------------------------------------------------------------------------------------

static inline void store16(char* out, Dtype dtype, __mmask16 valid, __m512 y) {
  if (dtype == Dtype::float32) return _mm512_mask_storeu_ps(out, valid, y);
  __m256i half;
  if (dtype == Dtype::float16) {
    half = _mm512_cvtps_ph(y, _MM_FROUND_TO_NEAREST_INT);
  } else {
    const __m512i bits = _mm512_castps_si512(y), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(y, y, _CMP_UNORD_Q);
    const __m512i either = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
    half = _mm512_cvtepi32_epi16(_mm512_srli_epi32(either, 16));
  }
  _mm256_mask_storeu_epi16(out, valid, half);
}

}  // namespace

void avx512_finish(const int32_t* sums, int sum_stride, const Epilogue& e, const Rows& rows) {
  for (int n = 0; n < e.columns; n += 16) {
    const __mmask16 valid = static_cast<__mmask16>(e.columns - n >= 16 ? 0xffff : (1 << (e.columns - n)) - 1);
    const __m512i colsum = _mm512_loadu_si512(e.colsum + n);
    const __m512 weight_scale = _mm512_maskz_loadu_ps(valid, e.weight_scale + n);
    const __m512 bias = e.bias ? _mm512_maskz_loadu_ps(valid, e.bias + n) : _mm512_setzero_ps();
    for (int r = 0; r < rows.count; r++) {
      const __m512i correction = _mm512_mullo_epi32(_mm512_set1_epi32(rows.zeros[r]), colsum);
      const __m512 total = _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_loadu_si512(sums + r * sum_stride + n), correction));
      __m512 y = _mm512_mul_ps(total, _mm512_mul_ps(_mm512_set1_ps(rows.scales[r]), weight_scale));
      if (e.bias) y = _mm512_add_ps(y, bias);
      store16(rows.out + r * rows.out_stride + n * size_of(rows.dtype), rows.dtype, valid, y);
    }
  }
}

void avx512_range(const void* values, Dtype dtype, int64_t count, bool only_absmax, Range* found) {
  if (dtype == Dtype::bfloat16) return (only_absmax ? absmax_bfloat16 : range_bfloat16)(values, count, found);
  if (dtype == Dtype::float32) return range<Dtype::float32>(values, count, found);
  range<Dtype::float16>(values, count, found);
}

void avx512_encode(const void* values, Dtype dtype, int64_t count, const Encoding& e, uint8_t* out) {
  const int size = e.format->subgroup;
  const bool common = (size == 8 || size == 16 || size == 32 || size == 64) && errors_fit(*e.format, *e.grid);
  if ((rounds_twice(*e.format) && !common) || std::isnan(e.reciprocal)) return scalar_encode(values, dtype, count, e, out);
  if (dtype == Dtype::float32) return encode<Dtype::float32>(values, count, e, out);
  if (dtype == Dtype::bfloat16) return encode<Dtype::bfloat16>(values, count, e, out);
  encode<Dtype::float16>(values, count, e, out);
}

}  // namespace halfbyte

#endif
