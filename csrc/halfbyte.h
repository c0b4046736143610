// The CPU engine: packed 4-bit weights times quantized activations, in exact integers. Knows neither torch nor Python.
//
//     y[m, n] = (scale_x[m] * scale_w[n]) * float(sum_k X[m, k] * W[n, k]) + bias[n]
//
// X and W are integers of at most 8 bits. X is held as unsigned bytes u = X + zero, because that is what the integer dot products
// of x86 take, and zero * sum_k W[n, k] is subtracted again before anything is rounded; so every instruction set gives the same
// bits.
//
// There is one kind of layer. A convolution reads channels-last images; a linear layer is a 1x1 convolution over M images of one
// pixel each, and so has a scale for every row. Preconditions are the caller's to check; what is checked here throws
// std::invalid_argument with a sentence. All functions may be called from several threads at once.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace halfbyte {

enum class Dtype : uint8_t { float32, bfloat16, float16 };

// The tables of src/halfbyte/formats.py. Weights take the signed ones.
enum class Grid : uint8_t { int4, lzs4, e2m1, e1m2, e3m0, ue2m2, ue1m3, ue3m1, int8, uint8 };

// Throws for a name that is none.
Grid grid_of(const std::string& name);

// ---- instruction sets -------------------------------------------------------------------------------------------------------

// In ascending order of speed. avx2 uses no VNNI; avx_vnni is its 256-bit form; avx512 needs AVX512-VNNI; neon ARM's dot products.
enum class Isa : uint8_t { scalar, avx2, avx_vnni, avx512, amx, neon };
constexpr int isa_count = 6;

const char* isa_name(Isa isa);  // "scalar", "avx2", "avxvnni", "avx512", "amx", "neon"
bool isa_available(Isa isa);    // on this machine and in this build
// The fastest one available where `name` is null or empty, else the named one; throws when there is none such or it is not
// available.
Isa choose_isa(const char* name);
// choose_isa(getenv("HALFBYTE_ISA")), looked up at every call.
Isa default_isa();
// Multiply-adds a second that one thread reaches with back-to-back dot products in registers: the limit no product can pass.
double integer_limit(Isa isa, double seconds);

// ---- threads ----------------------------------------------------------------------------------------------------------------

// Runs task(context, index) for index 0 .. tasks-1 on at most `threads` threads, the caller's among them; returns when all are
// done.
using ParallelFor = void (*)(int tasks, int threads, void (*task)(void* context, int index), void* context);

// OpenMP's pool where its runtime is loaded in this process already (torch brings one), else threads started for the call.
void parallel_for(int tasks, int threads, void (*task)(void* context, int index), void* context);
const char* parallel_runtime();  // "GOMP" or "std::thread"

struct Run {
  Isa isa = Isa::scalar;
  int threads = 1;
  ParallelFor parallel = parallel_for;
};

// ---- weights ----------------------------------------------------------------------------------------------------------------

struct WeightFormat {
  Grid grid = Grid::int4;
  int max_shift = 0;     // each subgroup's levels times a power of two, 1 to 1 << max_shift; 0: none
  int subgroup = 16;     // neighbours along K that share a multiplier
  int max_multiple = 0;  // in place of shifts: times 1 to this; 0: none
};

// K = kernel_h * kernel_w * (inputs / groups), in that order (channels innermost).
struct Layer {
  int64_t inputs = 0, outputs = 0;
  int kernel_h = 1, kernel_w = 1;
  int stride_h = 1, stride_w = 1;
  int dilation_h = 1, dilation_w = 1;
  int pad_top = 0, pad_bottom = 0, pad_left = 0, pad_right = 0;  // with zeros
  int groups = 1;
};

constexpr int64_t longest_k = 65536;  // beyond it int32 could overflow; `packed_bytes` throws

int64_t contraction(const Layer& layer);  // K

// The packed form: one flat buffer that describes itself, may be copied and moved, and holds 4 bits a weight (and a
// multiplier for every 16). Any alignment works; 64 is fastest.
size_t packed_bytes(const Layer& layer, const WeightFormat& format);
// codes: as on disk (docs/format.md): (O, ceil(K/2)) nibbles, or (O, K) bytes for int8. multipliers: nibbles (O, ceil(groups of K /
// 2)), shifts or multiples less one; or null without. One above the format's largest throws.
void pack_weights(const Layer& layer, const WeightFormat& format, const uint8_t* codes, const uint8_t* multipliers, uint8_t* packed,
                  int threads = 1);
// The inverse, to the last bit (padding nibbles are 0). multipliers may be null where there are none.
void unpack_weights(const uint8_t* packed, uint8_t* codes, uint8_t* multipliers);
// What a packed buffer holds; throws when it is not one.
void describe_packed(const uint8_t* packed, size_t bytes, Layer* layer, WeightFormat* format);

// Float weights, rows of output channels along K. `row_stride` in elements; values of a row are adjacent.
struct FloatRows {
  const void* data = nullptr;
  Dtype dtype = Dtype::float32;
  int64_t rows = 0, count = 0, row_stride = 0;
};

// The scale of each row, float32 (rows,), that leaves the least sum of squared errors: among `points` factors of the one that maps
// the largest magnitude to the top level. quantizers.search_scale in the same float32 operations and order of sums, so the
// same bits on every instruction set. Rows with a NaN or an infinity get NaN.
void search_scales(const Run& run, const FloatRows& weights, const WeightFormat& format, const float* factors, int points,
                   float* scales);

// Sums of squares, in double: of the weights, and of what rounding changed.
struct Energy {
  double signal = 0, noise = 0;
};

