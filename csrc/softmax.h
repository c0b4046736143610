// Softmax between the two products of attention, on vectors of any width: what runtime/attention.py does, in the same float32
// operations, and from scores to codes in the same whole numbers of 16 bits.
//
// Everything here is in an unnamed namespace: each instruction set compiles its own. Included by one file for each.
#pragma once

#include <cmath>
#include <type_traits>

#include "floats.h"
#include "kernels.h"
#include "lanes.h"
#include "shorts.h"

namespace halfbyte {
namespace {

// All lanes in one, halves with each other.
template <int W, typename V, typename F>
static inline auto reduce(V v, F join) {
  if constexpr (W == 4) {
    return join(join(v[0], v[2]), join(v[1], v[3]));
  } else {
    constexpr bool floats = std::is_same_v<V, typename Lanes<W>::Floats>;
    using Half = std::conditional_t<floats, typename Lanes<W / 2>::Floats, typename Lanes<W / 2>::Ints>;
    Half halves[2];
    std::memcpy(halves, &v, sizeof v);
    return reduce<W / 2>(join(halves[0], halves[1]), join);
  }
}

template <int W>
struct Softmax {
  using Floats = typename Lanes<W>::Floats;
  using Ints = typename Lanes<W>::Ints;
  using Short = typename Shorts<W>::V;
  static constexpr int part = key_block / 4;    // keys of one byte of the codes' words
  static constexpr int vectors = key_block / W;
  static constexpr float lowest = -0x1p60f, unseen = -0x1p90f;  // scores

  static inline Floats all(float value) { return Floats{} + value; }

  // Codes of steps: see `cubic`.
  static inline Short code(Short x) {
    const Short whole = (Short)((typename Shorts<W>::Signed)x >> 11), fraction = x << 5;
    Short power = Short{} + cubic[0];
    for (int i = 1; i < 4; i++) power = Shorts<W>::high(fraction, power) + cubic[i];
    return Shorts<W>::half(Shorts<W>::shift_right(power, 6 - whole));
  }

  static inline Ints steps(Floats x) { return __builtin_convertvector(larger(x, all(least_steps)), Ints); }

  // Scores in steps, within 2**60, which keeps all that follows finite. sums: of the first row, for each block of keys.
  template <bool Biased>
  static inline void score(const Softening& s, int row, const int32_t* const* sums_of, Floats* scores) {
    for (int v = 0; v < vectors; v++) {
      const int key = v * W;
      const Ints sums = load_lanes<Ints>(sums_of[key / 16] + row * s.sums.blocks * 16 + key % 16);
      const Floats exact = __builtin_convertvector(sums - load_lanes<Ints>(s.corrections + key), Floats);
      Floats t = exact * load_lanes<Floats>(s.key_scales + key) * s.row_scales[row];
      Floats bias{};
      if (Biased) t += bias = bias_at(s, row, key);
      const Floats low = larger(t, all(lowest)), bounded = smaller(low, all(-lowest));
      scores[v] = Biased ? (bias > all(-INFINITY) ? bounded : all(unseen)) : bounded;
    }
    if (s.keys == key_block) return;
    Ints key;
    for (int i = 0; i < W; i++) key[i] = i;
    for (int v = 0; v < vectors; v++) scores[v] = key + v * W < s.keys ? scores[v] : all(unseen);
  }

  static inline Floats bias_at(const Softening& s, int row, int key) {
    const float* from = s.bias + row * s.bias_stride + key;
    if (key + W <= s.keys) return load_lanes<Floats>(from);
    float some[W] = {};
    for (int i = 0; i < s.keys - key; i++) some[i] = from[i];
    return load_lanes<Floats>(some);
  }

  template <bool Biased>
  static inline float largest(const Floats* scores) {
    Floats most = scores[0];
    for (int v = 1; v < vectors; v++) most = larger(most, scores[v]);
    if (Biased) most = larger(most, all(lowest));  // a bias may hide all keys
    return reduce<W>(most, [](auto a, auto b) { return a > b ? a : b; });
  }

