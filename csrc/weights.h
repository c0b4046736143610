// Float weights to scales, codes and multipliers, on vectors of any width: what quantizers.py does, in the same order.
//
//   a row of K weights   s0: v0 v1 .. v15 | s1: v0 v1 .. v15 | ..        subgroups of n values
//   columns              v0 of s0..s(W-1) | v1 of s0..s(W-1) | ..        n vectors, a lane a subgroup; then the next W subgroups
//
// Peaks, multipliers, steps and sums of a subgroup are then those of a lane, and nothing is added across lanes. The n errors of a
// subgroup are added in pairs, the first half to the second and so on; so are the sums of a row's subgroups. Missing values are
// zeros, which round to zero and add +0.
//
// Everything here is in an unnamed namespace: each instruction set compiles its own. Included by one file for each.
#pragma once

#include "floats.h"
#include "grids.h"
#include "kernels.h"
#include "lanes.h"
#include "shifted.h"

namespace halfbyte {
namespace {

enum class Levels { whole, minifloat, powers };  // how far the levels of a table are apart
enum class Multipliers { none, shifts, multiples };

// Adds v[1..] to v[0] in pairs, an odd one out going last; quantizers._sum_columns.
template <typename V>
static inline V sum_pairs(V* v, int64_t count) {
  while (count > 1) {
    const int64_t half = count / 2;
#pragma GCC ivdep
    for (int64_t i = 0; i < half; i++) v[i] += v[half + i];
    if (count % 2) v[half] = v[count - 1];
    count -= half;
  }
  return v[0];
}

// The same for a power of two known when compiling, in registers.
template <int Count, typename V>
static inline __attribute__((always_inline)) V sum_pairs(V* v) {
  if constexpr (Count > 1) {
#pragma GCC unroll 16
    for (int i = 0; i < Count / 2; i++) v[i] += v[Count / 2 + i];
    return sum_pairs<Count / 2>(v);
  }
  return v[0];
}

// W subgroups at a time of N values (a power of two), or where N is 0, of any number.
template <int W, Levels L, int N, Multipliers M>
class Rounder {
  using V = typename Lanes<W>::Floats;
  using Ints = typename Lanes<W>::Ints;
  using Doubles = typename Lanes<W>::Doubles;
  static constexpr bool shifted = M == Multipliers::shifts, multiplied = M == Multipliers::multiples;

 public:
  Rounder(const FloatRows& rows, const WeightFormat& format, uint8_t* work)
      : rows_(rows),
        grid_(table_of(format.grid)),
        max_shift_(format.max_shift),
        max_multiple_(format.max_multiple),
        n_(N ? N : format.subgroup),
        groups_((rows.count + n_ - 1) / n_),
        batches_((groups_ + W - 1) / W),
        top_bits_(bit_length(grid_.top)),
        columns_(reinterpret_cast<V*>(work)),
        largest_(columns_ + batches_ * n_),
        errors_(largest_ + batches_),
        rest_(errors_ + 2 * n_) {
    const float mantissa = static_cast<float>(1 << (L == Levels::minifloat ? whole_bits(grid_) - 1 : 0));
    least_binade_ = mantissa, magic_ = 0x1.8p23f / mantissa;
    std::memset(work, 0, static_cast<size_t>(batches_ * n_) * sizeof(V));  // what is behind the last value stays 0
  }

  float search(int64_t row, const float* factors, int points) {
    const uint32_t absmax = load_columns(row);
    if (absmax >= 0x7f800000) return __builtin_nanf("");
    const int top = max_multiple_ ? grid_.top * max_multiple_ : grid_.top << max_shift_;
    const float peak = float_of_bits(absmax) / static_cast<float>(top), widest = peak < 0x1p-126f ? 1.0f : peak;
    float* const found = reinterpret_cast<float*>(rest_);
    const int64_t pitch = batches_ * W;
    for (int64_t batch = 0; batch < batches_; batch++)
      for (int point = 0; point < points; point++)
        *reinterpret_cast<V*>(found + point * pitch + batch * W) = loss(batch, widest * factors[point]);
    float best = widest, least = __builtin_inff();
    for (int point = 0; point < points; point++) {
      const float loss = sum_pairs(found + point * pitch, groups_);
      if (loss < least) best = widest * factors[point], least = loss;
    }
    return best;
  }

