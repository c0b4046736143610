// Scales, codes and multipliers of weights on every instruction set against a plain oracle, to the last bit.
#include "harness.h"

namespace halfbyte {
namespace {

float add_pairs(std::vector<float> v) {
  while (v.size() > 1) {
    const size_t half = v.size() / 2;
    std::vector<float> pairs;
    for (size_t i = 0; i < half; i++) pairs.push_back(v[i] + v[half + i]);
    if (v.size() % 2) pairs.push_back(v.back());
    v = pairs;
  }
  return v[0];
}

struct Oracle {
  const WeightFormat& format;
  const GridTable& grid = table_of(format.grid);

  // Values of a row as subgroups, the last one filled up with zeros.
  std::vector<std::vector<float>> subgroups(std::vector<float> row) const {
    std::vector<std::vector<float>> groups;
    for (size_t i = 0; i < row.size(); i++) {
      if (i % static_cast<size_t>(format.subgroup) == 0) groups.emplace_back(static_cast<size_t>(format.subgroup));
      groups.back()[i % static_cast<size_t>(format.subgroup)] = row[i];
    }
    return groups;
  }
  float peak(const std::vector<float>& group) const {
    float most = 0;
    for (float x : group) most = std::max(most, std::fabs(x));
    return most;
  }
  int flag(float peak) const {
    int bits = 0;
    while (bits < 8 && std::ldexp(1.0f, bits) <= peak) bits++;
    return std::min(std::max(bits - bit_length(grid.top), 0), format.max_shift);
  }
  bool has_more(float peak, int shift) const { return shift < format.max_shift && peak > static_cast<float>(grid.top << shift); }

  float loss(const std::vector<float>& group, float scale) const {
    if (format.max_multiple) return loss_of_multiples(group, scale);
    const float most = peak(group) / scale;
    const int shift = flag(most);
    const float step = std::ldexp(scale, shift);
    std::vector<float> low, high;
    for (float x : group) {
      const float units = x / step, half = units * 0.5f;
      const float a = (static_cast<float>(round_to_grid(units, grid)) - units) * step;
      const float b = (static_cast<float>(round_to_grid(half, grid)) - half) * (step * 2.0f);
      low.push_back(a * a), high.push_back(b * b);
    }
    return has_more(most, shift) ? std::min(add_pairs(low), add_pairs(high)) : add_pairs(low);
  }

  float loss_of_multiples(const std::vector<float>& group, float scale) const {
    float least = INFINITY;
    for (int multiple = 1; multiple <= format.max_multiple; multiple++) {
      const float step = scale * static_cast<float>(multiple);
      std::vector<float> squares;
      for (float x : group) {
        const float units = x / step, error = (static_cast<float>(round_to_grid(units, grid)) - units) * step;
        squares.push_back(error * error);
      }
      least = std::min(least, add_pairs(squares));
    }
    return least;
  }

  float search(const std::vector<float>& row, const std::vector<float>& factors) const {
    float most = 0;
    for (float x : row) {
      if (!std::isfinite(x)) return NAN;
      most = std::max(most, std::fabs(x));
    }
    float widest = most / static_cast<float>(format.max_multiple ? grid.top * format.max_multiple : grid.top << format.max_shift);
    if (widest < std::numeric_limits<float>::min()) widest = 1.0f;
    float best = widest, least = INFINITY;
    for (float factor : factors) {
      std::vector<float> losses;
      for (const auto& group : subgroups(row)) losses.push_back(loss(group, widest * factor));
      const float found = add_pairs(losses);
      if (found < least) least = found, best = widest * factor;
    }
    return best;
  }

  float best_multiple(const std::vector<float>& group, float scale) const {
    float best = 0, least = INFINITY;
    for (int multiple = 1; multiple <= format.max_multiple; multiple++) {
      const float step = static_cast<float>(multiple);
      std::vector<float> squares;
      for (float x : group) {
        const float units = x / scale, error = static_cast<float>(round_to_grid(units / step, grid)) * step - units;
        squares.push_back(error * error);
      }
      const float sum = add_pairs(squares);
      if (best == 0 || sum < least) best = step, least = sum;
    }
    return best;
  }

  int code(int level) const {
    if (grid.bits == 8) return level & 255;
    int code = 0;
    while (grid.levels[code] != level) code++;
    return code;
  }

