// What the core's tests share: checks that count, random layers and inputs, and a whole call on one instruction set.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "floats.h"
#include "grids.h"
#include "halfbyte.h"
#include "layout.h"

namespace halfbyte {

extern int failures, checks;  // of the whole program

inline void check(bool good, const std::string& what) {
  checks++;
  if (good || failures++ > 20) return;
  std::fprintf(stderr, "failed: %s\n", what.c_str());
}

template <typename Call>
void check_throws(Call call, const std::string& what) {
  try {
    call();
  } catch (const std::invalid_argument&) {
    return check(true, what);
  }
  check(false, what + " should have thrown");
}

inline std::mt19937& generator() {
  static thread_local std::mt19937 random(7);
  return random;
}

inline int64_t uniform(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(generator()); }

inline std::vector<Isa> fast_isas() {
  std::vector<Isa> found;
  for (int i = 1; i < isa_count; i++)
    if (isa_available(static_cast<Isa>(i))) found.push_back(static_cast<Isa>(i));
  return found;
}

inline const char* name_of(Grid grid) { return table_of(grid).name; }

inline const std::vector<WeightFormat>& weight_formats() {
  static const std::vector<WeightFormat> formats = {
      {Grid::int4, 0, 16}, {Grid::lzs4, 0, 16}, {Grid::e2m1, 0, 16}, {Grid::e1m2, 0, 16}, {Grid::e3m0, 0, 16}, {Grid::int8, 0, 16},
      {Grid::lzs4, 4, 16}, {Grid::lzs4, 4, 32}, {Grid::lzs4, 4, 48}, {Grid::lzs4, 3, 7},  {Grid::e2m1, 3, 16}, {Grid::e1m2, 4, 64},
      {Grid::int4, 0, 16, 16}, {Grid::lzs4, 0, 16, 16}, {Grid::e2m1, 0, 16, 10}, {Grid::e2m1, 0, 32, 9}, {Grid::e1m2, 0, 7, 5},
  };
  return formats;
}

inline std::string describe(const WeightFormat& f) {
  return std::string(name_of(f.grid)) + "<<" + std::to_string(f.max_shift) + "*" + std::to_string(f.max_multiple) + "/" +
         std::to_string(f.subgroup);
}

// With a fixed scale and zero point where `scale` is above 0.
inline InputFormat multiples(Grid grid, int most, int subgroup, int top, float scale = 0, int zero = 0) {
  return {grid, 0, subgroup, top, false, scale > 0, scale > 0 ? scale : 1, zero, most};
}

inline std::vector<InputFormat> with_multiples(std::vector<InputFormat> formats) {
  for (const InputFormat& format : {multiples(Grid::lzs4, 16, 16, 112),
                                    multiples(Grid::lzs4, 16, 32, 127),
                                    multiples(Grid::lzs4, 2, 8, 127),
                                    multiples(Grid::e1m2, 15, 64, 105),
                                    multiples(Grid::int4, 16, 16, 112),
                                    multiples(Grid::int4, 9, 8, 127),
                                    multiples(Grid::int4, 16, 32, 127, 0.03f),
                                    multiples(Grid::e2m1, 10, 16, 120),
                                    multiples(Grid::e2m1, 7, 8, 127),
                                    multiples(Grid::e2m1, 10, 5, 120),
                                    multiples(Grid::e2m1, 2, 32, 24),
                                    multiples(Grid::e2m1, 10, 16, 120, 0.02f),
                                    multiples(Grid::ue1m3, 16, 16, 240),
                                    multiples(Grid::ue1m3, 16, 8, 255),
                                    multiples(Grid::ue1m3, 2, 32, 255),
                                    multiples(Grid::ue1m3, 10, 32, 255),
                                    multiples(Grid::ue1m3, 16, 16, 240, 0.02f, 31),
                                    multiples(Grid::ue1m3, 3, 64, 45),
                                    multiples(Grid::ue2m2, 9, 16, 252),
                                    multiples(Grid::ue2m2, 9, 8, 255),
                                    multiples(Grid::ue2m2, 6, 32, 255),
                                    multiples(Grid::ue2m2, 2, 64, 56, 0.1f, 9)})
    formats.push_back(format);
  return formats;
}

inline const std::vector<InputFormat>& input_formats() {
  static const std::vector<InputFormat> formats = with_multiples({
      {Grid::int8, 0, 16, 127, false, false, 1, 0},        {Grid::lzs4, 4, 16, 112, false, false, 1, 0},
      {Grid::lzs4, 4, 32, 127, true, false, 1, 0},         {Grid::lzs4, 4, 8, 105, false, false, 1, 0},
      {Grid::lzs4, 2, 64, 28, false, false, 1, 0},         {Grid::lzs4, 4, 5, 112, false, false, 1, 0},
      {Grid::lzs4, 1, 16, 127, false, false, 1, 0},        {Grid::e2m1, 3, 16, 96, false, false, 1, 0},
      {Grid::e2m1, 3, 32, 127, false, false, 1, 0},        {Grid::e1m2, 4, 16, 112, false, false, 1, 0},
      {Grid::int4, 0, 16, 7, false, false, 1, 0},          {Grid::e2m1, 0, 16, 12, false, false, 1, 0},
      {Grid::e3m0, 0, 16, 64, false, false, 1, 0},         {Grid::ue2m2, 0, 16, 28, false, false, 1, 0},
      {Grid::ue1m3, 0, 16, 15, false, false, 1, 0},        {Grid::ue3m1, 0, 16, 192, false, false, 1, 0},
      {Grid::uint8, 0, 16, 255, false, false, 1, 0},       {Grid::ue1m3, 4, 16, 240, false, false, 1, 0},
      {Grid::ue1m3, 4, 16, 255, true, false, 1, 0},        {Grid::ue2m2, 3, 16, 224, false, false, 1, 0},
      {Grid::ue1m3, 4, 32, 255, false, false, 1, 0},       {Grid::e2m1, 0, 16, 12, false, true, 0.37f, 0},
      {Grid::ue2m2, 0, 16, 28, false, true, 0.2f, 9},      {Grid::lzs4, 4, 16, 112, false, true, 0.02f, 0},
      {Grid::uint8, 0, 16, 255, false, true, 1e-39f, 200}, {Grid::ue1m3, 4, 16, 240, false, true, 0.02f, 31},
  });
  return formats;
}

inline std::string describe(const InputFormat& f) {
  return std::string(name_of(f.grid)) + "<<" + std::to_string(f.max_shift) + "*" + std::to_string(f.max_multiple) + "/" +
         std::to_string(f.subgroup) + " top " + std::to_string(f.top) + (f.truncate ? " cut" : "") + (f.fixed ? " fixed" : "");
}

struct Weights {
  std::vector<uint8_t> codes, multipliers, packed;
  std::vector<float> scale, bias;
};

inline Weights random_weights(const Layer& layer, const WeightFormat& format) {
  const int64_t k = contraction(layer), groups = (k + format.subgroup - 1) / format.subgroup;
  const bool bytes = table_of(format.grid).bits == 8;
  Weights w;
  w.codes.resize(static_cast<size_t>(layer.outputs * (bytes ? k : (k + 1) / 2)));
  for (uint8_t& code : w.codes) code = static_cast<uint8_t>(uniform(0, 255));
  if (!bytes && k % 2)
    for (int64_t o = 0; o < layer.outputs; o++) w.codes[static_cast<size_t>((o + 1) * ((k + 1) / 2) - 1)] &= 15;
  if (has_multipliers(format)) {
    w.multipliers.resize(static_cast<size_t>(layer.outputs * ((groups + 1) / 2)));
    for (int64_t o = 0; o < layer.outputs; o++)
      for (int64_t g = 0; g < groups; g++)
        w.multipliers[static_cast<size_t>(o * ((groups + 1) / 2) + g / 2)] |=
            static_cast<uint8_t>(uniform(0, largest_nibble(format)) << (g % 2 * 4));
  }
  w.packed.resize(packed_bytes(layer, format));
  pack_weights(layer, format, w.codes.data(), w.multipliers.data(), w.packed.data(), static_cast<int>(uniform(1, 3)));
  for (int64_t o = 0; o < layer.outputs; o++) {
    w.scale.push_back(std::uniform_real_distribution<float>(0.001f, 0.1f)(generator()));
    w.bias.push_back(std::normal_distribution<float>()(generator()));
  }
  return w;
}

// Images of random size of values; every few images one is special: zeros, a NaN, an infinity, subnormal or huge values.
struct Images {
  std::vector<uint8_t> bytes;
  Input input;

