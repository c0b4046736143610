// The second rounding of grids with multiples (quantizers.round_with_multiples) on vectors of bytes, for any width. V is that of
// shifted.h.
//
// m - 1, for the smallest multiple m with which the table's top reaches a subgroup's largest magnitude M, is (M - 1) / top. Among
// M of the same M >> 3 (signed, M <= 127) or M >> 4 (unsigned) it steps up at most once, as no table's top is below 7 or 15: two
// look-ups and a comparison find it.
//
// Rounding a to a multiple of a step s, ties to even, is a long division in binary: a + s / 2 loses 8 s, 4 s and 2 s where it holds
// them; in bytes that wrap, r - k s where that is less than r. Of what is left a last s goes where it is held, but not of s exactly
// where s is even: there a was a tie, and the quotient without it is even. The difference is the level. Quotients end at 15 (or 7),
// where contiguous tables saturate. On minifloat tables s is m, and doubles at the levels that are 2**bits m and twice that.
#pragma once

#include <algorithm>

#include "shifted.h"

namespace halfbyte {

// Whether no error of a smaller multiple passes 127, as V::better takes it: where `top` lies far beyond the table's, it may.
static inline bool errors_fit(const InputFormat& format, const GridTable& grid) {
  return !format.max_multiple || format.top - grid.top * (format.max_multiple - 1) < 128;
}

struct MultipleTables {
  alignas(16) uint8_t less[16], last[16];  // by M: m - 1 of the least M, and the last M that shares it (255: all do)
  alignas(16) uint8_t cap[16];             // by m - 1: top * m
  int bits;                                // levels below 2**bits are m apart
  bool is_signed, contiguous, eights, lone_bottom;

  MultipleTables(const InputFormat& format, const GridTable& grid)
      : bits(whole_bits(grid)),
        is_signed(grid.is_signed),
        contiguous(grid.contiguous),
        eights(grid.count > 8 || grid.bottom < -grid.top),
        lone_bottom(grid.is_signed && grid.bottom < -grid.top) {
    const int size = grid.is_signed ? 8 : 16;
    for (int i = 0; i < 16; i++) {
      const int found = std::max(i * size - 1, 0) / grid.top, reached = (found + 1) * grid.top;
      less[i] = static_cast<uint8_t>(std::min(found, format.max_multiple - 1));
      last[i] = static_cast<uint8_t>(found >= format.max_multiple - 1 ? 255 : std::min(255, reached));
      cap[i] = static_cast<uint8_t>(std::min(255, grid.top * (i + 1)));
    }
  }
};

template <typename V>
class MultipleRounder {
 public:
  explicit MultipleRounder(const MultipleTables& t)
      : less_(V::repeat(t.less)),
        last_(V::repeat(t.last)),
        cap_(V::repeat(t.cap)),
        bits_(t.bits),
        is_signed_(t.is_signed),
        contiguous_(t.contiguous),
        eights_(t.eights),
        lone_bottom_(t.lone_bottom) {}

  // Bytes in (int8 or uint8 integers) to the rounded integers; subgroups of `Size` neighbours.
  template <int Size>
  V round(V x) const {
    const V a = is_signed_ ? x.abs() : x, one = V::all(1);
    const V largest = a.template group_max<Size>();
    const V index = is_signed_ ? largest.template shift_right<3>() : largest.template shift_right<4>();
    const V less = less_.look_up(index).plus(largest.minus(last_.look_up(index)).least(one));
    V rounded = round_to(a, x, less);
    if (less.any()) rounded = V::template better<Size>(rounded, round_to(a, x, less.minus(one)), a);
    return is_signed_ ? rounded.with_sign(x) : rounded;
  }

 private:
  V round_to(V a, V x, V less) const {
    const V one = V::all(1), m = less.plus(one);
    V step = m;
    if (!contiguous_) {
      const V twice = m.plus(m), four = twice.plus(twice), eight = four.plus(four);
      const V first = bits_ == 2 ? four : eight;
      step = step.plus(m.where_reaches(a, first)).plus(twice.where_reaches(a, first.plus(first)));
    }
    const V half = step.template shift_right<1>(), twice = step.plus(step), four = twice.plus(twice), whole = a.plus(half);
    V rest = whole;
    if (eights_) rest = rest.least(rest.minus_wrapping(four.plus(four)));
    rest = rest.least(rest.minus_wrapping(four));
    rest = rest.least(rest.minus_wrapping(twice));
    rest = rest.minus(step.where_reaches(rest, step.either(one)));
    const V level = whole.minus(rest);
    if (contiguous_ && !lone_bottom_) return level;
    const V cap = cap_.look_up(less);
    return level.least(lone_bottom_ ? cap.plus(m.where_reaches(x, V::all(128))) : cap);
  }

  V less_, last_, cap_;
  int bits_;
  bool is_signed_, contiguous_, eights_, lone_bottom_;
};

}  // namespace halfbyte
