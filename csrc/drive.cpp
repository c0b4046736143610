// The driver of the fast products: which thread multiplies what, and in which order, so that weights are decoded once into a panel
// that stays in the L2 cache and a tile of input rows stays in L1 while all blocks of the panel pass by.
#include <algorithm>
#include <vector>

#include "dispatch.h"
#include "floats.h"

namespace halfbyte {
namespace {

constexpr int64_t divide_up(int64_t value, int64_t by) { return (value + by - 1) / by; }

constexpr int most_rows = 32;  // of a tile

struct Drive {
  const Problem& p;
  const Kernels& kernels;
  const Output& output;
  std::vector<int64_t> offsets, gathered_offsets;          // of chunks; and where `gather` puts them
  std::vector<int32_t> quads;                              // of chunks
  bool thin = false;                                       // few rows: no panels
  int64_t panel_blocks = 1, group_panels = 1, panels = 1;  // blocks of a task; tasks of a group, of all groups
  int64_t row_step = 0, row_parts = 1;                     // rows of a task
};

// Walks over output pixels without dividing.
struct Cursor {
  const Problem& p;
  int64_t image, y, x;

  Cursor(const Problem& problem, int64_t row)
      : p(problem), image(row / p.out_width / p.out_height), y(row / p.out_width % p.out_height), x(row % p.out_width) {}
  int64_t offset() const { return pixel_offset(p.inputs, image, y * p.weights.layer.stride_h, x * p.weights.layer.stride_w); }
  void advance() {
    if (++x < p.out_width) return;
    x = 0;
    if (++y < p.out_height) return;
    y = 0, image++;
  }
};

// The rows of one tile: where they start, and what undoes their quantization.
struct TileRows {
  const uint8_t* row[most_rows];
  int32_t zeros[most_rows];
  float scales[most_rows];

  void take(Cursor& cursor, int count, int64_t channel) {
    for (int r = 0; r < count; r++, cursor.advance()) {
      row[r] = cursor.p.quantized + cursor.offset() + channel;
      zeros[r] = cursor.p.zeros[cursor.image], scales[r] = cursor.p.scales[cursor.image];
    }
  }
};

Nibbles nibbles_of(const Problem& p, int64_t block) {
  const PackedHeader& w = p.weights;
  const uint8_t* multipliers = has_multipliers(w.format) ? p.packed + w.multipliers + block * w.chunks * multiplier_chunk : nullptr;
  const bool multiples = w.format.max_multiple > 0;
  return {p.packed + w.codes + block * w.chunks * (panel_chunk / 2), multipliers, w.chunks, &table_of(w.format.grid), multiples};
}

int64_t panel_bytes(const Drive& d) { return d.p.weights.chunks * d.kernels.chunk_bytes; }

// Panels of a task's blocks: decoded, or for int8 the packed bytes themselves.
const uint8_t* panels_of(const Drive& d, int64_t block, int64_t count) {
  const PackedHeader& w = d.p.weights;
  const bool bytes = table_of(w.format.grid).bits == 8;
  if (w.tiled && bytes) return d.p.packed + w.codes + block * w.panel_bytes();
  uint8_t* panel = scratch(Slot::panel, static_cast<size_t>(d.panel_blocks * panel_bytes(d)));
  for (int64_t b = 0; b < count; b++) {
    uint8_t* to = panel + b * panel_bytes(d);
    if (w.tiled) {  // nibbles
      d.kernels.decode(nibbles_of(d.p, block + b), to);
    } else {
      decode_block(d.p.packed, w, block + b, reinterpret_cast<int8_t*>(to));
    }
  }
  return panel;
}

// Whether every run of `run` rows is complete and evenly spaced, all runs alike.
bool are_even(const TileRows& rows, int count, int run) {
  if (count % run) return false;
  for (int r = 0; r < count; r++)
    if (r % run && rows.row[r] - rows.row[r - 1] != rows.row[1] - rows.row[0]) return false;
  return true;
}

// Copies the chunks of rows together, run after run: (run, chunk, row of the run, 64 bytes).
void gather(TileRows& rows, int count, int run, const std::vector<int64_t>& offsets, uint8_t* to) {
  const auto chunks = static_cast<int64_t>(offsets.size());
  for (int r = 0; r < count; r++) {
    uint8_t* place = to + r / run * chunks * run * chunk + r % run * chunk;
    for (int64_t i = 0; i < chunks; i++) std::memcpy(place + i * run * chunk, rows.row[r] + offsets[static_cast<size_t>(i)], chunk);
  }
  for (int r = 0; r < most_rows; r++) rows.row[r] = to + r / run * chunks * run * chunk + r % run * chunk;
}

// One task: some rows times some panels.
struct Task {
  const Drive& d;
  const Problem& p = d.p;
  const PackedHeader& w = p.weights;
  int64_t group, in_group, first_block, blocks, row_from, row_to;
  Walk walk{};
  const uint8_t* weights = nullptr;
  int32_t* sums;

