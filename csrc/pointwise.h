// What stands between layers, on vectors of any width: what runtime/pointwise.py does, in the same float32 operations.
//
// Everything here is in an unnamed namespace: each instruction set compiles its own. Included by one file for each.
#pragma once

#include "floats.h"
#include "kernels.h"
#include "lanes.h"

namespace halfbyte {
namespace {

template <int W>
struct Pointwise {
  using Floats = typename Lanes<W>::Floats;
  using Ints = typename Lanes<W>::Ints;
  using Words = typename Lanes<W>::Words;
  using Halves = typename Lanes<W>::Halves;

  template <Dtype D>
  static inline Floats read(const char* from) {
    if constexpr (D == Dtype::float32) return load_lanes<Floats>(from);
    const Words bits = __builtin_convertvector(load_lanes<Halves>(from), Words);
    if constexpr (D == Dtype::bfloat16) return (Floats)(bits << 16);
    const Words sign = (bits & 0x8000) << 16;
    const Ints rest = (Ints)(bits & 0x7fff);
    const Ints wide = rest << 13, small = (Ints)(__builtin_convertvector(rest, Floats) * 0x1p-24f);
    const Ints finite = rest < 0x400 ? small : wide + (112 << 23);
    return (Floats)((Words)(rest < 0x7c00 ? finite : wide | 0x7f800000) | sign);
  }

  template <Dtype D>
  static inline void write(Floats values, char* to) {
    if constexpr (D == Dtype::float32) {
      std::memcpy(to, &values, sizeof values);
      return;
    }
    const Words bits = (Words)values;
    const Ints rest = (Ints)(bits & 0x7fffffff);
    Words found;
    if constexpr (D == Dtype::bfloat16) {
      found = rest > 0x7f800000 ? bits >> 16 | 0x40 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    } else {  // floats.h says why
      const Ints small = (Ints)((Floats)rest + 0.5f) - 0x3f000000;
      const Ints normal = (rest - (112 << 23) + 0xfff + (rest >> 13 & 1)) >> 13;
      const Ints finite = rest < 0x38800000 ? small : normal;
      const Ints bounded = rest < 0x477ff000 ? finite : Ints{} + 0x7c00;
      found = (Words)(rest > 0x7f800000 ? Ints{} + 0x7e00 : bounded) | (bits >> 16 & 0x8000);
    }
    const Halves halves = __builtin_convertvector(found, Halves);
    std::memcpy(to, &halves, sizeof halves);
  }

  // Fewer than W.
  template <Dtype D>
  static inline Floats read_some(const char* from, int64_t count) {
    char values[W * 4] = {};
    std::memcpy(values, from, static_cast<size_t>(count * size_of(D)));
    return read<D>(values);
  }

  template <Dtype D>
  static inline void write_some(Floats values, int64_t count, char* to) {
    char kept[W * 4];
    write<D>(values, kept);
    std::memcpy(to, kept, static_cast<size_t>(count * size_of(D)));
  }

  // 2 to the power of x; infinity from 128 on.
  static inline Floats power(Floats x) {
    constexpr float whole = 0x1.8p23f;  // adding it leaves no digits below 1
    x = x > -125.0f ? x : Floats{} - 125.0f;
    x = x < 128.0f ? x : Floats{} + 128.0f;
    const Floats shifted = x + whole, fraction = x - (shifted - whole);
    Floats found = fraction * 0x1.5d87fep-10f + 0x1.3b2ab6p-7f;  // ln(2)**n / n!
    found = found * fraction + 0x1.c6b08ep-5f;
    found = found * fraction + 0x1.ebfbep-3f;
    found = found * fraction + 0x1.62e43p-1f;
    found = found * fraction + 1.0f;
    return (Floats)((Ints)found + ((Ints)shifted << 23));
  }

  static inline Floats gelu(Floats x) {
    const Floats inner = x * x * 0x1.6e4e26p-5f + 1.0f;
    return x / (power(x * -0x1.26aec2p+1f * inner) + 1.0f);
  }