  // Exponents of a block of keys, and the sums of its codes, by row.
  struct Block {
    float exponents[most_rows];
    int32_t totals[most_rows];
  };

  static inline float power_of_two(float exponent) {  // a whole number up to 0; 2**-126 stands for all that is less
    const float bounded = exponent > -126.0f ? exponent : -126.0f;
    return float_of_bits(static_cast<uint32_t>(static_cast<int>(bounded) + 127) << 23);
  }

  static inline void join(const Softening& s, const Block& block) {
    for (int r = 0; r < s.rows; r++) {
      const float own = block.exponents[r], before = s.first ? own : s.exponents[r], now = before > own ? before : own;
      s.keep[r] = s.first ? 0.0f : power_of_two(before - now), s.weight[r] = power_of_two(own - now);
      s.exponents[r] = now;
      s.totals[r] = (s.first ? 0.0f : s.totals[r] * s.keep[r]) + static_cast<float>(block.totals[r]) * s.weight[r];
    }
  }

  template <bool Biased, bool Pairs>
  [[gnu::always_inline]] static inline void row(const Softening& s, int row, const int32_t* const* sums, Block& block) {
    Floats scores[vectors];
    score<Biased>(s, row, sums, scores);
    const float exponent = std::ceil(largest<Biased>(scores) * (1.0f / steps_of_two)), top = exponent * steps_of_two;
    Short total{};
    for (int i = 0; i < part; i += W) {
      Ints x[4];
      for (int byte = 0; byte < 4; byte++) x[byte] = steps(scores[(byte * part + i) / W] - top);
      const Short even = code((Short)((x[0] & 0xffff) | x[2] << 16)), odd = code((Short)((x[1] & 0xffff) | x[3] << 16));
      total += even + odd;
      if constexpr (Pairs) {
        uint8_t* to = s.codes + row * 2 * key_block + i * 4;
        std::memcpy(to, &even, sizeof even), std::memcpy(to + key_block, &odd, sizeof odd);
      } else {
        const Short words = even | odd << 8;
        std::memcpy(s.codes + row * key_block + i * 4, &words, sizeof words);
      }
    }
    const Ints words = ((Ints)total & 0xffff) + ((Ints)total >> 16);
    block.totals[row] = reduce<W>(words, [](auto a, auto b) { return a + b; });
    block.exponents[row] = exponent;
  }

  // A loop for each: where one holds both, the compiler no longer keeps its constants in registers.
  template <bool Biased, bool Pairs>
  [[gnu::noinline]] static void rows(const Softening& s) {
    const int32_t* sums[key_block / 16];
    for (int b = 0; b < key_block / 16; b++) sums[b] = s.sums.at(0, b);
    Block block;
    for (int r = 0; r < s.rows; r++) row<Biased, Pairs>(s, r, sums, block);
    join(s, block);
  }

  // Pairs: codes of 16 bits.
  template <bool Pairs = false>
  static inline void soften(const Softening& s) {
    s.bias ? rows<true, Pairs>(s) : rows<false, Pairs>(s);
  }

  static inline void gather(const Gathering& g) {
    const int64_t blocks = (g.channels + 15) / 16;
    for (int64_t b = 0; b < blocks; b++) {
      const int32_t* from = g.sums.at(0, b);
      const int count = static_cast<int>(g.channels - b * 16 < 16 ? g.channels - b * 16 : 16);
      for (int r = 0; r < g.rows; r++, from += g.sums.blocks * 16)
        for (int i = 0; i < count; i += W) {
          float* acc = g.acc + (r * blocks + b) * 16 + i;
          Ints sums = load_lanes<Ints>(from + i);
          if (g.corrections) sums -= load_lanes<Ints>(g.corrections + b * 16 + i);
          const Floats next = load_lanes<Floats>(acc) * g.keep[r] + __builtin_convertvector(sums, Floats) * g.weight[r];
          std::memcpy(acc, &next, sizeof next);
        }
    }
  }
};

}  // namespace
}  // namespace halfbyte