  void round(int64_t row, float scale, uint8_t* codes, uint8_t* multipliers, Energy* energy) {
    load_columns(row);
    uint8_t* const nibbles = reinterpret_cast<uint8_t*>(rest_);
    Doubles signal{}, noise{};
    for (int64_t batch = 0; batch < batches_; batch++) {
      const Ints nibble = shifted ? choose_shift(batch, scale) : multiplied ? choose_multiple(batch, scale) : Ints{};
      const V step = multiplied ? __builtin_convertvector(nibble + 1, V) : power_of_two(nibble);
      V* const column = columns_ + batch * n_;
      for (int64_t i = 0; i < n_; i++) {
        const V x = column[i], level = nearest(x / scale / step);
        const Doubles exact = __builtin_convertvector(x, Doubles), error = exact - __builtin_convertvector(level * step * scale, Doubles);
        signal += exact * exact, noise += error * error;
        column[i] = level;
      }
      for (int lane = 0; lane < W; lane++) nibbles[batch * W + lane] = static_cast<uint8_t>(nibble[lane]);
    }
    for (int lane = 0; lane < W; lane++) energy->signal += signal[lane], energy->noise += noise[lane];
    if (M != Multipliers::none) pack_nibbles(nibbles, groups_, multipliers);
    store_codes(codes);
  }

 private:
  static V power_of_two(Ints exponent) { return reinterpret_cast<V>((exponent + 127) << 23); }
  static V least(V a, V b) { return a < b ? a : b; }
  static V most(V a, V b) { return a > b ? a : b; }

  // A row into columns; returns the bits of its largest magnitude, above infinity's where there is a NaN.
  uint32_t load_columns(int64_t row) {
    const char* from = static_cast<const char*>(rows_.data) + row * rows_.row_stride * size_of(rows_.dtype);
    if (rows_.dtype == Dtype::float32) spread<Dtype::float32>(from);
    if (rows_.dtype == Dtype::bfloat16) spread<Dtype::bfloat16>(from);
    if (rows_.dtype == Dtype::float16) spread<Dtype::float16>(from);
    Ints all{};
    for (int64_t batch = 0; batch < batches_; batch++) {
      Ints most{};
      for (int64_t i = 0; i < n_; i++) {
        const Ints bits = reinterpret_cast<Ints>(columns_[batch * n_ + i]) & 0x7fffffff;
        most = bits > most ? bits : most;
      }
      largest_[batch] = reinterpret_cast<V>(most);
      all = most > all ? most : all;
    }
    int32_t absmax = 0;
    for (int lane = 0; lane < W; lane++) absmax = all[lane] > absmax ? all[lane] : absmax;
    return static_cast<uint32_t>(absmax);
  }

  template <Dtype D>
  void spread(const char* from) {
    float* const to = reinterpret_cast<float*>(columns_);
    int64_t value = 0;
    for (int64_t group = 0; group < groups_; group++) {
      float* const lane = to + group / W * n_ * W + group % W;
      const int64_t length = n_ < rows_.count - value ? n_ : rows_.count - value;
      for (int64_t i = 0; i < length; i++) lane[i * W] = load(from, D, value + i);
      value += length;
    }
  }

  V nearest(V units) const {
    if (L == Levels::powers) return nearest_power(units);
    const V clamped = least(most(units, V{} + static_cast<float>(grid_.bottom)), V{} + static_cast<float>(grid_.top));
    if (L == Levels::whole) return (clamped + magic_) - magic_;
    const V binade = reinterpret_cast<V>(reinterpret_cast<Ints>(clamped) & 0x7f800000);
    const V coarse = most(binade, V{} + least_binade_) * magic_;
    return (clamped + coarse) - coarse;
  }

  // Between powers of two no digit is even: the midpoint below an even index goes up to it, the one below an odd index down.
  V nearest_power(V units) const {
    const V magnitude = reinterpret_cast<V>(reinterpret_cast<Ints>(units) & 0x7fffffff);
    V level{};
    for (int i = 1; i < grid_.count; i++) {
      const float middle = 0.5f * static_cast<float>(grid_.magnitudes[i - 1] + grid_.magnitudes[i]);
      const Ints above = i % 2 ? magnitude > middle : magnitude >= middle;
      level = above ? V{} + static_cast<float>(grid_.magnitudes[i]) : level;
    }
    return units < 0 ? 0.0f - level : level;
  }