  template <Dtype D>
  static void gelus_of(const char* x, int64_t count, char* y) {
    constexpr int64_t size = size_of(D);
    int64_t i = 0;
    for (; i + W <= count; i += W) write<D>(gelu(read<D>(x + i * size)), y + i * size);
    if (i < count) write_some<D>(gelu(read_some<D>(x + i * size, count - i)), count - i, y + i * size);
  }

  static void gelu(Dtype dtype, const char* x, int64_t count, char* y) {
    switch (dtype) {
      case Dtype::float32: return gelus_of<Dtype::float32>(x, count, y);
      case Dtype::bfloat16: return gelus_of<Dtype::bfloat16>(x, count, y);
      case Dtype::float16: return gelus_of<Dtype::float16>(x, count, y);
    }
  }

  // Calls run(first channel, how many) for groups of 4 vectors, of one, and for what is left.
  template <typename Many, typename One>
  static inline void walk(int64_t channels, Many many, One one) {
    int64_t c = 0;
    for (; c + 4 * W <= channels; c += 4 * W) many(c);
    for (; c < channels; c += W) one(c, channels - c < W ? channels - c : W);
  }

  template <Dtype D>
  static void sums_of(const Pixels& of, float* sums, float* squares) {
    constexpr int64_t size = size_of(D);
    const auto [dtype, pixels, channels, x] = of;
    walk(
        channels,
        [&](int64_t c) {
          Floats sum[4] = {}, square[4] = {};
          for (int64_t p = 0; p < pixels; p++)
            for (int v = 0; v < 4; v++) {
              const Floats value = read<D>(x + (p * channels + c + v * W) * size);
              sum[v] += value, square[v] += value * value;
            }
          std::memcpy(sums + c, sum, sizeof sum), std::memcpy(squares + c, square, sizeof square);
        },
        [&](int64_t c, int64_t count) {
          Floats sum{}, square{};
          for (int64_t p = 0; p < pixels; p++) {
            const Floats value = read_some<D>(x + (p * channels + c) * size, count);
            sum += value, square += value * value;
          }
          write_some<Dtype::float32>(sum, count, reinterpret_cast<char*>(sums + c));
          write_some<Dtype::float32>(square, count, reinterpret_cast<char*>(squares + c));
        });
  }

  template <Dtype D>
  static void scaled(const Pixels& of, const float* gain, const float* offset, char* y) {
    constexpr int64_t size = size_of(D);
    const auto [dtype, pixels, channels, x] = of;
    walk(
        channels,
        [&](int64_t c) {
          Floats a[4], b[4];
          std::memcpy(a, gain + c, sizeof a), std::memcpy(b, offset + c, sizeof b);
          for (int64_t p = 0; p < pixels; p++)
            for (int v = 0; v < 4; v++) {
              const int64_t at = (p * channels + c + v * W) * size;
              write<D>(read<D>(x + at) * a[v] + b[v], y + at);
            }
        },
        [&](int64_t c, int64_t count) {
          const Floats a = read_some<Dtype::float32>(reinterpret_cast<const char*>(gain + c), count);
          const Floats b = read_some<Dtype::float32>(reinterpret_cast<const char*>(offset + c), count);
          for (int64_t p = 0; p < pixels; p++) {
            const int64_t at = (p * channels + c) * size;
            write_some<D>(read_some<D>(x + at, count) * a + b, count, y + at);
          }
        });
  }

  static void sum_pixels(const Pixels& of, float* sums, float* squares) {
    switch (of.dtype) {
      case Dtype::float32: return sums_of<Dtype::float32>(of, sums, squares);
      case Dtype::bfloat16: return sums_of<Dtype::bfloat16>(of, sums, squares);
      case Dtype::float16: return sums_of<Dtype::float16>(of, sums, squares);
    }
  }

  static void scale_pixels(const Pixels& of, const float* gain, const float* offset, char* y) {
    switch (of.dtype) {
      case Dtype::float32: return scaled<Dtype::float32>(of, gain, offset, y);
      case Dtype::bfloat16: return scaled<Dtype::bfloat16>(of, gain, offset, y);
      case Dtype::float16: return scaled<Dtype::float16>(of, gain, offset, y);
    }
  }
};

}  // namespace
}  // namespace halfbyte