  Task(const Drive& drive, int index) : d(drive) {
    const int64_t panel = index % d.panels, part = index / d.panels;
    group = panel / d.group_panels, in_group = panel % d.group_panels * d.panel_blocks;
    first_block = group * w.group_blocks + in_group, blocks = std::min(d.panel_blocks, w.group_blocks - in_group);
    row_from = part * d.row_step, row_to = std::min(row_from + d.row_step, p.rows);
    walk = {d.offsets.data(), d.quads.data(), 0, w.chunks};
    if (!d.thin) weights = panels_of(d, first_block, blocks);
    const int64_t tiles = d.kernels.step ? (d.panel_blocks + d.kernels.blocks - 1) / d.kernels.blocks : 1;
    sums = reinterpret_cast<int32_t*>(scratch(Slot::sums, static_cast<size_t>(tiles * tile_sums()) * 4));
  }

  int64_t tile_sums() const { return d.kernels.rows * d.kernels.blocks * block_channels; }

  void run() {
    Cursor cursor(p, row_from);
    for (int64_t row = row_from; row < row_to; row += d.kernels.rows) {
      const int count = static_cast<int>(std::min<int64_t>(d.kernels.rows, row_to - row));
      TileRows rows;
      rows.take(cursor, count, group * (w.layer.inputs / w.layer.groups));
      if (d.kernels.even_rows && !d.thin && !are_even(rows, count, d.kernels.even_rows)) {
        gather(rows, count, d.kernels.even_rows, d.offsets, scratch(Slot::rows, static_cast<size_t>(most_rows * w.chunks * chunk)));
        walk.offsets = d.gathered_offsets.data();
      } else {
        walk.offsets = d.offsets.data();
      }
      multiply(row, count, rows);
    }
  }

  void multiply(int64_t row, int count, const TileRows& rows) {
    const int64_t step = d.kernels.step && !d.thin ? d.kernels.step : w.chunks;
    for (walk.first = 0; walk.first < w.chunks; walk.first = walk.last) {
      walk.last = walk.first + step * 3 / 2 >= w.chunks ? w.chunks : walk.first + step;  // no short last step
      for (int64_t b = 0; b < blocks; b += d.kernels.blocks) {
        const int some = static_cast<int>(std::min<int64_t>(d.kernels.blocks, blocks - b));
        int32_t* at = sums + (d.kernels.step ? b / d.kernels.blocks * tile_sums() : 0);
        if (d.thin) {
          d.kernels.thin(rows.row, count, walk, nibbles_of(p, first_block + b), some, at);
        } else {
          d.kernels.tile(rows.row, count, walk, weights + b * panel_bytes(d), panel_bytes(d), some * block_channels, at);
        }
        if (walk.last == w.chunks) finish(row, count, rows, b, some, at);
      }
    }
  }

