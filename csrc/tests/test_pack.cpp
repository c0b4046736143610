// Tables, float conversions and packed weights.
#include "harness.h"

namespace halfbyte {

void test_grids() {
  for (int g = 0; g < 10; g++) {
    const GridTable& grid = grid_tables[g];
    check(grid_of(grid.name) == static_cast<Grid>(g), "grid_of");
    if (grid.bits == 8) continue;
    for (float units = -70; units < 200; units += 0.125f) {  // the nearest level; of two, the one with the even magnitude index
      float best = INFINITY;
      int expected = 0;
      for (int sign = grid.is_signed ? -1 : 1; sign < 2; sign += 2)
        for (int i = 0; i < grid.count; i++) {
          const float level = static_cast<float>(sign * grid.magnitudes[i]), distance = std::fabs(level - units);
          if (distance < best || (distance == best && i % 2 == 0)) best = distance, expected = static_cast<int>(level);
        }
      if (g == 0 && units <= -7.5f) expected = -8;  // two's complement has one level more
      check(round_to_grid(units, grid) == expected, std::string(grid.name) + " rounds " + std::to_string(units));
    }
  }
  check_throws([] { grid_of("int5"); }, "grid_of(int5)");
}

void test_floats() {
  for (int half = 0; half < 65536; half++) {
    const float f16 = from_float16(static_cast<uint16_t>(half)), bf16 = float_of_bits(static_cast<uint32_t>(half) << 16);
    check(std::isnan(f16) ? std::isnan(from_float16(to_float16(f16))) : to_float16(f16) == half, "float16 " + std::to_string(half));
    check(std::isnan(bf16) ? (to_bfloat16(bf16) & 0x7fff) > 0x7f80 : to_bfloat16(bf16) == half, "bfloat16 " + std::to_string(half));
    if (half % 0x8000 >= 0x7bff) continue;
    const float next = from_float16(static_cast<uint16_t>(half + 1)), middle = 0.5f * f16 + 0.5f * next;  // exact in float32
    check(to_float16(middle) == half + half % 2, "float16 ties to even at " + std::to_string(half));
    check(to_float16(std::nextafter(middle, f16)) == half && to_float16(std::nextafter(middle, next)) == half + 1,
          "float16 near a tie");
  }
  check(to_float16(65520.0f) == 0x7c00 && to_float16(std::nextafter(65520.0f, 0.0f)) == 0x7bff, "float16 overflow");
}

Layer random_layer() {
  Layer layer;
  layer.groups = uniform(0, 3) ? 1 : static_cast<int>(uniform(1, 3));
  layer.inputs = layer.groups * uniform(1, 200), layer.outputs = layer.groups * uniform(1, 70);
  if (uniform(0, 1)) {
    layer.kernel_h = static_cast<int>(uniform(1, 3)), layer.kernel_w = static_cast<int>(uniform(1, 3));
    layer.dilation_w = uniform(0, 3) ? 1 : 2;
    if (uniform(0, 1)) layer.inputs = layer.groups * 64;
  }
  return layer;
}

void test_packing() {
  for (const WeightFormat& format : weight_formats())
    for (int i = 0; i < 12; i++) {
      const Layer layer = random_layer();
      const Weights w = random_weights(layer, format);
      const PackedHeader h = packed_header(w.packed.data());
      const std::string what = std::string(name_of(format.grid)) + (h.tiled ? " tiled" : " plain");
      std::vector<uint8_t> codes(w.codes.size(), 0xaa), multipliers(w.multipliers.size(), 0xaa);
      unpack_weights(w.packed.data(), codes.data(), multipliers.data());
      check(codes == w.codes && multipliers == w.multipliers, what + " unpacks to what was packed");
      // every weight, found again in the panel of its block
      std::vector<int8_t> panel(static_cast<size_t>(h.panel_bytes()));
      const int64_t k = contraction(layer), block = uniform(0, h.blocks() - 1), first = block % h.group_blocks * 16;
      decode_block(w.packed.data(), h, block, panel.data());
      int64_t total = 0, sums = 0;
      for (int8_t value : panel) total += value;
      for (int64_t n = 0; n < 16; n++) {
        int32_t sum;
        std::memcpy(&sum, w.packed.data() + h.sums + (block * 16 + n) * 4, 4);
        sums += sum;
        for (int64_t at = 0; at < k && first + n < h.group_outputs; at++) {
          const int64_t output = block / h.group_blocks * h.group_outputs + first + n,
                        row_groups = (k + format.subgroup - 1) / format.subgroup;
          const bool bytes = table_of(format.grid).bits == 8;
          const int code =
              bytes ? w.codes[static_cast<size_t>(output * k + at)] : nibble(w.codes.data() + output * ((k + 1) / 2), at);
          const uint8_t* nibbles = w.multipliers.data() + output * ((row_groups + 1) / 2);
          const int own = has_multipliers(format) ? nibble(nibbles, at / format.subgroup) : 0;
          const int multiplier = format.max_multiple ? own + 1 : 1 << own;
          const int64_t place = at / h.length * h.segment_chunks() * 1024 + at % h.length / 4 * 64 + n * 4 + at % h.length % 4;
          check(panel[static_cast<size_t>(place)] == decode_code(code, table_of(format.grid)) * multiplier, what + " decodes");
        }
      }
      check(total == sums, what + " has its column sums, and nothing but zeros beyond its weights");
    }
}

void test_refusals() {
  Layer layer;
  layer.inputs = 8, layer.outputs = 4;
  check_throws([&] { packed_bytes(layer, {Grid::uint8, 0, 16}); }, "unsigned weights");
  check_throws([&] { packed_bytes(layer, {Grid::int4, 1, 16}); }, "int4 with shifts");
  check_throws([&] { packed_bytes(layer, {Grid::lzs4, 5, 16}); }, "lzs4 << 5");
  check_throws([&] { packed_bytes(layer, {Grid::e2m1, 0, 16, 11}); }, "e2m1 * 11");
  check_throws([&] { packed_bytes(layer, {Grid::lzs4, 0, 16, 1}); }, "lzs4 * 1");
  check_throws([&] { packed_bytes(layer, {Grid::lzs4, 1, 16, 2}); }, "shifts and multiples");
  check_throws([&] { packed_bytes(layer, {Grid::int8, 0, 16, 2}); }, "multiples of int8");
  layer.groups = 3;
  check_throws([&] { packed_bytes(layer, {Grid::int4, 0, 16}); }, "groups that do not divide");
  layer.groups = 1, layer.inputs = 65537;
  check_throws([&] { packed_bytes(layer, {Grid::int4, 0, 16}); }, "a K that could overflow");
  layer.inputs = 16;
  std::vector<uint8_t> codes(32), multipliers(4, 5), packed(packed_bytes(layer, {Grid::lzs4, 4, 16}));
  check_throws([&] { pack_weights(layer, {Grid::lzs4, 4, 16}, codes.data(), multipliers.data(), packed.data()); }, "a shift of 5");
  const WeightFormat five{Grid::lzs4, 0, 16, 5};
  check_throws([&] { pack_weights(layer, five, codes.data(), multipliers.data(), packed.data()); }, "a multiple of 6");
  Layer read;
  WeightFormat format;
  multipliers.assign(4, 4);
  pack_weights(layer, {Grid::lzs4, 4, 16}, codes.data(), multipliers.data(), packed.data());
  describe_packed(packed.data(), packed.size(), &read, &format);
  check(read.inputs == 16 && read.outputs == 4 && format.max_shift == 4, "describe_packed");
  check_throws([&] { describe_packed(packed.data(), packed.size() - 64, &read, &format); }, "packed weights cut short");
  check_throws([&] { describe_packed(codes.data(), codes.size(), &read, &format); }, "other bytes");
  check_throws([] { choose_isa("sse2"); }, "choose_isa(sse2)");
  check(choose_isa("scalar") == Isa::scalar && choose_isa("") == choose_isa(nullptr), "choose_isa");
}

}  // namespace halfbyte
