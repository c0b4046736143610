// Micro-benchmark of the core on one thread: time of quantizing and of multiplying, rate, and the share of what the dot product
// instruction of this core can do at most.
//
//     halfbyte_bench [isa] [seconds a case] [only cases with this in their name] [threads to cut the work for]
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <string>
#include <vector>

#include "halfbyte.h"

using namespace halfbyte;

namespace {

struct Case {
  const char* name;
  int64_t images, side, inputs, outputs;
  int kernel;
};

constexpr Case cases[] = {
    {"linear 4096x3072x3072", 4096, 1, 3072, 3072, 1}, {"linear 1024x1152x4608", 1024, 1, 1152, 4608, 1},
    {"linear 256x2048x2048", 256, 1, 2048, 2048, 1},   {"linear 32x3072x3072", 32, 1, 3072, 3072, 1},
    {"linear 512x15360x3072", 512, 1, 15360, 3072, 1}, {"linear 8x3072x3072", 8, 1, 3072, 3072, 1},
    {"linear 1x3072x3072", 1, 1, 3072, 3072, 1},       {"conv 2x320x64x64", 2, 64, 320, 320, 3},
    {"conv 2x640x32x32", 2, 32, 640, 640, 3},          {"conv 2x1280x16x16", 2, 16, 1280, 1280, 3},
    {"conv 64x128x32x32", 64, 32, 128, 128, 3},        {"conv 64x256x16x16", 64, 16, 256, 256, 3},
};

struct Format {
  const char* name;
  WeightFormat weight;
  InputFormat input;
};

const Format formats[] = {
    {"lzs4 x lzs4", {Grid::lzs4, 4, 16}, {Grid::lzs4, 4, 16, 112}},
    {"lzs4 x int8", {Grid::lzs4, 4, 16}, {Grid::int8, 0, 16, 127}},
    {"lzs4 x e2m1<<3", {Grid::lzs4, 4, 16}, {Grid::e2m1, 3, 16, 96}},
    {"lzs4 x e2m1*10", {Grid::lzs4, 4, 16}, {Grid::e2m1, 0, 16, 120, false, false, 1, 0, 10}},
    {"lzs4 x ue1m3<<4", {Grid::lzs4, 4, 16}, {Grid::ue1m3, 4, 16, 240}},
    {"lzs4 x ue1m3*16", {Grid::lzs4, 4, 16}, {Grid::ue1m3, 0, 16, 240, false, false, 1, 0, 16}},
    {"int8 x int8", {Grid::int8, 0, 16}, {Grid::int8, 0, 16, 127}},
};

// Processor time of this thread, so that other work on the same core does not count.
double now() {
  timespec time;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
  return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

// Median seconds of a call.
template <typename Call>
double median(double budget, Call call) {
  std::vector<double> times;
  double spent = 0;
  call();
  while (times.size() < 3 || (spent < budget && times.size() < 1000)) {
    const double start = now();
    call();
    times.push_back(now() - start);
    spent += times.back();
  }
  std::nth_element(times.begin(), times.begin() + times.size() / 2, times.end());
  return times[times.size() / 2];
}

void measure(const Run& run, const Case& c, const Format& format, double budget, double limit) {
  Layer layer;
  layer.inputs = c.inputs, layer.outputs = c.outputs, layer.kernel_h = layer.kernel_w = c.kernel;
  layer.pad_top = layer.pad_bottom = layer.pad_left = layer.pad_right = c.kernel / 2;
  const int64_t k = contraction(layer), pixels = c.images * c.side * c.side;
  std::vector<uint8_t> codes(static_cast<size_t>(c.outputs * k)), multipliers(codes.size() / 16),
      packed(packed_bytes(layer, format.weight));
  for (uint8_t& code : codes) code = static_cast<uint8_t>(std::rand());
  for (uint8_t& shift : multipliers) shift = static_cast<uint8_t>(std::rand() % 5 | std::rand() % 5 << 4);
  pack_weights(layer, format.weight, codes.data(), multipliers.data(), packed.data());
  std::vector<uint16_t> x(static_cast<size_t>(pixels * c.inputs)), y(static_cast<size_t>(pixels * c.outputs));
  for (uint16_t& value : x)
    value = static_cast<uint16_t>(0x3f80 + std::rand() % 128 - (std::rand() % 4) * 128 + (std::rand() % 2) * 0x8000);
  std::vector<float> scale(static_cast<size_t>(c.outputs), 0.01f);
  const Input input{x.data(),          Dtype::bfloat16, c.images, c.side, c.side, c.inputs, c.side * c.side * c.inputs,
                    c.side * c.inputs, c.inputs};
  std::vector<uint8_t> quantized(quantized_bytes(input, layer) + 64);
  uint8_t* aligned = quantized.data() + (64 - reinterpret_cast<uintptr_t>(quantized.data()) % 64) % 64;
  const double first = median(budget, [&] { quantize(run, input, format.input, layer, aligned); });
  const double second =
      median(budget, [&] { product(run, aligned, packed.data(), scale.data(), nullptr, {y.data(), Dtype::bfloat16, c.outputs}); });
  const double macs = static_cast<double>(pixels) * static_cast<double>(k * c.outputs);
  std::printf(
      "%-22s %-15s quantize %8.3f ms  product %8.3f ms  %7.1f GMAC/s  %5.1f %% of the limit, %5.1f %% with quantization  %5.1f "
      "GB/s\n",
      c.name, format.name, first * 1e3, second * 1e3, macs / second / 1e9, macs / second / limit * 100,
      macs / (first + second) / limit * 100, static_cast<double>(packed.size()) / second / 1e9);
}

}  // namespace

int main(int count, char** arguments) {
  Run run;
  run.isa = choose_isa(count > 1 ? arguments[1] : nullptr);
  const double budget = count > 2 ? std::atof(arguments[2]) : 0.2;
  const std::string only = count > 3 ? arguments[3] : "";
  // Work is cut as for so many threads, and done by one: what sharing costs before anyone waits for anyone.
  run.threads = count > 4 ? std::atoi(arguments[4]) : 1;
  run.parallel = [](int tasks, int, void (*task)(void*, int), void* context) {
    for (int i = 0; i < tasks; i++) task(context, i);
  };
  const double limit = integer_limit(run.isa, 0.3);
  std::printf("%s: limit %.1f GMAC/s on one thread\n", isa_name(run.isa), limit / 1e9);
  for (const Format& format : formats)
    for (const Case& c : cases)
      if (std::string(std::string(c.name) + " " + format.name).find(only) != std::string::npos)
        measure(run, c, format, budget, limit);
}