  // `skew` bytes before the first value (whole values), `gap` values between pixels.
  Images(Dtype dtype, int64_t images, int64_t height, int64_t width, int64_t channels, int64_t skew = 0, int64_t gap = 0,
         bool special = true) {
    const int64_t pitch = channels + gap, count = images * height * width * pitch;
    bytes.resize(static_cast<size_t>((count + skew) * size_of(dtype) + 1));
    uint8_t* data = bytes.data() + skew * size_of(dtype);
    for (int64_t image = 0; image < images; image++) {
      const int kind = special ? static_cast<int>(uniform(0, 15)) : 15;
      const float spread = kind == 0   ? 0.0f
                           : kind == 1 ? 1e-40f
                           : kind == 2 ? 2e4f
                                       : std::exp(std::normal_distribution<float>()(generator()));
      std::normal_distribution<float> draw(kind % 3 ? 0.0f : spread, spread > 0 ? spread : 1.0f);
      const int64_t size = height * width * pitch;
      for (int64_t i = 0; i < size; i++) store(data, dtype, image * size + i, kind == 0 ? 0.0f : draw(generator()));
      if (size && (kind == 3 || kind == 4)) store(data, dtype, image * size + uniform(0, size - 1), kind == 3 ? NAN : -INFINITY);
    }
    input = {data, dtype, images, height, width, channels, height * width * pitch, width * pitch, pitch};
  }
};

inline std::vector<uint8_t> run_layer(const Run& run, const Layer& layer, const Weights& w, const Input& input,
                                      const InputFormat& format, Dtype dtype, bool bias, int64_t gap = 0) {
  const int64_t rows = input.images * output_height(layer, input.height) * output_width(layer, input.width),
                pitch = layer.outputs + gap;
  std::vector<uint8_t> out(static_cast<size_t>(rows * pitch * size_of(dtype)), 0xee);
  forward(run, input, format, w.packed.data(), w.scale.data(), bias ? w.bias.data() : nullptr, {out.data(), dtype, pitch});
  return out;
}

// Equal to the last bit, all NaNs being one.
inline bool same(const std::vector<uint8_t>& a, const std::vector<uint8_t>& b, Dtype dtype) {
  if (a.size() != b.size()) return false;
  for (int64_t i = 0; i < static_cast<int64_t>(a.size()) / size_of(dtype); i++) {
    const float x = load(a.data(), dtype, i), y = load(b.data(), dtype, i);
    if (bits_of_float(x) != bits_of_float(y) && !(std::isnan(x) && std::isnan(y))) return false;
  }
  return true;
}

}  // namespace halfbyte
