// ARM with dot products (ARMv8.2 and later): everything in one file. sdot multiplies signed bytes, so rows are read as u - 128, and
// the outputs take 128 off the zero points instead.
#include "dispatch.h"

#if defined(__ARM_FEATURE_DOTPROD)

#include <arm_neon.h>

#include <algorithm>
#include <cmath>

#include "floats.h"
#include "multiples.h"
#include "shifted.h"
#include "pointwise.h"
#include "softmax.h"

namespace halfbyte {
namespace {

constexpr int tile_rows = 4;

// ---- weights ----------------------------------------------------------------------------------------------------------------

void decode(const Nibbles& from, uint8_t* panel) {
  const uint8x16_t levels = vreinterpretq_u8_s8(vld1q_s8(from.grid->levels));
  const uint8_t repeats[16] = {0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3};
  const uint8x16_t repeat = vld1q_u8(repeats);
  for (int64_t i = 0; i < from.chunks * 4; i++, panel += 256) {  // sixteenths
    uint8x16_t multipliers = vdupq_n_u8(1);  // of 16 channels
    if (from.multipliers) {
      const uint8x16_t pairs = vld1q_u8(from.multipliers + i / 2 * 16);
      const uint8x16_t nibbles = i % 2 ? vshrq_n_u8(pairs, 4) : vandq_u8(pairs, vdupq_n_u8(15));
      multipliers = from.multiples ? vaddq_u8(nibbles, multipliers) : vshlq_u8(multipliers, vreinterpretq_s8_u8(nibbles));
    }
    for (int four = 0; four < 4; four++) {  // channels
      const uint8x16_t own = vqtbl1q_u8(multipliers, vaddq_u8(repeat, vdupq_n_u8(static_cast<uint8_t>(four * 4))));
      for (int q = 0; q < 4; q++) {
        const uint8x16_t pairs = vld1q_u8(from.codes + i * 128 + q / 2 * 64 + four * 16);
        const uint8x16_t codes = q % 2 ? vshrq_n_u8(pairs, 4) : vandq_u8(pairs, vdupq_n_u8(15));
        vst1q_u8(panel + q * 64 + four * 16, vmulq_u8(vqtbl1q_u8(levels, codes), own));
      }
    }
  }
}

template <int Quad, int R>
static inline void step(const uint8_t* weights, const int8x16_t (&x)[R], int32x4_t (&sum)[R][4]) {
  for (int four = 0; four < 4; four++) {
    const int8x16_t w = vreinterpretq_s8_u8(vld1q_u8(weights + Quad * 64 + four * 16));
    for (int r = 0; r < R; r++) sum[r][four] = vdotq_laneq_s32(sum[r][four], w, x[r], Quad);
  }
}

// Whole sixteenths, also the last one: weights behind a row are 0.
template <int R>
void tile(const uint8_t* const* row, const Walk& walk, const uint8_t* panel, int32_t* sums) {
  int32x4_t sum[R][4];
  for (int r = 0; r < R; r++)
    for (int four = 0; four < 4; four++) sum[r][four] = walk.first ? vld1q_s32(sums + r * 16 + four * 4) : vdupq_n_s32(0);
  for (int64_t i = walk.first; i < walk.last; i++)
    for (int64_t k = 0; k < walk.quads[i] * 4; k += 16) {
      const uint8_t* weights = panel + i * panel_chunk + k * 16;
      int8x16_t x[R];
      for (int r = 0; r < R; r++) x[r] = vreinterpretq_s8_u8(veorq_u8(vld1q_u8(row[r] + walk.offsets[i] + k), vdupq_n_u8(128)));
      step<0>(weights, x, sum);
      step<1>(weights, x, sum);
      step<2>(weights, x, sum);
      step<3>(weights, x, sum);
    }
  for (int r = 0; r < R; r++)
    for (int four = 0; four < 4; four++) vst1q_s32(sums + r * 16 + four * 4, sum[r][four]);
}

void any_tile(const uint8_t* const* row, int count, const Walk& walk, const uint8_t* panel, int64_t, int, int32_t* sums) {
  constexpr void (*tiles[tile_rows])(const uint8_t* const*, const Walk&, const uint8_t*, int32_t*) = {tile<1>, tile<2>, tile<3>,
                                                                                                      tile<4>};
  tiles[count - 1](row, walk, panel, sums);
}

// ---- inputs -----------------------------------------------------------------------------------------------------------------

struct Sixteen {
  float32x4_t v[4];
};

static inline Sixteen load16(const void* values, Dtype dtype, int64_t index) {
  Sixteen x;
  const char* from = static_cast<const char*>(values) + index * size_of(dtype);
  for (int i = 0; i < 4; i++) {
    if (dtype == Dtype::float32) {
      x.v[i] = vreinterpretq_f32_u8(vld1q_u8(reinterpret_cast<const uint8_t*>(from) + i * 16));
      continue;
    }
    const uint8x8_t half = vld1_u8(reinterpret_cast<const uint8_t*>(from) + i * 8);
    x.v[i] = dtype == Dtype::float16 ? vcvt_f32_f16(vreinterpret_f16_u8(half))
                                     : vreinterpretq_f32_u32(vshll_n_u16(vreinterpret_u16_u8(half), 16));
  }
  return x;
}

// Calls visit(sixteen values, their index), the last ones filled up with zeros.
template <typename Visit>
static inline void each_sixteen(const void* values, Dtype dtype, int64_t count, Visit visit) {
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) visit(load16(values, dtype, i), i);
  if (i == count) return;
  char rest[64] = {};
  std::memcpy(rest, static_cast<const char*>(values) + i * size_of(dtype), static_cast<size_t>((count - i) * size_of(dtype)));
  visit(load16(rest, dtype, 0), i);
}

void range(const void* values, Dtype dtype, int64_t count, bool, Range* range) {
  float32x4_t low = vdupq_n_f32(0), high = low;
  uint32x4_t most = vdupq_n_u32(0);
  each_sixteen(values, dtype, count, [&](const Sixteen& x, int64_t) {
    for (const float32x4_t& v : x.v) {
      low = vminnmq_f32(low, v), high = vmaxnmq_f32(high, v);  // the number of a number and a NaN
      most = vmaxq_u32(most, vandq_u32(vreinterpretq_u32_f32(v), vdupq_n_u32(0x7fffffff)));
    }
  });
  range->low = std::min(range->low, vminvq_f32(low)), range->high = std::max(range->high, vmaxvq_f32(high));
  range->absmax = std::max(range->absmax, vmaxvq_u32(most));
}

enum class Steps { whole, minifloat, powers };  // between the levels of a table

// As in avx512_float.cpp.
struct FirstRounding {
  float reciprocal, zero, low, high, step_of_power;
  int32_t offset;
  const GridTable& grid;
  Steps steps = Steps::whole;

