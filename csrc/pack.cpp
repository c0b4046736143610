// Weights from the order of the checkpoint to the order of the kernels, and back.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <stdexcept>

#include "layout.h"

namespace halfbyte {
namespace {

constexpr char packed_magic[8] = {'h', 'b', 'p', 'a', 'c', 'k', '0', '1'};

// Where a code lies in the tiles: byte offset from the first code.
int64_t code_byte(const PackedHeader& h, int64_t block, int64_t at_chunk, int64_t k, int64_t channel, bool bytes) {
  const int64_t quad = k / 4, lane = channel * 4 + k % 4;
  if (bytes) return (block * h.chunks + at_chunk) * panel_chunk + quad * 64 + lane;
  return (block * h.chunks + at_chunk) * (panel_chunk / 2) + quad / 2 * 64 + lane;
}

int64_t multiplier_byte(const PackedHeader& h, int64_t block, int64_t at_chunk, int64_t k, int64_t channel) {
  return (block * h.chunks + at_chunk) * multiplier_chunk + k / 32 * block_channels + channel;
}

void set_nibble(uint8_t& byte, bool high, int value) {
  byte = static_cast<uint8_t>(high ? (byte & 0x0f) | value << 4 : (byte & 0xf0) | value);
}

int64_t subgroups(const PackedHeader& h) { return (contraction(h.layer) + h.format.subgroup - 1) / h.format.subgroup; }

int64_t code_row(const PackedHeader& h) {
  const int64_t k = contraction(h.layer);
  return table_of(h.format.grid).bits == 8 ? k : (k + 1) / 2;
}

int64_t multiplier_row(const PackedHeader& h) { return has_multipliers(h.format) ? (subgroups(h) + 1) / 2 : 0; }

int disk_code(const PackedHeader& h, const uint8_t* codes, int64_t output, int64_t k) {
  const uint8_t* row = codes + output * code_row(h);
  return table_of(h.format.grid).bits == 8 ? row[k] : nibble(row, k);
}

int disk_nibble(const PackedHeader& h, const uint8_t* multipliers, int64_t output, int64_t k) {
  return has_multipliers(h.format) ? nibble(multipliers + output * multiplier_row(h), k / h.format.subgroup) : 0;
}

int weight_of(const PackedHeader& h, int code, int of_subgroup) {
  return decode_code(code, table_of(h.format.grid)) * multiplier_of(h.format, of_subgroup);
}

// The up to 64 weights of one output channel that share a chunk.
struct Stretch {
  int64_t output, block, channel, at_chunk;
  int64_t k;  // of the first one
  int count;
};

template <typename Visit>
void each_stretch(const PackedHeader& h, int64_t output, Visit visit) {
  const int64_t inside = output % h.group_outputs, block = output / h.group_outputs * h.group_blocks + inside / block_channels;
  int64_t at_chunk = 0;
  for (int64_t segment = 0; segment < h.segments; segment++)
    for (int64_t start = 0; start < h.length; start += chunk, at_chunk++) {
      const int count = static_cast<int>(std::min<int64_t>(chunk, h.length - start));
      visit(Stretch{output, block, inside % block_channels, at_chunk, segment * h.length + start, count});
    }
}

// 8 nibbles in the order of the disk to the order of a tile, (0, 4) (1, 5) (2, 6) (3, 7), and back.
uint32_t spread(uint32_t four) {
  four = (four | four << 8) & 0x00ff00ff;
  return (four | four << 4) & 0x0f0f0f0f;
}
uint32_t collect(uint32_t four) {
  four = (four | four >> 4) & 0x00ff00ff;
  return (four | four >> 8) & 0xffff;
}
uint32_t to_tile(uint32_t disk) { return spread(disk & 0xffff) | spread(disk >> 16) << 4; }
uint32_t to_disk(uint32_t tile) { return collect(tile & 0x0f0f0f0f) | collect(tile >> 4 & 0x0f0f0f0f) << 16; }

void check(const Layer& layer, const WeightFormat& format) {
  const bool positive = layer.inputs > 0 && layer.outputs >= 0 && layer.groups > 0 && layer.kernel_h > 0 && layer.kernel_w > 0 &&
                        layer.stride_h > 0 && layer.stride_w > 0 && layer.dilation_h > 0 && layer.dilation_w > 0;
  if (!positive) throw std::invalid_argument("a layer needs sizes of at least 1");
  if (layer.inputs % layer.groups || layer.outputs % layer.groups)
    throw std::invalid_argument("the channels of a grouped layer must be a multiple of its groups");
  if (std::min({layer.pad_top, layer.pad_bottom, layer.pad_left, layer.pad_right}) < 0)
    throw std::invalid_argument("padding must not be negative");
  if (contraction(layer) > longest_k)
    throw std::invalid_argument("the engine sums at most " + std::to_string(longest_k) +
                                " products, this layer has K = " + std::to_string(contraction(layer)));
  check_weights(format);
}

}  // namespace

int64_t contraction(const Layer& layer) { return int64_t{layer.kernel_h} * layer.kernel_w * (layer.inputs / layer.groups); }

PackedHeader plan_packed(const Layer& layer, const WeightFormat& format) {
  check(layer, format);
  PackedHeader h{};
  std::memcpy(h.magic, packed_magic, sizeof h.magic);
  h.layer = layer, h.format = format;
  const bool adjacent = layer.kernel_w == 1 || (layer.dilation_w == 1 && layer.groups == 1);
  h.segments = adjacent ? layer.kernel_h : layer.kernel_h * layer.kernel_w;
  h.length = contraction(layer) / h.segments;
  h.chunks = h.segments * ((h.length + chunk - 1) / chunk);
  h.group_outputs = layer.outputs / layer.groups;
  h.group_blocks = (h.group_outputs + block_channels - 1) / block_channels;
  const bool aligned = !has_multipliers(format) || (format.subgroup % 16 == 0 && (h.segments == 1 || h.length % 16 == 0));
  const int64_t padded = h.blocks() * block_channels * h.chunks * chunk, real = layer.outputs * contraction(layer);
  h.tiled = aligned && padded <= real + std::max(real / 2, int64_t{64 * 1024});
  const bool bytes = table_of(format.grid).bits == 8;
  const int64_t code_bytes = h.tiled ? (bytes ? padded : padded / 2) : layer.outputs * code_row(h);
  const int64_t tiled_multipliers = has_multipliers(format) ? h.blocks() * h.chunks * multiplier_chunk : 0;
  const int64_t multiplier_bytes = h.tiled ? tiled_multipliers : layer.outputs * multiplier_row(h);
  h.codes = round_up(sizeof h, 64);
  h.multipliers = h.codes + round_up(code_bytes, 64);
  h.sums = h.multipliers + round_up(multiplier_bytes, 64);
  h.bytes = h.sums + round_up(h.blocks() * block_channels * 4, 64);
  return h;
}

PackedHeader packed_header(const uint8_t* packed) {
  PackedHeader h;
  std::memcpy(&h, packed, sizeof h);
  if (std::memcmp(h.magic, packed_magic, sizeof h.magic) != 0) throw std::invalid_argument("these bytes are no packed weights");
  return h;
}

size_t packed_bytes(const Layer& layer, const WeightFormat& format) {
  return static_cast<size_t>(plan_packed(layer, format).bytes);
}

void describe_packed(const uint8_t* packed, size_t bytes, Layer* layer, WeightFormat* format) {
  if (bytes < sizeof(PackedHeader)) throw std::invalid_argument("these bytes are no packed weights");
  const PackedHeader h = packed_header(packed);
  if (static_cast<size_t>(h.bytes) != bytes) throw std::invalid_argument("packed weights were cut short");
  *layer = h.layer, *format = h.format;
}

namespace {

// The codes of a stretch in disk order, zeros behind them; 32 or 64 bytes.
void read_codes(const PackedHeader& h, const uint8_t* codes, const Stretch& s, uint8_t* to) {
  std::memset(to, 0, chunk);
  const uint8_t* row = codes + s.output * code_row(h);
  if (table_of(h.format.grid).bits == 8) {
    std::memcpy(to, row + s.k, static_cast<size_t>(s.count));
  } else if (s.k % 2 == 0 && s.count % 2 == 0) {
    std::memcpy(to, row + s.k / 2, static_cast<size_t>(s.count / 2));
  } else {
    for (int i = 0; i < s.count; i++) set_nibble(to[i / 2], i % 2, nibble(row, s.k + i));
  }
}

void write_codes(const PackedHeader& h, const uint8_t* from, const Stretch& s, uint8_t* codes) {
  uint8_t* row = codes + s.output * code_row(h);
  if (table_of(h.format.grid).bits == 8) {
    std::memcpy(row + s.k, from, static_cast<size_t>(s.count));
  } else if (s.k % 2 == 0 && s.count % 2 == 0) {
    std::memcpy(row + s.k / 2, from, static_cast<size_t>(s.count / 2));
  } else {
    for (int i = 0; i < s.count; i++) set_nibble(row[(s.k + i) / 2], (s.k + i) % 2, nibble(from, i));
  }
}

void pack_tiles(const PackedHeader& h, const uint8_t* codes, const uint8_t* multipliers, int64_t output, uint8_t* packed) {
  const bool bytes = table_of(h.format.grid).bits == 8;
  each_stretch(h, output, [&](const Stretch& s) {
    uint8_t row[chunk];
    read_codes(h, codes, s, row);
    uint8_t* to = packed + h.codes + code_byte(h, s.block, s.at_chunk, 0, s.channel, bytes);
    for (int word_at = 0; word_at < (bytes ? 64 : 32); word_at += 4, to += 64) {
      uint32_t word;
      std::memcpy(&word, row + word_at, 4);
      if (!bytes) word = to_tile(word);
      std::memcpy(to, &word, 4);
    }
    for (int i = 0; has_multipliers(h.format) && i < s.count; i += 16)
      set_nibble(packed[h.multipliers + multiplier_byte(h, s.block, s.at_chunk, i, s.channel)], i / 16 % 2,
                 disk_nibble(h, multipliers, s.output, s.k + i));
  });
}

// Sum of the two levels in a byte of nibbles, or the one level of a byte.
struct ByteSums {
  int32_t of[256];