  void round(const std::vector<float>& row, float scale, std::vector<int>* codes, std::vector<int>* nibbles) const {
    for (const auto& group : subgroups(row)) {
      if (format.max_multiple) {
        const float multiple = best_multiple(group, scale);
        nibbles->push_back(static_cast<int>(multiple) - 1);
        for (float x : group) codes->push_back(code(round_to_grid(x / scale / multiple, grid)));
        continue;
      }
      const float most = peak(group) / scale;
      int shift = flag(most);
      std::vector<float> low, high;
      for (float x : group) {
        const float units = x / scale;
        const float a = std::ldexp(static_cast<float>(round_to_grid(std::ldexp(units, -shift), grid)), shift) - units;
        const float b = std::ldexp(static_cast<float>(round_to_grid(std::ldexp(units, -shift - 1), grid)), shift + 1) - units;
        low.push_back(a * a), high.push_back(b * b);
      }
      if (has_more(most, shift) && add_pairs(high) < add_pairs(low)) shift++;
      nibbles->push_back(shift);
      for (float x : group) codes->push_back(code(round_to_grid(std::ldexp(x / scale, -shift), grid)));
    }
  }
};

std::vector<float> row_of(const FloatRows& rows, int64_t row) {
  std::vector<float> values;
  for (int64_t i = 0; i < rows.count; i++) values.push_back(load(rows.data, rows.dtype, row * rows.row_stride + i));
  return values;
}

void compare(const FloatRows& rows, const WeightFormat& format, Isa isa, int threads) {
  const Oracle oracle{format};
  const GridTable& grid = oracle.grid;
  const std::vector<float> factors = {1.0f, 0.93f, 0.81f, 0.6f, 0.5f};
  const Run run{isa, threads, parallel_for};
  const std::string what = std::string(isa_name(isa)) + " " + describe(format) + ", " + std::to_string(rows.count) + " values";
  std::vector<float> scales(static_cast<size_t>(rows.rows));
  search_scales(run, rows, format, factors.data(), static_cast<int>(factors.size()), scales.data());
  bool finite = true;
  for (int64_t r = 0; r < rows.rows; r++) {
    const float expected = oracle.search(row_of(rows, r), factors), got = scales[static_cast<size_t>(r)];
    check(bits_of_float(expected) == bits_of_float(got) || (std::isnan(expected) && std::isnan(got)), what + ": scale");
    finite &= std::isfinite(got);
  }
  if (!finite) return;
  const int64_t groups = (rows.count + format.subgroup - 1) / format.subgroup, code_bytes = grid.bits == 4 ? (rows.count + 1) / 2 : rows.count;
  std::vector<uint8_t> codes(static_cast<size_t>(rows.rows * code_bytes), 0xee);
  std::vector<uint8_t> multipliers(static_cast<size_t>(rows.rows * ((groups + 1) / 2)), 0xee);
  uint8_t* const nibbles = has_multipliers(format) ? multipliers.data() : nullptr;
  const Energy energy = round_weights(run, rows, format, scales.data(), codes.data(), nibbles);
  double signal = 0, noise = 0;
  bool good = true;
  for (int64_t r = 0; r < rows.rows; r++) {
    const std::vector<float> row = row_of(rows, r);
    std::vector<int> expected, expected_nibbles;
    oracle.round(row, scales[static_cast<size_t>(r)], &expected, &expected_nibbles);
    for (int64_t i = 0; i < rows.count; i++) {
      const int code = grid.bits == 4 ? nibble(codes.data() + r * code_bytes, i) : codes[static_cast<size_t>(r * code_bytes + i)];
      const int own = nibbles ? nibble(nibbles + r * ((groups + 1) / 2), i / format.subgroup) : 0;
      good &= code == expected[static_cast<size_t>(i)] && own == expected_nibbles[static_cast<size_t>(i / format.subgroup)];
      const double x = row[static_cast<size_t>(i)];
      const auto level = static_cast<float>(decode_code(code, grid) * multiplier_of(format, own));
      const double error = x - static_cast<double>(level * scales[static_cast<size_t>(r)]);
      signal += x * x, noise += error * error;
    }
    if (grid.bits == 4 && rows.count % 2) good &= codes[static_cast<size_t>((r + 1) * code_bytes - 1)] < 16;
    if (nibbles && groups % 2) good &= multipliers[static_cast<size_t>((r + 1) * ((groups + 1) / 2) - 1)] < 16;
  }
  check(good, what + ": codes and multipliers");
  check(std::fabs(signal - energy.signal) <= 1e-12 * signal && std::fabs(noise - energy.noise) <= 1e-9 * noise, what + ": energies");
}

}  // namespace

void test_weights() {
  std::vector<Isa> isas = fast_isas();
  isas.push_back(Isa::scalar);
  for (const WeightFormat& format : weight_formats())
    for (Dtype dtype : {Dtype::float32, Dtype::bfloat16, Dtype::float16})
      for (int64_t count : {1, 2, 15, 16, 17, 33, 64, 100, 272, 1030}) {
        const Images images(dtype, 12, 1, 1, count, uniform(0, 3), uniform(0, 2));
        for (Isa isa : isas) compare({images.input.data, dtype, 12, count, images.input.pixel_stride}, format, isa, 1);
      }
  const Images many(Dtype::bfloat16, 700, 1, 1, 1030, 0, 0, false);
  for (Isa isa : isas) compare({many.input.data, Dtype::bfloat16, 700, 1030, 1030}, {Grid::lzs4, 4, 16}, isa, 3);
  float one = 1, scale = 1;
  const auto refused = [&](const FloatRows& rows, const WeightFormat& format, int points, const std::string& what) {
    check_throws([&] { search_scales(Run{}, rows, format, &one, points, &scale); }, what);
  };
  refused({&one, Dtype::float32, 1, 1, 1}, {Grid::ue1m3, 0, 16}, 1, "an unsigned grid");
  refused({&one, Dtype::float32, 1, 1, 1}, {Grid::int4, 1, 16}, 1, "int4 with shifts");
  refused({&one, Dtype::float32, 1, 1, 1}, {Grid::e2m1, 4, 16}, 1, "a shift too many");
  refused({&one, Dtype::float32, 1, 1, 1}, {Grid::e2m1, 0, 16, 11}, 1, "a multiple too many");
  refused({&one, Dtype::float32, 1, 1, 1}, {Grid::lzs4, 4, 0}, 1, "an empty subgroup");
  refused({&one, Dtype::float32, 1, 0, 0}, {Grid::lzs4, 4, 16}, 1, "empty rows");
  refused({&one, Dtype::float32, 1, 1, 1}, {Grid::lzs4, 4, 16}, 0, "no factors");
}

}  // namespace halfbyte