  explicit FirstRounding(const Encoding& e)
      : reciprocal(e.reciprocal), zero(e.grid->is_signed ? 0.0f : e.zero), offset(e.offset), grid(*e.grid) {
    const int top = rounds_twice(*e.format) ? e.format->top : grid.top,
              bottom = rounds_twice(*e.format) ? (grid.is_signed ? -top : 0) : grid.bottom;
    low = static_cast<float>(bottom), high = static_cast<float>(top);
    const int bits = whole_bits(grid);
    step_of_power = std::ldexp(1.0f, 1 - bits);
    if (!grid.contiguous && !rounds_twice(*e.format)) steps = bits > 1 ? Steps::minifloat : Steps::powers;
  }

  float32x4_t to_level(float32x4_t m) const {
    if (steps == Steps::minifloat) {
      const float32x4_t power = vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(m), vdupq_n_u32(0x7f800000)));
      const float32x4_t magic = vmulq_n_f32(vmaxq_f32(vmulq_n_f32(power, step_of_power), vdupq_n_f32(1.0f)), 0x1.8p23f);
      return vsubq_f32(vaddq_f32(m, magic), magic);
    }
    float32x4_t level = vdupq_n_f32(0);
    for (int i = 1; i < grid.count; i++) {
      const float32x4_t middle = vdupq_n_f32(0.5f * static_cast<float>(grid.magnitudes[i - 1] + grid.magnitudes[i]));
      level = vbslq_f32(i % 2 ? vcgtq_f32(m, middle) : vcgeq_f32(m, middle), vdupq_n_f32(grid.magnitudes[i]), level);
    }
    return level;
  }

  uint8x16_t operator()(const Sixteen& x) const {
    int16x4_t narrow[4];
    for (int i = 0; i < 4; i++) {
      float32x4_t units = vmulq_n_f32(x.v[i], reciprocal);
      const uint32x4_t finite = vcltq_f32(vabsq_f32(units), vdupq_n_f32(INFINITY));
      units = vaddq_f32(vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(units), finite)), vdupq_n_f32(zero));
      units = vminq_f32(vmaxq_f32(units, vdupq_n_f32(low)), vdupq_n_f32(high));
      if (steps != Steps::whole) units = vbslq_f32(vdupq_n_u32(0x80000000), units, to_level(vabsq_f32(units)));
      narrow[i] = vqmovn_s32(vaddq_s32(vcvtnq_s32_f32(units), vdupq_n_s32(offset)));
    }
    return vcombine_u8(vqmovun_s16(vcombine_s16(narrow[0], narrow[1])), vqmovun_s16(vcombine_s16(narrow[2], narrow[3])));
  }
};