  // The smallest shift at which a peak has no more bits than the top level; `full`: lanes that it saturates and that can go further.
  Ints flag(V peak, Ints* full) const {
    Ints shift = (reinterpret_cast<Ints>(peak) >> 23) - 126 - top_bits_;
    shift = shift < 0 ? Ints{} : shift;
    shift = shift > max_shift_ ? Ints{} + max_shift_ : shift;
    *full = (peak > power_of_two(shift) * static_cast<float>(grid_.top)) & (shift < max_shift_);
    return shift;
  }

  // Sums over the subgroups of one error of each value, or with shifts of two: at the smaller and at the larger shift.
  template <typename Error>
  __attribute__((always_inline)) void sums(int64_t batch, Error error, V* low, V* high) {
    const V* const column = columns_ + batch * n_;
    if constexpr (N) {  // unrolled
      V a[N], b[N];
#pragma GCC unroll 16
      for (int i = 0; i < N; i++) error(column[i], a + i, b + i);
      *low = sum_pairs<N>(a);
      if (shifted) *high = sum_pairs<N>(b);
    } else {
      V *const a = errors_, *const b = errors_ + n_;
      for (int64_t i = 0; i < n_; i++) error(column[i], a + i, b + i);
      *low = sum_pairs(a, n_);
      if (shifted) *high = sum_pairs(b, n_);
    }
  }

  V loss(int64_t batch, float scale) {
    if (!multiplied) return loss_at_shift(batch, scale);
    V least = loss_at_step(batch, V{} + scale);
    for (int multiple = 2; multiple <= max_multiple_; multiple++)
      least = this->least(loss_at_step(batch, V{} + scale * static_cast<float>(multiple)), least);
    return least;
  }

  V loss_at_step(int64_t batch, V step) {
    V sum{}, none{};
    sums(batch, [&](V x, V* square, V*) {
      const V units = x / step, error = (nearest(units) - units) * step;
      *square = error * error;
    }, &sum, &none);
    return sum;
  }

  V loss_at_shift(int64_t batch, float scale) {
    Ints full{};
    const V step = shifted ? power_of_two(flag(largest_[batch] / scale, &full)) * scale : V{} + scale, twice = step * 2.0f;
    V low{}, high{};
    const auto squares = [&](V x, V* small, V* large) {
      const V units = x / step, error = (nearest(units) - units) * step;
      *small = error * error;
      if (!shifted) return;
      const V half = units * 0.5f, other = (nearest(half) - half) * twice;
      *large = other * other;
    };
    sums(batch, squares, &low, &high);
    return shifted ? (full & (high < low) ? high : low) : low;
  }

  Ints choose_shift(int64_t batch, float scale) {
    Ints full{};
    const Ints shift = flag(largest_[batch] / scale, &full);
    const V shrink = power_of_two(-shift), step = power_of_two(shift);
    V low{}, high{};
    const auto squares = [&](V x, V* small, V* large) {
      const V units = x / scale, error = nearest(units * shrink) * step - units;
      const V other = nearest(units * (shrink * 0.5f)) * (step * 2.0f) - units;
      *small = error * error, *large = other * other;
    };
    sums(batch, squares, &low, &high);
    return shift - (full & (high < low));  // true is -1
  }

  // The multiple that leaves the least error, the smallest of equals; less one.
  Ints choose_multiple(int64_t batch, float scale) {
    V least{}, none{};
    Ints best{};
    for (int less = 0; less < max_multiple_; less++) {
      const V step = V{} + static_cast<float>(less + 1);
      V sum{};
      sums(batch, [&](V x, V* square, V*) {
        const V units = x / scale, error = nearest(units / step) * step - units;
        *square = error * error;
      }, &sum, &none);
      const Ints better = less ? sum < least : Ints{} - 1;
      best = better ? Ints{} + less : best;
      least = better ? sum : least;
    }
    return best;
  }