// Finite weights to codes and multipliers as on disk (see pack_weights) under scales (rows,); quantizers.quantize_weight, to the
// last bit. multipliers may be null where there are none. The last digits of the energies depend on the instruction set.
Energy round_weights(const Run& run, const FloatRows& weights, const WeightFormat& format, const float* scales, uint8_t* codes,
                     uint8_t* multipliers);

// Group norm of images with channels innermost: groups of neighbouring channels get mean 0 and variance 1, then every channel its
// gain and offset (float32; null: 1 and 0), and SiLU where it is asked for; runtime/pointwise.py says how, in the same operations.
// A group with a NaN or an infinity comes out as NaN.
struct GroupNorm {
  Dtype dtype = Dtype::float32;
  int64_t images = 0, pixels = 0, channels = 0, groups = 1;
  double epsilon = 1e-5;
  bool silu = false;
  const float* gain = nullptr;
  const float* offset = nullptr;
  const void* x = nullptr;
  void* y = nullptr;
  const float* shift = nullptr;  // (images, channels): is added to every pixel of x first; null: nothing
};

// ---- activations ------------------------------------------------------------------------------------------------------------

// As recipe.ActivationSpec (without group): signed grids take absmax scales, unsigned ones min-max with an integer zero point.
struct InputFormat {
  Grid grid = Grid::int8;
  int max_shift = 0;
  int subgroup = 16;      // neighbouring channels of one pixel that share a shift or a multiple
  int top = 127;          // the integer that the largest magnitude (or the range) maps to; ActivationSpec.top
  bool truncate = false;  // the second rounding drops bits
  bool fixed = false;     // one calibrated scale (and zero point, for unsigned grids) for all images, instead of their own
  float scale = 1.0f;     // of `fixed`; finite and > 0
  int zero = 0;           // of `fixed`; 0..255
  int max_multiple = 0;   // in place of shifts: the levels of a subgroup times 1 to this; 0: none
};

// Images with channels innermost and adjacent; strides in elements. A linear input of M rows: images = M, height = width = 1.
struct Input {
  const void* data = nullptr;
  Dtype dtype = Dtype::float32;
  int64_t images = 0, height = 1, width = 1, channels = 0;
  int64_t image_stride = 0, row_stride = 0, pixel_stride = 0;
};

// A quantized input: one flat buffer, aligned to 64, that describes itself. Several layers with the same input (queries, keys,
// values) may share one, where they ask for the same format and padding.
size_t quantized_bytes(const Input& input, const Layer& layer);
// With a norm: what that makes of the input, in its dtype, which is nowhere kept; its x and y are not looked at. The input is dense.
void quantize(const Run& run, const Input& input, const InputFormat& format, const Layer& layer, uint8_t* quantized,
              const GroupNorm* norm = nullptr);
// For tests: the integers X (zero point taken off), (images, height, width, channels) without padding, and the scale of each image.
void read_quantized(const uint8_t* quantized, int16_t* integers, float* scales);

// ---- products ---------------------------------------------------------------------------------------------------------------

// Pixels (rows of a linear layer) follow each other with pixel_stride >= outputs elements between them, channels adjacent.
struct Output {
  void* data = nullptr;
  Dtype dtype = Dtype::float32;
  int64_t pixel_stride = 0;
};

int64_t output_height(const Layer& layer, int64_t height);  // 0 where the kernel does not fit
int64_t output_width(const Layer& layer, int64_t width);

// weight_scale: float32 (O,); bias: float32 (O,) or null.
void product(const Run& run, const uint8_t* quantized, const uint8_t* packed, const float* weight_scale, const float* bias,
             const Output& output);
// `quantize` into scratch memory of this thread, then `product`.
void forward(const Run& run, const Input& input, const InputFormat& format, const uint8_t* packed, const float* weight_scale,
             const float* bias, const Output& output, const GroupNorm* norm = nullptr);

// ---- attention --------------------------------------------------------------------------------------------------------------

// The vectors of one kind (queries, say) of the heads of some images: channels adjacent, strides in elements.
struct Heads {
  const void* data = nullptr;
  Dtype dtype = Dtype::float32;
  int64_t tokens = 0, channels = 0;
  int64_t image_stride = 0, head_stride = 0, token_stride = 0;
};

// What is added to the scores of a query, a float for each key, adjacent; strides in elements, 0 where several share one. Keys with
// -infinity or a NaN are not seen.
struct ScoreBias {
  const float* data = nullptr;
  int64_t image_stride = 0, head_stride = 0, query_stride = 0;
};

// Both products of attention in 8-bit integers, softmax included; runtime/attention.py says how, in the same operations.
// Rows of queries with a NaN or an infinity come out as NaN, and so does a head with one among its keys or values.
//
// factor: of the scores, in steps of 2**(1 / 2048): 2048 log2(e) times their scale. bias: in such steps, or with null data.
// output: as many tokens as queries, as many channels as values.
void attend(const Run& run, int64_t images, int64_t heads, const Heads& queries, const Heads& keys, const Heads& values,
            float factor, const ScoreBias& bias, const Heads& output);

// ---- between layers ---------------------------------------------------------------------------------------------------------

// GELU by tanh of adjacent values; runtime/pointwise.py says how, in the same float32 operations.
void gelu(const Run& run, Dtype dtype, const void* x, int64_t count, void* y);

// GEGLU: the first half of every adjacent row of 2 * width values times the exact GELU of its second half; likewise.
void geglu(const Run& run, Dtype dtype, const void* x, int64_t rows, int64_t width, void* y);

void group_norm(const Run& run, const GroupNorm& call);

// Asks the kernel for large pages where memory is about to be written: it hands out memory page by page.
void expect_writes(void* data, size_t bytes);

// Frees the scratch memory that this thread keeps between calls.
void release_scratch();

}  // namespace halfbyte