// 32 bytes, so that subgroups of 32 fit.
struct Bytes {
  uint8x16_t v[2];

  template <typename Make>
  static Bytes each(Make make) {
    return {{make(0), make(1)}};
  }
  static Bytes repeat(const uint8_t* sixteen) {
    return each([&](int) { return vld1q_u8(sixteen); });
  }
  static Bytes all(uint8_t value) {
    return each([&](int) { return vdupq_n_u8(value); });
  }
  Bytes abs() const {
    return each([&](int i) { return vreinterpretq_u8_s8(vabsq_s8(vreinterpretq_s8_u8(v[i]))); });
  }
  Bytes look_up(Bytes index) const {
    return each([&](int i) { return vqtbl1q_u8(v[i], index.v[i]); });
  }
  Bytes plus(Bytes o) const {
    return each([&](int i) { return vqaddq_u8(v[i], o.v[i]); });
  }
  Bytes minus(Bytes o) const {
    return each([&](int i) { return vqsubq_u8(v[i], o.v[i]); });
  }
  Bytes minus_wrapping(Bytes o) const {
    return each([&](int i) { return vsubq_u8(v[i], o.v[i]); });
  }
  Bytes where_reaches(Bytes a, Bytes limit) const {
    return each([&](int i) { return vandq_u8(v[i], vcgeq_u8(a.v[i], limit.v[i])); });
  }
  Bytes either(Bytes o) const {
    return each([&](int i) { return vorrq_u8(v[i], o.v[i]); });
  }
  Bytes both(Bytes o) const {
    return each([&](int i) { return vandq_u8(v[i], o.v[i]); });
  }
  Bytes least(Bytes o) const {
    return each([&](int i) { return vminq_u8(v[i], o.v[i]); });
  }
  Bytes most(Bytes o) const {
    return each([&](int i) { return vmaxq_u8(v[i], o.v[i]); });
  }
  bool any() const { return vmaxvq_u8(vorrq_u8(v[0], v[1])) != 0; }
  Bytes with_sign(Bytes x) const {
    return each([&](int i) {
      const uint8x16_t minus = vreinterpretq_u8_s8(vshrq_n_s8(vreinterpretq_s8_u8(x.v[i]), 7));
      return vsubq_u8(veorq_u8(v[i], minus), minus);
    });
  }
  template <int N>
  Bytes shift_right() const {
    return each([&](int i) { return vshrq_n_u8(v[i], N); });
  }
  template <int Size>
  Bytes group_max() const {
    if (Size == 8) {
      return each(
          [&](int i) { return vcombine_u8(vdup_n_u8(vmaxv_u8(vget_low_u8(v[i]))), vdup_n_u8(vmaxv_u8(vget_high_u8(v[i])))); });
    }
    if (Size == 16) return each([&](int i) { return vdupq_n_u8(vmaxvq_u8(v[i])); });
    return all(vmaxvq_u8(vmaxq_u8(v[0], v[1])));
  }
  // Where a subgroup's squared error against `exact` is less for `higher` than for `lower`, the one, else the other.
  template <int Size>
  static Bytes better(Bytes lower, Bytes higher, Bytes exact) {
    int64_t gain[4];
    for (int i = 0; i < 4; i++) gain[i] = error(lower, exact, i) - error(higher, exact, i);
    if (Size >= 16) gain[0] = gain[1] = gain[0] + gain[1], gain[2] = gain[3] = gain[2] + gain[3];
    if (Size >= 32) gain[0] = gain[1] = gain[2] = gain[3] = gain[0] + gain[2];
    return each([&](int i) {
      const uint8x16_t take = vcombine_u8(vdup_n_u8(gain[i * 2] > 0 ? 255 : 0), vdup_n_u8(gain[i * 2 + 1] > 0 ? 255 : 0));
      return vbslq_u8(take, higher.v[i], lower.v[i]);
    });
  }
  static int64_t error(Bytes a, Bytes b, int eight) {
    const uint8x16_t d = vabdq_u8(a.v[eight / 2], b.v[eight / 2]);
    const uint8x8_t half = eight % 2 ? vget_high_u8(d) : vget_low_u8(d);
    return vaddlvq_u16(vmull_u8(half, half));
  }
};

