// AVX2: inputs to bytes, and sums to outputs. The AVX-512 file has the same parts in the same order.
#include "avx2.h"

#if defined(__AVX2__)

#include <immintrin.h>

#include <algorithm>
#include <cmath>

#include "floats.h"
#include "internal.h"
#include "multiples.h"
#include "shifted.h"

namespace halfbyte {
namespace {

template <Dtype D>
static inline __m256 load8(const void* values, int64_t index) {
  const char* from = static_cast<const char*>(values) + index * size_of(D);
  if (D == Dtype::float32) return _mm256_loadu_ps(reinterpret_cast<const float*>(from));
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  if (D == Dtype::float16) return _mm256_cvtph_ps(half);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

// Calls visit(pointer, index, how many) for pieces of `Step` values, the last one from a copy that zeros fill up.
template <Dtype D, int Step, typename Visit>
static inline void each_step(const void* values, int64_t count, Visit visit) {
  int64_t i = 0;
  for (; i + Step <= count; i += Step) visit(values, i, i);
  if (i == count) return;
  alignas(32) char rest[Step * 4] = {};
  std::memcpy(rest, static_cast<const char*>(values) + i * size_of(D), static_cast<size_t>((count - i) * size_of(D)));
  visit(rest, 0, i);
}

template <typename Pick>
static inline float fold(__m256 v, Pick pick) {
  float lanes[8];
  _mm256_storeu_ps(lanes, v);
  for (int i = 1; i < 8; i++) lanes[0] = pick(lanes[0], lanes[i]);
  return lanes[0];
}

template <Dtype D>
void range(const void* values, int64_t count, Range* range) {
  __m256 low = _mm256_setzero_ps(), high = low;
  __m256i most = _mm256_setzero_si256();
  each_step<D, 8>(values, count, [&](const void* from, int64_t at, int64_t) {
    const __m256 x = load8<D>(from, at);
    low = _mm256_min_ps(x, low), high = _mm256_max_ps(x, high);  // a NaN yields the second operand
    most = _mm256_max_epu32(most, _mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(0x7fffffff)));
  });
  range->low = std::min(range->low, fold(low, [](float a, float b) { return a < b ? a : b; }));
  range->high = std::max(range->high, fold(high, [](float a, float b) { return a > b ? a : b; }));
  uint32_t lanes[8];
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(lanes), most);
  for (uint32_t lane : lanes) range->absmax = std::max(range->absmax, lane);
}

void absmax_bfloat16(const void* values, int64_t count, Range* range) {
  __m256i most = _mm256_setzero_si256();
  each_step<Dtype::bfloat16, 16>(values, count, [&](const void* from, int64_t at, int64_t) {
    const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(static_cast<const uint16_t*>(from) + at));
    most = _mm256_max_epu16(most, _mm256_and_si256(x, _mm256_set1_epi16(0x7fff)));
  });
  uint16_t lanes[16];
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(lanes), most);
  for (uint16_t lane : lanes) range->absmax = std::max(range->absmax, static_cast<uint32_t>(lane) << 16);
}

// See avx512_float.cpp.
void range_bfloat16(const void* values, int64_t count, Range* range) {
  absmax_bfloat16(values, count, range);
  __m256i low = _mm256_setzero_si256(), high = low;
  each_step<Dtype::bfloat16, 16>(values, count, [&](const void* from, int64_t at, int64_t) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(static_cast<const uint16_t*>(from) + at));
    const __m256i keys = _mm256_xor_si256(bits, _mm256_srli_epi16(_mm256_srai_epi16(bits, 15), 1));
    low = _mm256_min_epi16(low, keys), high = _mm256_max_epi16(high, keys);
  });
  int16_t least[16], most[16];
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(least), low), _mm256_storeu_si256(reinterpret_cast<__m256i*>(most), high);
  range->low = std::min(range->low, from_order(*std::min_element(least, least + 16)));
  range->high = std::max(range->high, from_order(*std::max_element(most, most + 16)));
}

// ---- first rounding: floats to bytes ----------------------------------------------------------------------------------------

// See avx512_float.cpp.
static inline __m256 round_minifloat(__m256 m, __m256 step_of_power) {
  const __m256 power = _mm256_and_ps(m, _mm256_castsi256_ps(_mm256_set1_epi32(0x7f800000)));
  const __m256 step = _mm256_max_ps(_mm256_mul_ps(power, step_of_power), _mm256_set1_ps(1.0f));
  const __m256 magic = _mm256_mul_ps(step, _mm256_set1_ps(0x1.8p23f));
  return _mm256_sub_ps(_mm256_add_ps(m, magic), magic);
}

