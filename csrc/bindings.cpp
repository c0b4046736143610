// The engine as a Python module. Everything a caller can get wrong is answered here, or in cpu.py, with a sentence; a
// std::invalid_argument of the core becomes a ValueError. Tensors come as addresses, so that no version of torch is linked: cpu.py
// has checked their device, dtype and strides, and here their sizes are compared with what the packed weights say.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>

#include <array>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "floats.h"
#include "grids.h"

namespace nb = nanobind;
namespace hb = halfbyte;

namespace {

using Bytes = nb::ndarray<uint8_t, nb::c_contig, nb::device::cpu>;
using Floats = nb::ndarray<float, nb::c_contig, nb::device::cpu>;
using Sizes = std::array<int64_t, 13>;  // inputs, outputs, kernel h w, stride h w, dilation h w, pad top bottom left right, groups

template <typename... Parts>
std::string sentence(Parts... parts) {
  std::string text;
  ((text += [](auto part) {
     if constexpr (std::is_arithmetic_v<decltype(part)>) return std::to_string(part);
     else return std::string(part);
   }(parts)), ...);
  return text;
}

void require(bool good, const std::string& text) {
  if (!good) throw std::invalid_argument(text);
}

hb::Layer layer_of(const Sizes& sizes) {
  hb::Layer layer;
  layer.inputs = sizes[0], layer.outputs = sizes[1];
  int* const places[] = {&layer.kernel_h,   &layer.kernel_w, &layer.stride_h,   &layer.stride_w, &layer.dilation_h, &layer.dilation_w,
                         &layer.pad_top,    &layer.pad_bottom, &layer.pad_left, &layer.pad_right, &layer.groups};
  for (size_t i = 0; i < 11; ++i) {
    require(sizes[i + 2] >= 0 && sizes[i + 2] < (1 << 30), sentence("a layer cannot have the size ", sizes[i + 2]));
    *places[i] = static_cast<int>(sizes[i + 2]);
  }
  return layer;
}

// grid (a value of hb::Grid), max_shift, subgroup, max_multiple
using WeightArguments = std::array<int64_t, 4>;

hb::Grid grid_at(int64_t code) {
  require(0 <= code && code <= static_cast<int64_t>(hb::Grid::uint8), sentence("grid code ", code, " is none"));
  return static_cast<hb::Grid>(code);
}

hb::WeightFormat weight_format(const WeightArguments& given) {
  return {grid_at(given[0]), static_cast<int>(given[1]), static_cast<int>(given[2]), static_cast<int>(given[3])};
}

hb::Dtype dtype_of(int code) {
  require(0 <= code && code <= 2, sentence("dtype code ", code, " is none of 0 float32, 1 bfloat16, 2 float16"));
  return static_cast<hb::Dtype>(code);
}

size_t bytes_of_codes(const hb::Layer& layer, const hb::WeightFormat& format) {
  const size_t k = static_cast<size_t>(hb::contraction(layer));
  return static_cast<size_t>(layer.outputs) * (format.grid == hb::Grid::int8 ? k : (k + 1) / 2);
}

size_t bytes_of_multipliers(const hb::Layer& layer, const hb::WeightFormat& format) {
  if (!hb::has_multipliers(format)) return 0;
  const size_t groups = (static_cast<size_t>(hb::contraction(layer)) + format.subgroup - 1) / format.subgroup;
  return static_cast<size_t>(layer.outputs) * ((groups + 1) / 2);
}

void check_bytes(const char* what, size_t found, size_t expected) {
  require(found == expected, sentence("the layer needs ", expected, " bytes of ", what, "; got ", found));
}

void pack(const Sizes& sizes, const WeightArguments& given, const Bytes& codes,
          const std::optional<Bytes>& multipliers, const Bytes& packed, int threads) {
  const hb::Layer layer = layer_of(sizes);
  const hb::WeightFormat format = weight_format(given);
  check_bytes("packed weights", packed.size(), hb::packed_bytes(layer, format));
  check_bytes("codes", codes.size(), bytes_of_codes(layer, format));
  check_bytes("multipliers", multipliers ? multipliers->size() : 0, bytes_of_multipliers(layer, format));
  nb::gil_scoped_release unlocked;
  hb::pack_weights(layer, format, codes.data(), multipliers ? multipliers->data() : nullptr, packed.data(), threads);
}

void unpack(const Bytes& packed, const Bytes& codes, const std::optional<Bytes>& multipliers) {
  hb::Layer layer;
  hb::WeightFormat format;
  hb::describe_packed(packed.data(), packed.size(), &layer, &format);
  check_bytes("codes", codes.size(), bytes_of_codes(layer, format));
  check_bytes("multipliers", multipliers ? multipliers->size() : 0, bytes_of_multipliers(layer, format));
  nb::gil_scoped_release unlocked;
  hb::unpack_weights(packed.data(), codes.data(), multipliers ? multipliers->data() : nullptr);
}

// address, dtype code, images, height, width, channels, image stride, row stride, pixel stride
using InputArguments = std::array<int64_t, 9>;
// grid (a value of hb::Grid), max_shift, subgroup, top, truncate, max_multiple
using FormatArguments = std::array<int64_t, 6>;
// address, dtype code, pixel stride
using OutputArguments = std::array<int64_t, 3>;

hb::Input input_of(const InputArguments& given) {
  return {reinterpret_cast<const void*>(given[0]), dtype_of(static_cast<int>(given[1])), given[2], given[3], given[4], given[5],
          given[6], given[7], given[8]};
}

hb::InputFormat input_format(const FormatArguments& given, std::optional<std::array<double, 2>> fixed) {
  hb::InputFormat format;
  format.grid = grid_at(given[0]);
  format.max_shift = static_cast<int>(given[1]), format.subgroup = static_cast<int>(given[2]);
  format.top = static_cast<int>(given[3]), format.truncate = given[4] != 0;
  format.max_multiple = static_cast<int>(given[5]);
  if (fixed) {
    format.fixed = true;
    format.scale = static_cast<float>((*fixed)[0]), format.zero = static_cast<int>((*fixed)[1]);
  }
  return format;
}

// A vector of any dtype in float32: itself, or a copy in `wide`.
const float* in_float32(const std::array<int64_t, 2>& given, int64_t count, std::vector<float>& wide) {
  const auto* values = reinterpret_cast<const void*>(given[0]);
  const hb::Dtype dtype = dtype_of(static_cast<int>(given[1]));
  if (!values || dtype == hb::Dtype::float32) return static_cast<const float*>(values);
  wide.resize(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; i++) wide[static_cast<size_t>(i)] = hb::load(values, dtype, i);
  return wide.data();
}

// groups, whether SiLU follows, addresses of gain and offset (channels,) and shift (images, channels), float32 or 0
using NormArguments = std::array<int64_t, 5>;

hb::GroupNorm norm_of(const NormArguments& given, double epsilon, const hb::Input& input) {
  const auto at = [&](int i) { return reinterpret_cast<const float*>(given[static_cast<size_t>(i)]); };
  return {input.dtype, input.images, input.height * input.width, input.channels, given[0], epsilon, given[1] != 0, at(2), at(3),
          nullptr, nullptr, at(4)};
}

// addresses of uint8 (bytes,), float32 (outputs,) and, with its dtype code, the bias (outputs,) or 0
void forward(const InputArguments& x, const FormatArguments& given, const std::optional<std::array<double, 2>>& fixed, size_t packed,
             size_t bytes, size_t weight_scale, const std::array<int64_t, 2>& bias, const OutputArguments& y, int threads,
             const std::optional<NormArguments>& norm_arguments, double epsilon) {
  const auto* weights = reinterpret_cast<const uint8_t*>(packed);
  const hb::Input input = input_of(x);
  const hb::InputFormat format = input_format(given, fixed);
  const hb::Output output = {reinterpret_cast<void*>(y[0]), dtype_of(static_cast<int>(y[1])), y[2]};
  hb::Layer layer;
  hb::WeightFormat stored;
  hb::describe_packed(weights, bytes, &layer, &stored);
  require(input.channels == layer.inputs, sentence("the layer takes ", layer.inputs, " channels; the input has ", input.channels));
  require(output.pixel_stride >= layer.outputs, "the output is narrower than the layer");
  nb::gil_scoped_release unlocked;
  std::vector<float> wide;
  const hb::GroupNorm norm = norm_of(norm_arguments.value_or(NormArguments{}), epsilon, input);
  hb::forward({hb::default_isa(), threads, hb::parallel_for}, input, format, weights, reinterpret_cast<const float*>(weight_scale),
              in_float32(bias, layer.outputs, wide), output, norm_arguments ? &norm : nullptr);
}

// data, dtype, rows, values of a row; rows lie one after another.
hb::FloatRows float_rows(const std::array<uint64_t, 4>& weights) {
  const auto count = static_cast<int64_t>(weights[3]);
  return {reinterpret_cast<const void*>(weights[0]), dtype_of(static_cast<int>(weights[1])), static_cast<int64_t>(weights[2]), count, count};
}

void search_scales(const std::array<uint64_t, 4>& weights, const WeightArguments& given, const Floats& factors,
                   const Floats& scales, int threads) {
  const hb::FloatRows rows = float_rows(weights);
  const hb::WeightFormat format = weight_format(given);
  require(scales.size() == static_cast<size_t>(rows.rows), sentence("there are ", rows.rows, " rows and ", scales.size(), " scales"));
  nb::gil_scoped_release unlocked;
  hb::search_scales({hb::default_isa(), threads, hb::parallel_for}, rows, format, factors.data(), static_cast<int>(factors.size()),
                    scales.data());
}

std::pair<double, double> round_weights(const std::array<uint64_t, 4>& weights, const WeightArguments& given,
                                        const Floats& scales, const Bytes& codes, const std::optional<Bytes>& multipliers,
                                        int threads) {
  const hb::FloatRows rows = float_rows(weights);
  const hb::WeightFormat format = weight_format(given);
  hb::Layer layer;
  layer.inputs = rows.count, layer.outputs = rows.rows;
  check_bytes("codes", codes.size(), bytes_of_codes(layer, format));
  check_bytes("multipliers", multipliers ? multipliers->size() : 0, bytes_of_multipliers(layer, format));
  require(scales.size() == static_cast<size_t>(rows.rows), sentence("there are ", rows.rows, " rows and ", scales.size(), " scales"));
  nb::gil_scoped_release unlocked;
  const hb::Energy energy = hb::round_weights({hb::default_isa(), threads, hb::parallel_for}, rows, format, scales.data(), codes.data(),
                                              multipliers ? multipliers->data() : nullptr);
  return {energy.signal, energy.noise};
}

// address, dtype code, tokens, channels, image stride, head stride, token stride
using HeadsArguments = std::array<int64_t, 7>;

hb::Heads heads_of(const HeadsArguments& given) {
  return {reinterpret_cast<const void*>(given[0]), dtype_of(static_cast<int>(given[1])), given[2], given[3], given[4], given[5], given[6]};
}

// bias: address (0: none), image stride, head stride, query stride
void attend(int64_t images, int64_t heads, const HeadsArguments& queries, const HeadsArguments& keys, const HeadsArguments& values,
            double factor, const std::array<int64_t, 4>& bias, const HeadsArguments& output, int threads) {
  nb::gil_scoped_release unlocked;
  hb::attend({hb::default_isa(), threads, hb::parallel_for}, images, heads, heads_of(queries), heads_of(keys), heads_of(values),
             static_cast<float>(factor), {reinterpret_cast<const float*>(bias[0]), bias[1], bias[2], bias[3]}, heads_of(output));
}

void gelu(uint64_t x, int dtype, int64_t count, uint64_t y, int threads) {
  nb::gil_scoped_release unlocked;
  hb::gelu({hb::default_isa(), threads, hb::parallel_for}, dtype_of(dtype), reinterpret_cast<const void*>(x), count,
           reinterpret_cast<void*>(y));
}

void geglu(uint64_t x, int dtype, int64_t rows, int64_t width, uint64_t y, int threads) {
  nb::gil_scoped_release unlocked;
  hb::geglu({hb::default_isa(), threads, hb::parallel_for}, dtype_of(dtype), reinterpret_cast<const void*>(x), rows, width,
            reinterpret_cast<void*>(y));
}

// extent: images, pixels, channels, groups; places: addresses of x, gain and offset (0: none), y
void group_norm(int dtype, const std::array<int64_t, 4>& extent, double epsilon, bool silu, const std::array<uint64_t, 4>& places,
                int threads) {
  nb::gil_scoped_release unlocked;
  hb::group_norm({hb::default_isa(), threads, hb::parallel_for},
                 {dtype_of(dtype), extent[0], extent[1], extent[2], extent[3], epsilon, silu,
                  reinterpret_cast<const float*>(places[1]), reinterpret_cast<const float*>(places[2]), reinterpret_cast<const void*>(places[0]),
                  reinterpret_cast<void*>(places[3])});
}

}  // namespace