template <int Size, typename Rounder>
void second_rounding(const Rounder rounder, int offset, int64_t count, const uint8_t* in, uint8_t* out) {
  const uint8x16_t flip = vdupq_n_u8(static_cast<uint8_t>(offset));  // adding 128 to a byte is flipping its top bit
  for (int64_t i = 0; i < count; i += 32) {
    const Bytes u = rounder.template round<Size>(Bytes::each([&](int j) { return veorq_u8(vld1q_u8(in + i + j * 16), flip); }));
    uint8_t all[32];
    for (int j = 0; j < 2; j++) vst1q_u8(all + j * 16, veorq_u8(u.v[j], flip));
    std::memcpy(out + i, all, static_cast<size_t>(std::min<int64_t>(32, count - i)));
  }
}

constexpr int piece = 1024;  // values rounded twice while in L1

template <typename Rounder>
void encode_by(const Rounder& rounder, const void* values, Dtype dtype, int64_t count, const Encoding& e, uint8_t* out) {
  const FirstRounding round(e);
  const int size = e.format->subgroup;
  const auto again = size == 8    ? second_rounding<8, Rounder>
                     : size == 16 ? second_rounding<16, Rounder>
                                  : second_rounding<32, Rounder>;
  uint8_t bytes[piece + 32];
  for (int64_t start = 0; start < count; start += piece) {
    const int64_t some = std::min<int64_t>(piece, count - start);
    std::memset(bytes + some / 32 * 32, e.offset, 32);
    each_sixteen(static_cast<const char*>(values) + start * size_of(dtype), dtype, some, [&](const Sixteen& x, int64_t i) {
      uint8_t sixteen[16];
      vst1q_u8(sixteen, round(x));
      std::memcpy(bytes + i, sixteen, static_cast<size_t>(std::min<int64_t>(16, some - i)));
    });
    if (rounds_twice(*e.format)) {
      again(rounder, e.offset, some, bytes, out + start);
    } else {
      std::memcpy(out + start, bytes, static_cast<size_t>(some));
    }
  }
}