static inline __m256 round_powers(__m256 m, const GridTable& grid) {
  __m256 level = _mm256_setzero_ps();
  for (int i = 1; i < grid.count; i++) {
    const __m256 middle = _mm256_set1_ps(0.5f * static_cast<float>(grid.magnitudes[i - 1] + grid.magnitudes[i]));
    const __m256 above = i % 2 ? _mm256_cmp_ps(m, middle, _CMP_GT_OQ) : _mm256_cmp_ps(m, middle, _CMP_GE_OQ);
    level = _mm256_blendv_ps(level, _mm256_set1_ps(grid.magnitudes[i]), above);
  }
  return level;
}

enum class Steps { whole, minifloat, powers };  // between the levels of a table

struct FirstRounding {
  __m256 reciprocal, zero, low, high, step_of_power;
  __m256i offset;
  const GridTable& grid;
  Steps steps = Steps::whole;

  explicit FirstRounding(const Encoding& e) : grid(*e.grid) {
    const bool is_signed = grid.is_signed;
    const int top = rounds_twice(*e.format) ? e.format->top : grid.top,
              bottom = rounds_twice(*e.format) ? (is_signed ? -top : 0) : grid.bottom;
    reciprocal = _mm256_set1_ps(e.reciprocal), zero = _mm256_set1_ps(is_signed ? 0.0f : e.zero);
    low = _mm256_set1_ps(static_cast<float>(bottom)), high = _mm256_set1_ps(static_cast<float>(top));
    offset = _mm256_set1_epi32(e.offset);
    const int bits = whole_bits(grid);
    if (!grid.contiguous && !rounds_twice(*e.format)) steps = bits > 1 ? Steps::minifloat : Steps::powers;
    step_of_power = _mm256_set1_ps(std::ldexp(1.0f, 1 - bits));
  }

  // 32-bit integers 0..255.
  template <Steps S>
  __m256i apply(__m256 x) const {
    const __m256 no_sign = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
    __m256 units = _mm256_mul_ps(x, reciprocal);
    const __m256 finite = _mm256_cmp_ps(_mm256_and_ps(units, no_sign), _mm256_set1_ps(INFINITY), _CMP_LT_OQ);
    units = _mm256_add_ps(_mm256_and_ps(units, finite), zero);
    units = _mm256_min_ps(_mm256_max_ps(units, low), high);
    if (S != Steps::whole) {
      const __m256 m = _mm256_and_ps(units, no_sign), sign = _mm256_andnot_ps(no_sign, units);
      units = _mm256_or_ps(S == Steps::minifloat ? round_minifloat(m, step_of_power) : round_powers(m, grid), sign);
    }
    return _mm256_add_epi32(_mm256_cvtps_epi32(units), offset);
  }
};

// `round` by value: stores through a byte pointer may alias what is in memory.
template <Dtype D, Steps S>
void round_once(const void* values, int64_t count, const FirstRounding round, uint8_t* out) {
  each_step<D, 32>(values, count, [&](const void* from, int64_t at, int64_t index) {
    const __m256i a = _mm256_packs_epi32(round.template apply<S>(load8<D>(from, at)), round.apply<S>(load8<D>(from, at + 8)));
    const __m256i b = _mm256_packs_epi32(round.template apply<S>(load8<D>(from, at + 16)), round.apply<S>(load8<D>(from, at + 24)));
    const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packus_epi16(a, b), _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    if (count - index >= 32) return _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + index), bytes);
    uint8_t rest[32];
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(rest), bytes);
    std::memcpy(out + index, rest, static_cast<size_t>(count - index));
  });
}

template <Dtype D>
void first_rounding(const void* values, int64_t count, const FirstRounding& round, uint8_t* out) {
  if (round.steps == Steps::whole) return round_once<D, Steps::whole>(values, count, round, out);
  if (round.steps == Steps::minifloat) return round_once<D, Steps::minifloat>(values, count, round, out);
  round_once<D, Steps::powers>(values, count, round, out);
}

// ---- second rounding --------------------------------------------------------------------------------------------------------

struct Bytes {
  __m256i v;