NB_MODULE(_engine, m) {
  m.attr("LONGEST_K") = hb::longest_k;
  m.def("grid_code", [](const std::string& name) { return static_cast<int>(hb::grid_of(name)); });
  m.def("isa", [] { return std::string(hb::isa_name(hb::default_isa())); });
  m.def("available_isas", [] {
    nb::list names;
    for (int i = 0; i < hb::isa_count; ++i)
      if (hb::isa_available(static_cast<hb::Isa>(i))) names.append(hb::isa_name(static_cast<hb::Isa>(i)));
    return names;
  });
  m.def("parallel_runtime", [] { return std::string(hb::parallel_runtime()); });
  m.def("integer_limit", [](double seconds) { return hb::integer_limit(hb::default_isa(), seconds); },
        nb::call_guard<nb::gil_scoped_release>());
  m.def("packed_bytes", [](const Sizes& sizes, const WeightArguments& given) {
    return hb::packed_bytes(layer_of(sizes), weight_format(given));
  });
  m.def("pack", &pack, nb::arg(), nb::arg(), nb::arg(), nb::arg().none(), nb::arg(), nb::arg());
  m.def("unpack", &unpack, nb::arg(), nb::arg(), nb::arg().none());
  m.def("search_scales", &search_scales);
  m.def("attend", &attend);
  m.def("expect_writes", [](uint64_t data, size_t bytes) { hb::expect_writes(reinterpret_cast<void*>(data), bytes); });
  m.def("gelu", &gelu);
  m.def("geglu", &geglu);
  m.def("group_norm", &group_norm);
  m.def("round_weights", &round_weights, nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg().none(), nb::arg());
  m.def("forward", &forward, nb::arg(), nb::arg(), nb::arg().none(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(),
        nb::arg().none() = nb::none(), nb::arg() = 0.0);
}