void encode(const void* values, Dtype dtype, int64_t count, const Encoding& e, uint8_t* out) {
  const int size = e.format->subgroup;
  const bool common = size == 8 || size == 16 || size == 32;
  if ((rounds_twice(*e.format) && !common) || std::isnan(e.reciprocal)) return scalar_encode(values, dtype, count, e, out);
  if (e.format->max_multiple)
    return encode_by(MultipleRounder<Bytes>(MultipleTables(*e.format, *e.grid)), values, dtype, count, e, out);
  encode_by(ShiftRounder<Bytes>(ShiftTables(*e.format, *e.grid)), values, dtype, count, e, out);
}

// ---- outputs ----------------------------------------------------------------------------------------------------------------

void finish(const int32_t* sums, int sum_stride, const Epilogue& e, const Rows& rows) {
  for (int n = 0; n < e.columns; n += 4) {
    const int some = std::min(4, e.columns - n);
    int32_t colsum[4];
    float weight_scale[4] = {}, bias[4] = {};
    std::memcpy(colsum, reinterpret_cast<const char*>(e.colsum) + n * 4, 16);
    std::memcpy(weight_scale, e.weight_scale + n, static_cast<size_t>(some) * 4);
    if (e.bias) std::memcpy(bias, e.bias + n, static_cast<size_t>(some) * 4);
    for (int r = 0; r < rows.count; r++) {
      const int32x4_t correction = vmulq_n_s32(vld1q_s32(colsum), rows.zeros[r] - 128);
      const float32x4_t total = vcvtq_f32_s32(vsubq_s32(vld1q_s32(sums + r * sum_stride + n), correction));
      float32x4_t y = vmulq_f32(total, vmulq_n_f32(vld1q_f32(weight_scale), rows.scales[r]));
      if (e.bias) y = vaddq_f32(y, vld1q_f32(bias));
      float values[4];
      vst1q_f32(values, y);
      char* out = rows.out + r * rows.out_stride;
      for (int i = 0; i < some; i++) store(out, rows.dtype, n + i, values[i]);
    }
  }
}

}  // namespace

const Kernels* neon_kernels() {
  static const Kernels kernels = {
      .rows = tile_rows,
      .blocks = 1,
      .chunk_bytes = panel_chunk,
      .panel_budget = 256 * 1024,
      .range = range,
      .encode = encode,
      .decode = decode,
      .tile = any_tile,
      .finish = finish,
      .search = scalar_search,
      .round = scalar_round,
      .soften = Softmax<4>::soften,
      .gather = Softmax<4>::gather,
      .gelu = Pointwise<4>::gelu,
      .geglu = Pointwise<4>::geglu,
      .sum_pixels = Pointwise<4>::sum_pixels,
      .scale_pixels = Pointwise<4>::scale_pixels,
      .tile_zero = 128,
  };
  return &kernels;
}

double neon_rounds(int64_t rounds) {
  const int8x16_t x = vdupq_n_s8(3), w = vdupq_n_s8(1);
  int32x4_t sum[16];
  for (int32x4_t& s : sum) s = vdupq_n_s32(0);
  for (int64_t round = 0; round < rounds; round++)
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) {
      sum[i] = vdotq_s32(sum[i], x, w);
      __asm__ volatile("" : "+w"(sum[i]));
    }
  return static_cast<double>(rounds) * 16 * 16;
}

}  // namespace halfbyte

#else

namespace halfbyte {
const Kernels* neon_kernels() { return nullptr; }
double neon_rounds(int64_t) { return 0; }
}  // namespace halfbyte

#endif
