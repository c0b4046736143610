// How packed weights and quantized inputs lie in memory. Both are flat buffers that start with a plain struct.
//
// K is walked in segments: stretches of `length` bytes that are adjacent in a channels-last image. A linear layer has one; an
// undilated convolution has one for each kernel row (its taps times its channels); a dilated or grouped one has one for each tap.
// Segments are padded to chunks of 64 with weights of 0, so that reading on behind a segment does no harm.
//
// Tiled weights come in blocks of 16 output channels. A chunk of a block is 16 quads: 4 neighbours along K for each channel, which
// is what one 32-bit lane of a dot product takes. As int8 a quad is 64 bytes, byte 4 * channel + k % 4 (a "panel"). As nibbles two
// quads share 64 bytes: the earlier one in the low nibbles. Multipliers are held for every 16 along K: 32 bytes a chunk, byte
// 16 * (i / 2) + channel holding those of sixteenths i (low nibble) and i + 1 (high).
//
// Layers that tiles would blow up (few channels, many groups) or whose multipliers straddle sixteenths stay in disk order: "plain".
#pragma once

#include "grids.h"
#include "halfbyte.h"

namespace halfbyte {

constexpr int block_channels = 16;
constexpr int chunk = 64;                            // of K
constexpr int quads = chunk / 4;                     // of a chunk
constexpr int panel_chunk = chunk * block_channels;  // bytes
constexpr int multiplier_chunk = 2 * block_channels;      // bytes

static constexpr int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

struct PackedHeader {
  char magic[8];
  int64_t bytes;
  Layer layer;
  WeightFormat format;
  int32_t tiled;                // else plain
  int64_t segments, length;     // of K, unpadded
  int64_t chunks;               // of all segments together
  int64_t group_outputs;        // output channels of a group
  int64_t group_blocks;         // blocks of 16 output channels of a group
  int64_t codes, multipliers, sums;  // offsets of the parts in bytes
  // sums: int32 sum_k W[n, k] of all blocks' channels, padded ones 0

  int64_t blocks() const { return group_blocks * layer.groups; }
  int64_t segment_chunks() const { return chunks / segments; }
  int64_t panel_bytes() const { return chunks * panel_chunk; }  // of a block
};

PackedHeader plan_packed(const Layer& layer, const WeightFormat& format);
PackedHeader packed_header(const uint8_t* packed);  // throws for other bytes

// The weights of a block as an int8 panel, by whatever layout; slow. Also the oracle of the decoders.
void decode_block(const uint8_t* packed, const PackedHeader& header, int64_t block, int8_t* panel);

struct QuantizedHeader {
  char magic[8];
  int64_t bytes;
  int64_t images, height, width, channels;
  int32_t pad_top, pad_bottom, pad_left, pad_right;
  int64_t pixel_pitch, row_pitch, image_pitch;  // bytes, of the padded image
  int64_t scales, zeros, values;                // offsets: float (images,), int32 (images,), uint8
};

QuantizedHeader plan_quantized(const Input& input, const Layer& layer);
QuantizedHeader quantized_header(const uint8_t* quantized);

// Offset of the padded pixel (y, x), from which a kernel window starts.
static inline int64_t pixel_offset(const QuantizedHeader& h, int64_t image, int64_t y, int64_t x) {
  return h.values + image * h.image_pitch + y * h.row_pitch + x * h.pixel_pitch;
}

// Offset of segment s behind the start of its window. Grouped layers add their channels.
static inline int64_t segment_offset(const PackedHeader& p, const QuantizedHeader& q, int64_t segment) {
  const int64_t taps = p.segments / p.layer.kernel_h;  // segments of a kernel row: 1, or one each tap
  return segment / taps * p.layer.dilation_h * q.row_pitch + segment % taps * p.layer.dilation_w * q.pixel_pitch;
}

}  // namespace halfbyte
