// The drivers of what stands between layers: GELU, GEGLU and group norms.
#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>

#include "dispatch.h"
#include "floats.h"

namespace halfbyte {
namespace {

constexpr int64_t part_values = 16384;  // of a task, about: some microseconds
constexpr int64_t block_pixels = 64;    // that are summed in float32; sums of blocks are added in double

constexpr int64_t divide_up(int64_t value, int64_t by) { return (value + by - 1) / by; }

struct Values {
  const Kernels& kernels;
  Dtype dtype;
  const char* x;
  int64_t count;
  char* y;

  static void gelu(void* raw, int index) {
    const Values& v = *static_cast<Values*>(raw);
    const int64_t first = index * part_values, from = first * size_of(v.dtype);
    v.kernels.gelu(v.dtype, v.x + from, std::min(part_values, v.count - first), v.y + from);
  }
};

struct Gates {
  const Kernels& kernels;
  Dtype dtype;
  const char* x;
  int64_t rows, width, task_rows;
  char* y;

  static void geglu(void* raw, int index) {
    const Gates& g = *static_cast<Gates*>(raw);
    const int64_t first = index * g.task_rows, bytes = g.width * size_of(g.dtype);
    for (int64_t row = first; row < std::min(first + g.task_rows, g.rows); row++)
      g.kernels.geglu(g.dtype, g.x + row * 2 * bytes, g.x + (row * 2 + 1) * bytes, g.width, g.y + row * bytes);
  }
};

// The one NaN in place of any, which the kernels can round.
float plain(float value) { return std::isnan(value) ? std::numeric_limits<float>::quiet_NaN() : value; }

struct Norming {
  const GroupNorm& call;
  const Kernels& kernels;
  int64_t blocks, task_blocks, tasks;  // of an image
  float *sums, *squares;               // (images, blocks, channels)
  float *gains, *offsets;              // (images, channels)

  // Blocks first .. last of an image.
  struct Part {
    int64_t image, first, last;
  };
  Part part(int index) const {
    const int64_t image = index / tasks, first = index % tasks * task_blocks;
    return {image, first, std::min(first + task_blocks, blocks)};
  }
  Pixels pixels(int64_t image, int64_t first, int64_t last) const {
    const int64_t from = first * block_pixels, to = std::min(last * block_pixels, call.pixels);
    return {call.dtype, to - from, call.channels, static_cast<const char*>(call.x) + offset(image, from)};
  }
  int64_t offset(int64_t image, int64_t pixel) const {
    return (image * call.pixels + pixel) * call.channels * size_of(call.dtype);
  }

  static void sum(void* raw, int index) {
    const Norming& n = *static_cast<Norming*>(raw);
    const auto [image, first, last] = n.part(index);
    for (int64_t block = first; block < last; block++) {
      const int64_t at = (image * n.blocks + block) * n.call.channels;
      n.kernels.sum_pixels(n.pixels(image, block, block + 1), n.sums + at, n.squares + at);
    }
  }

  static void resolve(void* raw, int image) {
    const Norming& n = *static_cast<Norming*>(raw);
    const int64_t channels = n.call.channels, width = channels / n.call.groups;
    const double count = static_cast<double>(n.call.pixels * width);
    for (int64_t group = 0; group < n.call.groups; group++) {
      double sum = 0, square = 0;
      for (int64_t block = 0; block < n.blocks; block++)
        for (int64_t i = 0; i < width; i++) {
          const int64_t at = (image * n.blocks + block) * channels + group * width + i;
          sum += double{n.sums[at]}, square += double{n.squares[at]};
        }
      if (n.call.shift) n.add_shift(image, group, sum, square);
      const double mean = sum / count, variance = square / count - mean * mean;
      const double deviation = std::sqrt((variance < 0 ? 0 : variance) + n.call.epsilon);
      const float middle = static_cast<float>(mean), rate = static_cast<float>(1 / deviation);
      for (int64_t i = 0; i < width; i++) {
        const int64_t channel = group * width + i, at = image * channels + channel;
        const float gain = n.call.gain ? rate * n.call.gain[channel] : rate, shift = n.call.shift ? n.call.shift[at] : 0.0f;
        const float offset = (n.call.offset ? n.call.offset[channel] : 0.0f) - (middle - shift) * gain;
        n.gains[at] = plain(gain), n.offsets[at] = plain(offset);
      }
    }
  }