  void finish(int64_t row, int count, const TileRows& rows, int64_t block, int some, const int32_t* at) const {
    const int64_t inside = (in_group + block) * block_channels, out = group * w.group_outputs + inside;
    const int columns = static_cast<int>(std::min<int64_t>(some * block_channels, w.group_outputs - inside));
    const auto* colsums = reinterpret_cast<const int32_t*>(p.packed + w.sums) + (first_block + block) * block_channels;
    const int64_t size = size_of(d.output.dtype);
    char* to = static_cast<char*>(d.output.data) + (row * d.output.pixel_stride + out) * size;
    d.kernels.finish(at, d.kernels.blocks * block_channels,
                     {colsums, p.weight_scale + out, p.bias ? p.bias + out : nullptr, columns},
                     {count, rows.zeros, rows.scales, to, d.output.pixel_stride * size, d.output.dtype});
  }
};

void run_task(void* raw, int index) {
  const Drive& d = *static_cast<Drive*>(raw);
  Task task(d, index);
  if (d.kernels.begin && !d.thin) d.kernels.begin();
  task.run();
  if (d.kernels.end && !d.thin) d.kernels.end();
}

// Cuts the work into tasks: panels as large as L2 allows; where those are too few for the threads to share evenly, rows in parts,
// as long as a part repays decoding; and where there are few rows, smaller panels.
void plan(Drive& d, int threads) {
  const PackedHeader& w = d.p.weights;
  const int64_t tile_blocks = d.kernels.blocks, wanted = threads == 1 ? 1 : 4 * threads;
  d.thin = w.tiled && table_of(w.format.grid).bits == 4 && d.p.rows <= d.kernels.thin_rows;
  const auto cut = [&](int64_t blocks, int64_t multiple) {  // panels of a group: alike, and evenly many for the threads
    d.group_panels = round_up(divide_up(w.group_blocks, blocks), multiple);
    d.panel_blocks = round_up(divide_up(w.group_blocks, d.group_panels), tile_blocks);
    d.group_panels = divide_up(w.group_blocks, d.panel_blocks);
    d.panels = d.group_panels * w.layer.groups;
  };
  cut(std::max(tile_blocks, d.kernels.panel_budget / panel_bytes(d) / tile_blocks * tile_blocks), 1);
  const int64_t parts = std::clamp<int64_t>(divide_up(wanted, d.panels), 1, std::max<int64_t>(1, d.p.rows / d.kernels.part_rows));
  if (d.panels * parts < wanted) {
    cut(std::max<int64_t>(1, w.blocks() * parts / wanted), 1);
  } else if (parts == 1 && threads > 1) {
    cut(d.panel_blocks, threads);
  }
  const int64_t tiles = divide_up(d.p.rows, d.kernels.rows);
  d.row_step = divide_up(tiles, parts) * d.kernels.rows;
  d.row_parts = divide_up(d.p.rows, d.row_step);
}

}  // namespace

void drive_product(const Run& run, const Kernels& kernels, const Problem& problem, const Output& output) {
  const GridTable& grid = table_of(problem.weights.format.grid);
  const bool narrow = kernels.narrow && problem.weights.tiled && grid.bits == 4 && std::max(grid.top, -grid.bottom) <= narrow_level;
  Drive drive{problem, narrow ? *kernels.narrow : kernels, output, {}, {}, {}};
  const PackedHeader& w = problem.weights;
  for (int64_t i = 0; i < w.chunks; i++) {
    const int64_t start = i % w.segment_chunks() * chunk;
    drive.offsets.push_back(segment_offset(w, problem.inputs, i / w.segment_chunks()) + start);
    drive.gathered_offsets.push_back(i * drive.kernels.even_rows * chunk);
    drive.quads.push_back(static_cast<int32_t>((std::min<int64_t>(chunk, w.length - start) + 3) / 4));
  }
  plan(drive, run.threads);
  run.parallel(static_cast<int>(drive.panels * drive.row_parts), run.threads, run_task, &drive);
}

}  // namespace halfbyte