  // Levels, in columns, to codes in the order of the row.
  void store_codes(uint8_t* codes) {
    uint8_t code_of[256];
    for (int level = -128; level < 128; level++) code_of[static_cast<uint8_t>(level)] = static_cast<uint8_t>(level);
    if (grid_.bits == 4)
      for (int code = 15; code >= 0; code--) code_of[static_cast<uint8_t>(grid_.levels[code])] = static_cast<uint8_t>(code);
    const float* const from = reinterpret_cast<const float*>(columns_);
    uint8_t* const bytes = reinterpret_cast<uint8_t*>(rest_);
    for (int64_t group = 0; group < groups_; group++) {
      const float* const lane = from + group / W * n_ * W + group % W;
      for (int64_t i = 0; i < n_; i++) bytes[group * n_ + i] = code_of[static_cast<uint8_t>(static_cast<int>(lane[i * W]))];
    }
    if (grid_.bits == 4) return pack_nibbles(bytes, rows_.count, codes);
    std::memcpy(codes, bytes, static_cast<size_t>(rows_.count));
  }

  static void pack_nibbles(const uint8_t* bytes, int64_t count, uint8_t* packed) {
    for (int64_t i = 0; i < count / 2; i++) packed[i] = static_cast<uint8_t>(bytes[2 * i] | bytes[2 * i + 1] << 4);
    if (count % 2) packed[count / 2] = bytes[count - 1];
  }

  const FloatRows& rows_;
  const GridTable& grid_;
  const int max_shift_, max_multiple_;
  const int64_t n_, groups_, batches_;
  const int top_bits_;
  V* const columns_;
  V* const largest_;  // magnitudes, of the subgroups
  V* const errors_;   // room for those of W subgroups, twice
  V* const rest_;     // sums of every factor and subgroup; or nibbles, or codes, a byte each
  float least_binade_, magic_;
};

// Calls use(a Rounder for the format).
template <int W, typename Use>
static inline void with_rounder(const FloatRows& rows, const WeightFormat& format, uint8_t* work, Use use) {
  const GridTable& grid = table_of(format.grid);
  constexpr Multipliers shifts = Multipliers::shifts, multiples = Multipliers::multiples, none = Multipliers::none;
  if (format.max_multiple) {
    if (grid.contiguous && format.subgroup == 16) return use(Rounder<W, Levels::whole, 16, multiples>(rows, format, work));
    if (grid.contiguous) return use(Rounder<W, Levels::whole, 0, multiples>(rows, format, work));
    if (format.subgroup == 16) return use(Rounder<W, Levels::minifloat, 16, multiples>(rows, format, work));
    return use(Rounder<W, Levels::minifloat, 0, multiples>(rows, format, work));
  }
  if (format.max_shift) {
    if (grid.contiguous && format.subgroup == 16) return use(Rounder<W, Levels::whole, 16, shifts>(rows, format, work));
    if (grid.contiguous) return use(Rounder<W, Levels::whole, 0, shifts>(rows, format, work));
    return use(Rounder<W, Levels::minifloat, 0, shifts>(rows, format, work));
  }
  if (grid.contiguous) return use(Rounder<W, Levels::whole, 0, none>(rows, format, work));
  if (whole_bits(grid) > 1) return use(Rounder<W, Levels::minifloat, 0, none>(rows, format, work));
  use(Rounder<W, Levels::powers, 0, none>(rows, format, work));
}

template <int W>
static inline void search_rows(const ScaleSearch& s, uint8_t* work) {
  with_rounder<W>(s.rows, s.format, work, [&](auto rounder) {
    for (int64_t row = 0; row < s.rows.rows; row++) s.scales[row] = rounder.search(row, s.factors, s.points);
  });
}

template <int W>
static inline Energy round_rows(const WeightRounding& r, uint8_t* work) {
  Energy energy;
  const int64_t count = r.rows.count, groups = (count + r.format.subgroup - 1) / r.format.subgroup;
  const int64_t code_bytes = table_of(r.format.grid).bits == 4 ? (count + 1) / 2 : count;
  with_rounder<W>(r.rows, r.format, work, [&](auto rounder) {
    for (int64_t row = 0; row < r.rows.rows; row++) {
      uint8_t* const multipliers = r.multipliers ? r.multipliers + row * ((groups + 1) / 2) : nullptr;
      rounder.round(row, r.scales[row], r.codes + row * code_bytes, multipliers, &energy);
    }
  });
  return energy;
}

}  // namespace
}  // namespace halfbyte