  // Sums of x + shift and of its square from those of x, channel after channel.
  void add_shift(int64_t image, int64_t group, double& sum, double& square) const {
    const int64_t width = call.channels / call.groups, pixels = call.pixels;
    for (int64_t channel = group * width; channel < (group + 1) * width; channel++) {
      const double shift = call.shift[image * call.channels + channel], all = shift * static_cast<double>(pixels);
      double own = 0;
      for (int64_t block = 0; block < blocks; block++) own += double{sums[(image * blocks + block) * call.channels + channel]};
      sum += all, square += (2 * own + all) * shift;
    }
  }

  // All three of an image, while it is in the cache.
  static void whole(void* raw, int image) {
    const auto tasks = static_cast<int>(static_cast<Norming*>(raw)->tasks);
    for (int i = 0; i < tasks; i++) sum(raw, image * tasks + i);
    resolve(raw, image);
    for (int i = 0; i < tasks; i++) scale(raw, image * tasks + i);
  }

  static void scale(void* raw, int index) {
    const Norming& n = *static_cast<Norming*>(raw);
    const auto [image, first, last] = n.part(index);
    const int64_t at = image * n.call.channels;
    n.kernels.scale_pixels(n.pixels(image, first, last), n.gains + at, n.offsets + at, n.call.silu,
                           static_cast<char*>(n.call.y) + n.offset(image, first * block_pixels));
  }
};

}  // namespace

void gelu(const Run& run, Dtype dtype, const void* x, int64_t count, void* y) {
  Values values{kernels_of(run.isa), dtype, static_cast<const char*>(x), count, static_cast<char*>(y)};
  run.parallel(static_cast<int>(divide_up(count, part_values)), run.threads, Values::gelu, &values);
}

void geglu(const Run& run, Dtype dtype, const void* x, int64_t rows, int64_t width, void* y) {
  const int64_t task_rows = divide_up(part_values, std::max<int64_t>(width, 1));
  Gates gates{kernels_of(run.isa), dtype, static_cast<const char*>(x), rows, width, task_rows, static_cast<char*>(y)};
  run.parallel(static_cast<int>(divide_up(rows, task_rows)), run.threads, Gates::geglu, &gates);
}

void group_norm(const Run& run, const GroupNorm& call) {
  const Kernels& kernels = kernels_of(run.isa);
  if (call.groups <= 0 || call.channels % call.groups)
    throw std::invalid_argument("group norm: the groups must share the channels evenly");
  if (!call.images || !call.pixels || !call.channels) return;
  const int64_t blocks = divide_up(call.pixels, block_pixels);
  const int64_t task_blocks = std::max<int64_t>(1, part_values / (block_pixels * call.channels));
  const int64_t sums = call.images * blocks * call.channels, ends = call.images * call.channels;
  auto* memory = reinterpret_cast<float*>(scratch(Slot::sums, static_cast<size_t>(sums + ends) * 8));
  Norming norming{call, kernels, blocks, task_blocks, divide_up(blocks, task_blocks), memory, memory + sums, memory + 2 * sums,
                  memory + 2 * sums + ends};
  const int tasks = static_cast<int>(call.images * norming.tasks);
  if (call.images >= 2 * run.threads) return run.parallel(static_cast<int>(call.images), run.threads, Norming::whole, &norming);
  run.parallel(tasks, run.threads, Norming::sum, &norming);
  run.parallel(static_cast<int>(call.images), run.threads, Norming::resolve, &norming);
  run.parallel(tasks, run.threads, Norming::scale, &norming);
}

}  // namespace halfbyte
