// What an instruction set brings: one table of functions for each, made in a translation unit of its own with its own compiler
// flags.
#pragma once

#include "layout.h"

namespace halfbyte {

// Extremes of some input values. low <= 0 <= high; absmax is the largest magnitude's bit pattern, above infinity's where there is a
// NaN.
struct Range {
  float low = 0, high = 0;
  uint32_t absmax = 0;
};

// How the values of one image become bytes: u = level(x * reciprocal + zero) + offset.
struct Encoding {
  const InputFormat* format;
  const GridTable* grid;
  float reciprocal;  // NaN where the image holds a NaN or an infinity
  float zero;        // of unsigned grids
  int offset;        // 128 for signed grids, else 0
};

// How 32-bit sums of a row become outputs: (sum - zero * colsum[n]) * (scale * weight_scale[n]) + bias[n].
struct Epilogue {
  const int32_t* colsum;
  const float* weight_scale;
  const float* bias;  // or null
  int columns;        // valid ones of the tile
};

// K as the micro-kernels walk it, chunk by chunk: those from `first` up to `last`. Sums start at 0 where first is 0, else they go
// on.
struct Walk {
  const int64_t* offsets;  // of every chunk, in bytes from a row's first byte
  const int32_t* quads;    // of every chunk: 4-byte steps that are needed, 1..16
  int64_t first, last;
};

// The tile of sums of `count` rows becomes outputs; zeros and scales are those of the rows' images.
struct Rows {
  int count;
  const int32_t* zeros;
  const float* scales;
  char* out;           // of the first row's first column
  int64_t out_stride;  // bytes
  Dtype dtype;
};

// Packed nibbles of neighbouring blocks, from their first chunk.
struct Nibbles {
  const uint8_t* codes;
  const uint8_t* multipliers;  // null where there are none
  int64_t chunks;         // of a block: the next block's codes are chunks * panel_chunk / 2 further
  const GridTable* grid;
  bool multiples;  // multipliers are these less one, not shifts
};

// One task of a scale search: rows one after another. See weights.h for `work`.
struct ScaleSearch {
  FloatRows rows;
  WeightFormat format;
  const float* factors;
  int points;
  float* scales;
};

// One task of rounding weights; codes and multipliers are those of the first row.
struct WeightRounding {
  FloatRows rows;
  WeightFormat format;
  const float* scales;
  uint8_t* codes;
  uint8_t* multipliers;
};

constexpr int key_block = 64;  // keys that share an exponent
constexpr int most_rows = 32;  // of a tile

// Softmax in whole numbers. Scores come in steps of 2**(1 / 2048). With x steps, -10 * 2048 <= x <= 0, and u = x mod 2048,
//   2**(u / 2048) = power / 32640, a cubic by Horner's rule, whose products with 32 * u are divided by 2**16 and rounded down;
//   255 * 2**(x / 2048) = power / 2**(7 - floor(x / 2048)), rounded.
// The coefficients are those of the least error, 0.514 of a code of at most 255: half of one is due to rounding it.
constexpr int steps_of_two = 2048, least_steps = -10 * steps_of_two;
constexpr uint16_t cubic[] = {2549, 7384, 22704, 32640};

// Sums of a tile of rows with several panels, which `tile` made some blocks at a time.
struct TileSums {
  const int32_t* first;
  int blocks;      // of a tile
  int64_t stride;  // between tiles