  explicit ByteSums(const GridTable& grid) {
    for (int byte = 0; byte < 256; byte++)
      of[byte] = grid.bits == 8 ? decode_code(byte, grid) : decode_code(byte & 15, grid) + decode_code(byte >> 4, grid);
  }
};

// sum_k W[n, k] of one output channel; raises `largest` to its largest nibble of a multiplier.
int32_t sum_of_row(const PackedHeader& h, const ByteSums& sums, const uint8_t* codes, const uint8_t* multipliers, int64_t output,
                   int* largest) {
  const int halving = table_of(h.format.grid).bits == 8 ? 0 : 1, per_byte = 1 << halving;
  const uint8_t* row = codes + output * code_row(h);
  const int64_t k = contraction(h.layer), step = has_multipliers(h.format) ? h.format.subgroup : k;
  int32_t sum = 0;
  for (int64_t from = 0; from < k; from += step) {
    const int of_subgroup = disk_nibble(h, multipliers, output, from);
    *largest = std::max(*largest, of_subgroup);
    int32_t part = 0;
    int64_t i = from;
    const int64_t end = std::min(from + step, k);
    if (i % per_byte) part += decode_code(disk_code(h, codes, output, i++), table_of(h.format.grid));
    for (; i + per_byte <= end; i += per_byte) part += sums.of[row[i >> halving]];
    if (i < end) part += decode_code(disk_code(h, codes, output, i), table_of(h.format.grid));
    sum += part * multiplier_of(h.format, std::min(of_subgroup, largest_nibble(h.format)));
  }
  return sum;
}

constexpr int64_t pack_step = 16;  // output channels of a task

struct Packing {
  const PackedHeader& h;
  const uint8_t *codes, *multipliers;
  uint8_t* packed;
  const ByteSums sums;
  std::atomic<int> largest_nibble{0};

