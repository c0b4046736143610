// Float weights to scales, codes and multipliers: rows are tasks. Also the kernels of processors without wider vectors.
#include "weights.h"

#include <algorithm>
#include <stdexcept>
#include <vector>

#include "dispatch.h"

namespace halfbyte {
namespace {

constexpr int64_t task_values = 1 << 18;  // a few milliseconds
constexpr int64_t widest_vector = 16;     // floats

void check(const FloatRows& weights, const WeightFormat& format) {
  check_weights(format);
  if (weights.rows < 0 || weights.count < 1 || (weights.rows > 1 && weights.row_stride < weights.count))
    throw std::invalid_argument("rows of weights need 1 value or more each, and must not overlap");
}

// Enough for the parts of a Rounder (weights.h) at any width.
size_t work_bytes(const FloatRows& weights, const WeightFormat& format, int points) {
  const int64_t groups = (weights.count + format.subgroup - 1) / format.subgroup, lanes = round_up(groups, widest_vector);
  const int64_t values = lanes * format.subgroup;
  return static_cast<size_t>(4 * (values + lanes + 2 * format.subgroup * widest_vector + std::max(points * lanes, values / 4 + lanes)));
}

struct Tasks {
  int64_t rows;  // of a task
  int count;

  explicit Tasks(const FloatRows& weights)
      : rows(std::max<int64_t>(1, task_values / weights.count)), count(static_cast<int>((weights.rows + rows - 1) / rows)) {}

  FloatRows part(const FloatRows& weights, int task) const {
    const int64_t first = task * rows;
    return {static_cast<const char*>(weights.data) + first * weights.row_stride * size_of(weights.dtype), weights.dtype,
            std::min(rows, weights.rows - first), weights.count, weights.row_stride};
  }
};

struct SearchJob {
  const ScaleSearch& whole;
  const Kernels& kernels;
  Tasks tasks;

  static void run(void* raw, int task) {
    const SearchJob& job = *static_cast<SearchJob*>(raw);
    ScaleSearch part = job.whole;
    part.rows = job.tasks.part(part.rows, task), part.scales += task * job.tasks.rows;
    job.kernels.search(part, scratch(Slot::weights, work_bytes(part.rows, part.format, part.points)));
  }
};

struct RoundJob {
  const WeightRounding& whole;
  const Kernels& kernels;
  Tasks tasks;
  int64_t code_bytes, multiplier_bytes;  // of a row
  std::vector<Energy> energies;     // of tasks

  static void run(void* raw, int task) {
    RoundJob& job = *static_cast<RoundJob*>(raw);
    WeightRounding part = job.whole;
    const int64_t first = task * job.tasks.rows;
    part.rows = job.tasks.part(part.rows, task), part.scales += first, part.codes += first * job.code_bytes;
    if (part.multipliers) part.multipliers += first * job.multiplier_bytes;
    job.energies[static_cast<size_t>(task)] =
        job.kernels.round(part, scratch(Slot::weights, work_bytes(part.rows, part.format, 0)));
  }
};

}  // namespace

void scalar_search(const ScaleSearch& search, uint8_t* work) { search_rows<4>(search, work); }
Energy scalar_round(const WeightRounding& rounding, uint8_t* work) { return round_rows<4>(rounding, work); }

void search_scales(const Run& run, const FloatRows& weights, const WeightFormat& format, const float* factors, int points,
                   float* scales) {
  check(weights, format);
  if (points < 1) throw std::invalid_argument("a search needs a factor");
  const ScaleSearch search{weights, format, factors, points, scales};
  SearchJob job{search, kernels_of(run.isa), Tasks(weights)};
  run.parallel(job.tasks.count, run.threads, SearchJob::run, &job);
}

Energy round_weights(const Run& run, const FloatRows& weights, const WeightFormat& format, const float* scales, uint8_t* codes,
                     uint8_t* multipliers) {
  check(weights, format);
  if (has_multipliers(format) && !multipliers) throw std::invalid_argument("the multipliers have nowhere to go");
  const int64_t count = weights.count, groups = (count + format.subgroup - 1) / format.subgroup;
  const WeightRounding rounding{weights, format, scales, codes, multipliers};
  const Tasks tasks(weights);
  RoundJob job{rounding, kernels_of(run.isa), tasks, table_of(format.grid).bits == 4 ? (count + 1) / 2 : count, (groups + 1) / 2,
               std::vector<Energy>(static_cast<size_t>(tasks.count))};
  run.parallel(tasks.count, run.threads, RoundJob::run, &job);
  Energy sum;
  for (const Energy& energy : job.energies) sum.signal += energy.signal, sum.noise += energy.noise;
  return sum;
}

}  // namespace halfbyte