  const int32_t* at(int row, int64_t block) const {
    return first + block / blocks * stride + (row * blocks + block % blocks) * 16;
  }
};

// Some rows of queries and one block of keys: what is summed so far, and what the block adds to it. Scores s, in steps, become the
// codes of 2**(s / 2048 - exponent), 255 at 0; exponents are whole numbers.
struct Softening {
  int rows;
  TileSums sums;               // over channels, for 4 blocks of 16 keys
  const int32_t* corrections;  // of each key, to be taken off
  const float* key_scales;
  const float* row_scales;
  const float* bias;           // of the first row and key, or null
  int64_t bias_stride;         // between rows
  int keys;                    // valid ones
  bool first;                  // nothing is summed so far
  uint8_t* codes;              // (rows, 64): byte 4 * i + b is that of key 16 * b + i; or for pairs of 16 bits (rows, 128): pair
                               // 16 * b + i holds those of keys 16 * b + i and 32 + 16 * b + i
  float *exponents, *totals;   // of the rows so far, and then with this block
  float *keep, *weight;        // (rows,): what the sums so far, and those of this block, are to be multiplied with
};

// acc = acc * keep + (sums - corrections) * weight, for rows of blocks of 16 channels, whose last ones may be left out.
struct Gathering {
  int rows;
  int64_t channels;
  TileSums sums;               // over keys
  const int32_t* corrections;  // of each channel, or null
  const float *keep, *weight;
  float* acc;  // (rows, channels rounded up to 16)
};

// 2**x from -1/2 to 1/2, (.. (c0 x + c1) x ..) x + 1; fitted to the least relative error, 3e-6.
constexpr float power_series[] = {0x1.3a02ccp-7f, 0x1.c9fc46p-5f, 0x1.ec0378p-3f, 0x1.62e12cp-1f, 1.0f};

// The normal distribution's tail, Q(x) = part * (.. ((c0 part + c1) part + c2) ..) * exp(-x**2 / 2), with part = 1 / (1 + 0.3125 x),
// from 0 to 14; fitted to the least relative error, 6e-6.
constexpr float tail_series[] = {-0x1.26ec68p-4f, 0x1.5a9f60p-3f, 0x1.a5779ep-6f, 0x1.0a2998p-3f, 0x1.f4cf02p-4f, 0x1.ff2a7ap-4f};

// Adjacent pixels of an image, channels innermost.
struct Pixels {
  Dtype dtype;
  int64_t count, channels;
  const char* x;
};

struct Kernels {
  int rows = 1, blocks = 1;  // of a tile: input rows, blocks of 16 output channels. Its sums are (rows, 16 * blocks) int32
  int thin_rows = 0;         // `thin` takes at most this many; 0: there is none
  int chunk_bytes = 0;       // of a panel, for each chunk
  int64_t panel_budget = 0;  // bytes of the panels of one task: about half of the L2 cache
  int64_t part_rows = 384;   // so many rows make decoding a panel again a few percent of the work
  // Widens a range by some values; where only absmax is asked for, the rest may stay as it is.
  void (*range)(const void* values, Dtype dtype, int64_t count, bool only_absmax, Range* range) = nullptr;
  void (*encode)(const void* values, Dtype dtype, int64_t count, const Encoding& encoding, uint8_t* out) = nullptr;
  // One tiled block of nibbles to a panel.
  void (*decode)(const Nibbles& from, uint8_t* panel) = nullptr;
  // Sums over the walk for `count` rows and `channels` of panels that lie panel_stride bytes apart; further channels of the last
  // panel may be left out.
  void (*tile)(const uint8_t* const* row, int count, const Walk& walk, const uint8_t* panel, int64_t panel_stride, int channels,
               int32_t* sums) = nullptr;
  // The same straight from nibbles, over all of K.
  void (*thin)(const uint8_t* const* row, int count, const Walk& walk, const Nibbles& from, int blocks, int32_t* sums) = nullptr;
  void (*finish)(const int32_t* sums, int sum_stride, const Epilogue& epilogue, const Rows& rows) = nullptr;
  void (*search)(const ScaleSearch& search, uint8_t* work) = nullptr;
  Energy (*round)(const WeightRounding& rounding, uint8_t* work) = nullptr;
  void (*soften)(const Softening& softening) = nullptr;  // between attention's products
  void (*gather)(const Gathering& gathering) = nullptr;
  void (*gelu)(Dtype dtype, const char* x, int64_t count, char* y) = nullptr;
  void (*geglu)(Dtype dtype, const char* values, const char* gates, int64_t count, char* y) = nullptr;
  void (*sum_pixels)(const Pixels& pixels, float* sums, float* squares) = nullptr;  // of each channel, pixel after pixel
  // x * gain + offset, and SiLU of that where it is asked for
  void (*scale_pixels)(const Pixels& pixels, const float* gain, const float* offset, bool silu, char* y) = nullptr;
  int tile_zero = 0;  // what `tile` and `thin` take off every input byte
  const Kernels* narrow = nullptr;  // others for tiled nibbles with levels of at most `narrow_level`
  int even_rows = 0;                // `tile` reads rows in runs of this many, evenly spaced; the driver copies others together
  int step = 0;                     // chunks of K that `tile` takes at once, so that the rows stay in L1; 0: all
  const Kernels* attention = nullptr;  // others for attention
  int code_bytes = 1;                  // of rows and panels: 1, or 2 where `tile` takes pairs of 16 bits; these for attention only
  void (*begin)() = nullptr;        // around the calls of one task
  void (*end)() = nullptr;
};

constexpr int narrow_level = 16;

}  // namespace halfbyte
