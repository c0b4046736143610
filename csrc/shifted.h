// The second rounding of shifted grids (leading-zero suppression) on vectors of bytes, for any width.
//
// Magnitudes are bytes, so everything that depends on a subgroup's largest one, m, is a look-up by m >> 3 (signed, m <= 127) or m
// >> 4 (unsigned): the shift, and what is added, masked and capped for it. Rounding a to a multiple of 2**t, ties to even, is (a +
// 2**(t-1) - 1 + bit t of a) with the low t bits cleared. On minifloat tables t also grows with the value's own length.
//
// One more shift can only pay where the largest magnitude saturates: below that, the levels of the larger shift are a subset of
// those of the smaller one. So its error is only computed for vectors where some subgroup saturates.
#pragma once

#include <algorithm>

#include "grids.h"

namespace halfbyte {

// `first` is the number of values below which the table holds every integer: 2**bits, and minifloats are as exact as `bits + 1`
// digits.
static inline int whole_bits(const GridTable& grid) {
  if (grid.contiguous) return 8;
  int index = 1;
  while (grid.magnitudes[index + 1] == index + 1) index++;
  return bit_length(index) - 1;
}

struct ShiftTables {
  alignas(16) uint8_t shift[16], full[16];  // by m: the smaller shift; the largest magnitude without saturation (255: no matter)
  alignas(16) uint8_t cap[16];              // by shift: top << shift
  alignas(16) uint8_t add[16], odd[16], keep[16];       // by t: 2**(t-1) - 1, 2**t (0 where t = 0), ~(2**t - 1)
  alignas(16) uint8_t length_low[16], length_high[16];  // by nibbles of a value: the t that its length asks for
  uint8_t max_shift;
  bool is_signed, contiguous, truncate;

  ShiftTables(const InputFormat& format, const GridTable& grid)
      : max_shift(static_cast<uint8_t>(format.max_shift)),
        is_signed(grid.is_signed),
        contiguous(grid.contiguous),
        truncate(format.truncate) {
    const int bits = whole_bits(grid), fraction = grid.is_signed ? 3 : 4;
    for (int i = 0; i < 16; i++) {
      const int largest = (i + 1) * (1 << fraction) - 1;
      const int flag = i == 0 ? 0 : std::min(std::max(bit_length(largest) - bit_length(grid.top), 0), format.max_shift);
      shift[i] = static_cast<uint8_t>(flag);
      full[i] = static_cast<uint8_t>(flag == format.max_shift || truncate ? 255 : grid.top << flag);
      cap[i] = static_cast<uint8_t>(std::min(255, grid.top << std::min(i, format.max_shift)));
      add[i] = static_cast<uint8_t>(i == 0 || i > 7 || truncate ? 0 : (1 << (i - 1)) - 1);
      odd[i] = static_cast<uint8_t>(i == 0 || i > 7 || truncate ? 0 : 1 << i);
      keep[i] = static_cast<uint8_t>(i > 7 ? 0 : 256 - (1 << i));
      length_low[i] = static_cast<uint8_t>(std::max(bit_length(i) - bits, 0));
      length_high[i] = static_cast<uint8_t>(i ? std::max(bit_length(i) + 4 - bits, 0) : 0);
    }
  }
};

// V wraps a vector register; see avx2_float.cpp and avx512_float.cpp for what it offers.
template <typename V>
class ShiftRounder {
 public:
  explicit ShiftRounder(const ShiftTables& t)
      : shift_(V::repeat(t.shift)),
        full_(V::repeat(t.full)),
        cap_(V::repeat(t.cap)),
        add_(V::repeat(t.add)),
        odd_(V::repeat(t.odd)),
        keep_(V::repeat(t.keep)),
        low_(V::repeat(t.length_low)),
        high_(V::repeat(t.length_high)),
        max_shift_(V::all(t.max_shift)),
        is_signed_(t.is_signed),
        contiguous_(t.contiguous) {}

  // Bytes in (int8 or uint8 integers) to the rounded integers; subgroups of `Size` neighbours.
  template <int Size>
  V round(V x) const {
    const V a = is_signed_ ? x.abs() : x;
    const V largest = a.template group_max<Size>();
    const V index = is_signed_ ? largest.template shift_right<3>() : largest.template shift_right<4>();
    const V shift = shift_.look_up(index);
    V rounded = round_to(a, shift);
    if (largest.minus(full_.look_up(index)).any()) {
      const V more = shift.plus(V::all(1)).least(max_shift_), higher = round_to(a, more);
      rounded = V::template better<Size>(rounded, higher, a);
    }
    return is_signed_ ? rounded.with_sign(x) : rounded;
  }

 private:
  V round_to(V a, V shift) const {
    V t = shift;
    if (!contiguous_) t = t.most(low_.look_up(a.both(V::all(15)))).most(high_.look_up(a.template shift_right<4>()));
    const V odd = a.both(odd_.look_up(t)).least(V::all(1));
    return a.plus(add_.look_up(t)).plus(odd).both(keep_.look_up(t)).least(cap_.look_up(shift));
  }

  V shift_, full_, cap_, add_, odd_, keep_, low_, high_, max_shift_;
  bool is_signed_, contiguous_;
};

}  // namespace halfbyte