  static Bytes repeat(const uint8_t* sixteen) {
    return {_mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(sixteen)))};
  }
  static Bytes all(uint8_t value) { return {_mm256_set1_epi8(static_cast<char>(value))}; }
  Bytes abs() const { return {_mm256_abs_epi8(v)}; }
  Bytes look_up(Bytes index) const { return {_mm256_shuffle_epi8(v, index.v)}; }
  Bytes plus(Bytes o) const { return {_mm256_adds_epu8(v, o.v)}; }
  Bytes minus(Bytes o) const { return {_mm256_subs_epu8(v, o.v)}; }
  Bytes minus_wrapping(Bytes o) const { return {_mm256_sub_epi8(v, o.v)}; }
  Bytes where_reaches(Bytes a, Bytes limit) const {
    return {_mm256_and_si256(v, _mm256_cmpeq_epi8(_mm256_max_epu8(a.v, limit.v), a.v))};
  }
  Bytes either(Bytes o) const { return {_mm256_or_si256(v, o.v)}; }
  Bytes both(Bytes o) const { return {_mm256_and_si256(v, o.v)}; }
  Bytes least(Bytes o) const { return {_mm256_min_epu8(v, o.v)}; }
  Bytes most(Bytes o) const { return {_mm256_max_epu8(v, o.v)}; }
  bool any() const { return !_mm256_testz_si256(v, v); }
  Bytes with_sign(Bytes x) const { return {_mm256_sign_epi8(v, x.v)}; }
  template <int N>
  Bytes shift_right() const {
    return {_mm256_and_si256(_mm256_srli_epi16(v, N), _mm256_set1_epi8(static_cast<char>(0xff >> N)))};
  }
  template <int Size>
  Bytes group_max() const {
    const __m256i swapped = _mm256_broadcastsi128_si256(_mm_setr_epi8(1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14));
    const __m256i pairs = _mm256_broadcastsi128_si256(_mm_setr_epi8(2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));
    __m256i m = _mm256_max_epu8(v, _mm256_shuffle_epi8(v, swapped));
    m = _mm256_max_epu8(m, _mm256_shuffle_epi8(m, pairs));
    m = _mm256_max_epu8(m, _mm256_shuffle_epi32(m, 0xb1));
    if (Size >= 16) m = _mm256_max_epu8(m, _mm256_shuffle_epi32(m, 0x4e));
    if (Size >= 32) m = _mm256_max_epu8(m, _mm256_permute2x128_si256(m, m, 1));
    return {m};
  }
  template <int Size>
  static Bytes better(Bytes lower, Bytes higher, Bytes exact) {
    __m256i gain = _mm256_sub_epi32(squares(lower, exact), squares(higher, exact));
    gain = _mm256_add_epi32(gain, _mm256_shuffle_epi32(gain, 0xb1));
    if (Size >= 16) gain = _mm256_add_epi32(gain, _mm256_shuffle_epi32(gain, 0x4e));
    if (Size >= 32) gain = _mm256_add_epi32(gain, _mm256_permute2x128_si256(gain, gain, 1));
    return {_mm256_blendv_epi8(lower.v, higher.v, _mm256_cmpgt_epi32(gain, _mm256_setzero_si256()))};
  }
  static __m256i squares(Bytes a, Bytes b) {  // sums of 4
    const __m256i d = _mm256_or_si256(_mm256_subs_epu8(a.v, b.v), _mm256_subs_epu8(b.v, a.v));
    return _mm256_madd_epi16(_mm256_maddubs_epi16(d, d), _mm256_set1_epi16(1));
  }
};

template <int Size, typename Rounder>
void second_rounding(const Rounder rounder, int offset, int64_t count, const uint8_t* in, uint8_t* out) {
  const __m256i flip = _mm256_set1_epi8(static_cast<char>(offset));  // adding 128 to a byte is flipping its top bit
  for (int64_t i = 0; i < count; i += 32) {
    const __m256i x = _mm256_xor_si256(_mm256_load_si256(reinterpret_cast<const __m256i*>(in + i)), flip);
    const __m256i u = _mm256_xor_si256(rounder.template round<Size>({x}).v, flip);
    if (count - i >= 32) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), u);
    } else {
      uint8_t rest[32];
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(rest), u);
      std::memcpy(out + i, rest, static_cast<size_t>(count - i));
    }
  }
}

constexpr int piece = 1024;  // values rounded twice while in L1

