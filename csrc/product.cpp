// The public products: resolves where everything lies, and hands the work to the driver of the instruction set.
#include <stdexcept>

#include "dispatch.h"

namespace halfbyte {
namespace {

int64_t output_size(int64_t size, int before, int after, int kernel, int dilation, int stride) {
  const int64_t room = size + before + after - int64_t{dilation} * (kernel - 1) - 1;
  return room < 0 ? 0 : room / stride + 1;
}

Problem resolve(const uint8_t* quantized, const uint8_t* packed, const float* weight_scale, const float* bias) {
  Problem p{quantized, packed, quantized_header(quantized), packed_header(packed), nullptr, nullptr, weight_scale, bias, 0, 0, 0};
  const QuantizedHeader& q = p.inputs;
  const Layer& layer = p.weights.layer;
  if (q.channels != layer.inputs)
    throw std::invalid_argument("the layer takes " + std::to_string(layer.inputs) + " channels, the input has " +
                                std::to_string(q.channels));
  const bool padded_alike = q.pad_top == layer.pad_top && q.pad_bottom == layer.pad_bottom && q.pad_left == layer.pad_left &&
                            q.pad_right == layer.pad_right;
  const bool adjacent = layer.kernel_h * layer.kernel_w == 1 || q.pixel_pitch == q.channels;
  if (!padded_alike || !adjacent) throw std::invalid_argument("the input was quantized for a layer with another kernel or padding");
  p.scales = reinterpret_cast<const float*>(quantized + q.scales);
  p.zeros = reinterpret_cast<const int32_t*>(quantized + q.zeros);
  p.out_height = output_height(layer, q.height), p.out_width = output_width(layer, q.width);
  p.rows = q.images * p.out_height * p.out_width;
  return p;
}

}  // namespace

int64_t output_height(const Layer& layer, int64_t height) {
  return output_size(height, layer.pad_top, layer.pad_bottom, layer.kernel_h, layer.dilation_h, layer.stride_h);
}

int64_t output_width(const Layer& layer, int64_t width) {
  return output_size(width, layer.pad_left, layer.pad_right, layer.kernel_w, layer.dilation_w, layer.stride_w);
}

void product(const Run& run, const uint8_t* quantized, const uint8_t* packed, const float* weight_scale, const float* bias,
             const Output& output) {
  const Problem problem = resolve(quantized, packed, weight_scale, bias);
  const Kernels& kernels = kernels_of(run.isa);
  if (!problem.rows || !problem.weights.layer.outputs) return;
  if (run.isa == Isa::scalar) return scalar_product(run, problem, output);
  drive_product(run, kernels, problem, output);
}

void forward(const Run& run, const Input& input, const InputFormat& format, const uint8_t* packed, const float* weight_scale,
             const float* bias, const Output& output, const GroupNorm* norm) {
  const Layer layer = packed_header(packed).layer;
  uint8_t* quantized = scratch(Slot::input, quantized_bytes(input, layer));
  quantize(run, input, format, layer, quantized, norm);
  product(run, quantized, packed, weight_scale, bias, output);
}

}  // namespace halfbyte
