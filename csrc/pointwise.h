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
      found = to_bfloat16(values) >> 16;
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

  // 2 W values: of bfloat16 those of even places and those of odd ones, which costs least; else one half after the other.
  struct Two {
    Floats a, b;
  };

  template <Dtype D>
  static inline Two read_two(const char* from) {
    if constexpr (D != Dtype::bfloat16) return {read<D>(from), read<D>(from + W * size_of(D))};
    const Words pairs = load_lanes<Words>(from);
    return {(Floats)(pairs << 16), (Floats)(pairs & 0xffff0000)};
  }

  template <Dtype D>
  static inline void write_two(Two values, char* to) {
    if constexpr (D != Dtype::bfloat16) return write<D>(values.a, to), write<D>(values.b, to + W * size_of(D));
    const Words pairs = to_bfloat16(values.a) >> 16 | (to_bfloat16(values.b) & 0xffff0000);
    std::memcpy(to, &pairs, sizeof pairs);
  }

  // Rounded in the upper halves; the lower ones are not cleared. A NaN stays one: all come from values of bfloat16 or from operations,
  // whose lower halves are 0, or from gains and offsets, where the driver sees to it.
  static inline Words to_bfloat16(Floats values) {
    const Words bits = (Words)values;
    return bits + 0x7fff + (bits >> 16 & 1);
  }

  // Factors of 2 W channels in the order of `read_two`.
  template <Dtype D>
  static inline Two in_order(const float* from) {
    Two found;
    if constexpr (D != Dtype::bfloat16) return std::memcpy(&found, from, sizeof found), found;
    for (int i = 0; i < W; i++) found.a[i] = from[2 * i], found.b[i] = from[2 * i + 1];
    return found;
  }

  // Sums of 2 W channels from that order.
  template <Dtype D>
  static inline void out_of_order(const Two& sums, float* to) {
    if constexpr (D != Dtype::bfloat16) return static_cast<void>(std::memcpy(to, &sums, sizeof sums));
    for (int i = 0; i < W; i++) to[2 * i] = sums.a[i], to[2 * i + 1] = sums.b[i];
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
    x = smaller(larger(x, Floats{} - 125.0f), Floats{} + 128.0f);
    const Floats shifted = x + whole, fraction = x - (shifted - whole);
    Floats found = fraction * power_series[0] + power_series[1];
    for (int i = 2; i < 5; i++) found = found * fraction + power_series[i];
    return (Floats)((Ints)found + ((Ints)shifted << 23));
  }

  static inline Floats gelu(Floats x) {
    const Floats inner = x * x * 0x1.6e4e26p-5f + 1.0f;
    return x / (power(x * -0x1.26aec2p+1f * inner) + 1.0f);
  }

  static inline Floats silu(Floats x) { return x / (power(x * -0x1.715476p+0f) + 1.0f); }

  static inline Floats exact_gelu(Floats x) {
    const Floats size = (Floats)((Ints)x & 0x7fffffff), part = 1.0f / (size * 0.3125f + 1.0f);
    Floats tail = part * tail_series[0] + tail_series[1];
    for (int i = 2; i < 6; i++) tail = tail * part + tail_series[i];
    tail = tail * part * power(x * x * -0x1.715476p-1f);
    return larger(x, Floats{}) - size * tail;
  }

  template <Dtype D>
  static void geglus_of(const char* values, const char* gates, int64_t count, char* y) {
    constexpr int64_t size = size_of(D);
    int64_t i = 0;
    for (; i + 2 * W <= count; i += 2 * W) {
      const Two value = read_two<D>(values + i * size), gate = read_two<D>(gates + i * size);
      write_two<D>({value.a * exact_gelu(gate.a), value.b * exact_gelu(gate.b)}, y + i * size);
    }
    for (; i < count; i += W) {
      const int64_t some = count - i < W ? count - i : W;
      const Floats value = read_some<D>(values + i * size, some), gate = read_some<D>(gates + i * size, some);
      write_some<D>(value * exact_gelu(gate), some, y + i * size);
    }
  }

  static void geglu(Dtype dtype, const char* values, const char* gates, int64_t count, char* y) {
    switch (dtype) {
      case Dtype::float32: return geglus_of<Dtype::float32>(values, gates, count, y);
      case Dtype::bfloat16: return geglus_of<Dtype::bfloat16>(values, gates, count, y);
      case Dtype::float16: return geglus_of<Dtype::float16>(values, gates, count, y);
    }
  }

  template <Dtype D>
  static void gelus_of(const char* x, int64_t count, char* y) {
    constexpr int64_t size = size_of(D);
    int64_t i = 0;
    for (; i + 2 * W <= count; i += 2 * W) {
      const Two value = read_two<D>(x + i * size);
      write_two<D>({gelu(value.a), gelu(value.b)}, y + i * size);
    }
    for (; i < count; i += W) {
      const int64_t some = count - i < W ? count - i : W;
      write_some<D>(gelu(read_some<D>(x + i * size, some)), some, y + i * size);
    }
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
          Two sum[2] = {}, square[2] = {};
          for (int64_t p = 0; p < pixels; p++)
            for (int v = 0; v < 2; v++) {
              const auto [a, b] = read_two<D>(x + (p * channels + c + v * 2 * W) * size);
              sum[v].a += a, sum[v].b += b, square[v].a += a * a, square[v].b += b * b;
            }
          for (int v = 0; v < 2; v++)
            out_of_order<D>(sum[v], sums + c + v * 2 * W), out_of_order<D>(square[v], squares + c + v * 2 * W);
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

  template <Dtype D, bool Silu>
  static void scaled(const Pixels& of, const float* gain, const float* offset, char* y) {
    constexpr int64_t size = size_of(D);
    const auto [dtype, pixels, channels, x] = of;
    walk(
        channels,
        [&](int64_t c) {
          const Two gains[2] = {in_order<D>(gain + c), in_order<D>(gain + c + 2 * W)};
          const Two offsets[2] = {in_order<D>(offset + c), in_order<D>(offset + c + 2 * W)};
          for (int64_t p = 0; p < pixels; p++)
            for (int v = 0; v < 2; v++) {
              const int64_t at = (p * channels + c + v * 2 * W) * size;
              const Two value = read_two<D>(x + at);
              const Floats a = value.a * gains[v].a + offsets[v].a, b = value.b * gains[v].b + offsets[v].b;
              write_two<D>({Silu ? silu(a) : a, Silu ? silu(b) : b}, y + at);
            }
        },
        [&](int64_t c, int64_t count) {
          const Floats a = read_some<Dtype::float32>(reinterpret_cast<const char*>(gain + c), count);
          const Floats b = read_some<Dtype::float32>(reinterpret_cast<const char*>(offset + c), count);
          for (int64_t p = 0; p < pixels; p++) {
            const int64_t at = (p * channels + c) * size;
            const Floats scaled = read_some<D>(x + at, count) * a + b;
            write_some<D>(Silu ? silu(scaled) : scaled, count, y + at);
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

  static void scale_pixels(const Pixels& of, const float* gain, const float* offset, bool silu, char* y) {
    switch (of.dtype) {
      case Dtype::float32: return (silu ? scaled<Dtype::float32, true> : scaled<Dtype::float32, false>)(of, gain, offset, y);
      case Dtype::bfloat16: return (silu ? scaled<Dtype::bfloat16, true> : scaled<Dtype::bfloat16, false>)(of, gain, offset, y);
      case Dtype::float16: return (silu ? scaled<Dtype::float16, true> : scaled<Dtype::float16, false>)(of, gain, offset, y);
    }
  }
};

}  // namespace
}  // namespace halfbyte