template <Dtype D, typename Rounder>
void encode_twice(const void* values, int64_t count, const Encoding& e, const FirstRounding& round, const Rounder& rounder,
                  uint8_t* out) {
  const int size = e.format->subgroup;
  const auto again = size == 8    ? second_rounding<8, Rounder>
                     : size == 16 ? second_rounding<16, Rounder>
                                  : second_rounding<32, Rounder>;
  alignas(32) uint8_t bytes[piece];
  for (int64_t start = 0; start < count; start += piece) {
    const int64_t some = std::min<int64_t>(piece, count - start);
    if (some % 32)
      _mm256_store_si256(reinterpret_cast<__m256i*>(bytes + some / 32 * 32), _mm256_set1_epi8(static_cast<char>(e.offset)));
    first_rounding<D>(static_cast<const char*>(values) + start * size_of(D), some, round, bytes);
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
  first_rounding<D>(values, count, round, out);
}

// ---- sums to outputs --------------------------------------------------------------------------------------------------------

static inline __m128i to_half(Dtype dtype, __m256 y) {
  if (dtype == Dtype::float16) return _mm256_cvtps_ph(y, _MM_FROUND_TO_NEAREST_INT);
  const __m256i bits = _mm256_castps_si256(y), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i either = _mm256_blendv_epi8(rounded, quiet, _mm256_castps_si256(_mm256_cmp_ps(y, y, _CMP_UNORD_Q)));
  const __m256i halves = _mm256_srli_epi32(either, 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
}

static inline void store8(char* out, Dtype dtype, int count, __m256 y) {
  if (count >= 8) {
    if (dtype == Dtype::float32) return _mm256_storeu_ps(reinterpret_cast<float*>(out), y);
    return _mm_storeu_si128(reinterpret_cast<__m128i*>(out), to_half(dtype, y));
  }
  char all[32];
  if (dtype == Dtype::float32) {
    _mm256_storeu_ps(reinterpret_cast<float*>(all), y);
  } else {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(all), to_half(dtype, y));
  }
  std::memcpy(out, all, static_cast<size_t>(count * size_of(dtype)));
}

static inline __m256 load_some(const float* from, int count) {
  const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_maskload_ps(from, _mm256_cmpgt_epi32(_mm256_set1_epi32(count), lanes));
}

}  // namespace

void avx2_finish(const int32_t* sums, int sum_stride, const Epilogue& e, const Rows& rows) {
  for (int n = 0; n < e.columns; n += 8) {
    const int some = e.columns - n;
    const __m256i colsum = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(e.colsum + n));
    const __m256 weight_scale = load_some(e.weight_scale + n, some);
    const __m256 bias = e.bias ? load_some(e.bias + n, some) : _mm256_setzero_ps();
    for (int r = 0; r < rows.count; r++) {
      const __m256i correction = _mm256_mullo_epi32(_mm256_set1_epi32(rows.zeros[r]), colsum);
      const __m256i sum = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(sums + r * sum_stride + n));
      const __m256 total = _mm256_cvtepi32_ps(_mm256_sub_epi32(sum, correction));
      __m256 y = _mm256_mul_ps(total, _mm256_mul_ps(_mm256_set1_ps(rows.scales[r]), weight_scale));
      if (e.bias) y = _mm256_add_ps(y, bias);
      store8(rows.out + r * rows.out_stride + n * size_of(rows.dtype), rows.dtype, some, y);
    }
  }
}

void avx2_range(const void* values, Dtype dtype, int64_t count, bool only_absmax, Range* found) {
  if (dtype == Dtype::bfloat16) return (only_absmax ? absmax_bfloat16 : range_bfloat16)(values, count, found);
  if (dtype == Dtype::float32) return range<Dtype::float32>(values, count, found);
  range<Dtype::float16>(values, count, found);
}

void avx2_encode(const void* values, Dtype dtype, int64_t count, const Encoding& e, uint8_t* out) {
  const int size = e.format->subgroup;
  const bool common = (size == 8 || size == 16 || size == 32) && errors_fit(*e.format, *e.grid);
  if ((rounds_twice(*e.format) && !common) || std::isnan(e.reciprocal)) return scalar_encode(values, dtype, count, e, out);
  if (dtype == Dtype::float32) return encode<Dtype::float32>(values, count, e, out);
  if (dtype == Dtype::bfloat16) return encode<Dtype::bfloat16>(values, count, e, out);
  encode<Dtype::float16>(values, count, e, out);
}

}  // namespace halfbyte

#endif