  static void run(void* raw, int task) {
    auto& p = *static_cast<Packing*>(raw);
    const PackedHeader& h = p.h;
    int largest = 0;
    for (int64_t output = task * pack_step; output < std::min((task + 1) * pack_step, h.layer.outputs); output++) {
      const int32_t sum = sum_of_row(h, p.sums, p.codes, p.multipliers, output, &largest);
      const int64_t padded = output / h.group_outputs * h.group_blocks * block_channels + output % h.group_outputs;
      std::memcpy(p.packed + h.sums + padded * 4, &sum, 4);
      if (h.tiled) pack_tiles(h, p.codes, p.multipliers, output, p.packed);
    }
    int seen = p.largest_nibble;
    while (seen < largest && !p.largest_nibble.compare_exchange_weak(seen, largest)) {
    }
  }
};

}  // namespace

void pack_weights(const Layer& layer, const WeightFormat& format, const uint8_t* codes, const uint8_t* multipliers, uint8_t* packed,
                  int threads) {
  const PackedHeader h = plan_packed(layer, format);
  std::memset(packed, 0, static_cast<size_t>(h.bytes));
  std::memcpy(packed, &h, sizeof h);
  Packing packing{h, codes, multipliers, packed, ByteSums(table_of(format.grid))};
  parallel_for(static_cast<int>((layer.outputs + pack_step - 1) / pack_step), threads, Packing::run, &packing);
  if (packing.largest_nibble > largest_nibble(format)) {
    const std::string kind = format.max_multiple ? "multiple" : "shift";
    const int least = format.max_multiple ? 1 : 0;  // what a nibble of 0 stands for
    throw std::invalid_argument("a " + kind + " of " + std::to_string(packing.largest_nibble + least) +
                                " is beyond the layer's largest, " + std::to_string(largest_nibble(format) + least));
  }
  if (h.tiled) return;
  std::memcpy(packed + h.codes, codes, static_cast<size_t>(layer.outputs * code_row(h)));
  const size_t multiplier_bytes = static_cast<size_t>(layer.outputs * multiplier_row(h));
  if (multiplier_bytes) std::memcpy(packed + h.multipliers, multipliers, multiplier_bytes);
}

void unpack_weights(const uint8_t* packed, uint8_t* codes, uint8_t* multipliers) {
  const PackedHeader h = packed_header(packed);
  const bool bytes = table_of(h.format.grid).bits == 8;
  const size_t code_bytes = static_cast<size_t>(h.layer.outputs * code_row(h));
  const size_t multiplier_bytes = static_cast<size_t>(h.layer.outputs * multiplier_row(h));
  if (!h.tiled) {
    std::memcpy(codes, packed + h.codes, code_bytes);
    if (multiplier_bytes) std::memcpy(multipliers, packed + h.multipliers, multiplier_bytes);
    return;
  }
  std::memset(codes, 0, code_bytes);
  if (multiplier_bytes) std::memset(multipliers, 0, multiplier_bytes);
  const auto unpack = [&](const Stretch& s) {
    uint8_t row[chunk];
    for (int quad = 0; quad < quads; quad += bytes ? 1 : 2) {
      uint32_t word;
      std::memcpy(&word, packed + h.codes + code_byte(h, s.block, s.at_chunk, quad * 4, s.channel, bytes), 4);
      if (!bytes) word = to_disk(word);
      std::memcpy(row + (bytes ? quad * 4 : quad * 2), &word, 4);
    }
    write_codes(h, row, s, codes);
    for (int i = 0; multiplier_bytes && i < s.count; i += 16) {
      const int64_t subgroup = (s.k + i) / h.format.subgroup;
      const int pair = packed[h.multipliers + multiplier_byte(h, s.block, s.at_chunk, i, s.channel)];
      set_nibble(multipliers[s.output * multiplier_row(h) + subgroup / 2], subgroup % 2, pair >> (i / 16 % 2 * 4) & 15);
    }
  };
  for (int64_t output = 0; output < h.layer.outputs; output++) each_stretch(h, output, unpack);
}

void decode_block(const uint8_t* packed, const PackedHeader& h, int64_t block, int8_t* panel) {
  const bool bytes = table_of(h.format.grid).bits == 8;
  const uint8_t *codes = packed + h.codes, *multipliers = packed + h.multipliers;
  const int64_t first = block % h.group_blocks * block_channels, segment_chunks = h.segment_chunks();
  std::memset(panel, 0, static_cast<size_t>(h.panel_bytes()));
  for (int64_t channel = 0; channel < std::min<int64_t>(block_channels, h.group_outputs - first); channel++) {
    const int64_t output = block / h.group_blocks * h.group_outputs + first + channel;
    for (int64_t k = 0; k < h.segments * h.length; k++) {
      const int64_t at_chunk = k / h.length * segment_chunks + k % h.length / chunk, at = k % h.length % chunk;
      int code, of_subgroup = 0;
      if (h.tiled) {
        const int byte = codes[code_byte(h, block, at_chunk, at, channel, bytes)];
        code = bytes ? byte : byte >> (at / 4 % 2 * 4) & 15;
        if (has_multipliers(h.format))
          of_subgroup = multipliers[multiplier_byte(h, block, at_chunk, at, channel)] >> (at / 16 % 2 * 4) & 15;
      } else {
        code = disk_code(h, codes, output, k), of_subgroup = disk_nibble(h, multipliers, output, k);
      }
      panel[at_chunk * panel_chunk + at / 4 * 64 + channel * 4 + at % 4] = static_cast<int8_t>(weight_of(h, code, of_subgroup));
    }
  }
}

}  // namespace halfbyte
