#include "harness.h"

namespace halfbyte {

int failures = 0, checks = 0;

void test_grids();
void test_floats();
void test_packing();
void test_refusals();
void test_quantize();
void test_refused_multiples();
void test_ties();
void test_weights();
void test_linear();
void test_extremes();
void test_conv();
void test_padding();
void test_shapes_of_models();
void test_zero_sizes();
void test_misaligned();
void test_concurrent_callers();
void test_attention();
void test_refused_attention();
void test_gelu();
void test_geglu();
void test_expected_writes();
void test_group_norms();

}  // namespace halfbyte

int main(int count, char** arguments) {
  using namespace halfbyte;
  const struct {
    const char* name;
    void (*run)();
  } tests[] = {{"grids", test_grids},
               {"floats", test_floats},
               {"packing", test_packing},
               {"refusals", test_refusals},
               {"quantize", test_quantize},
               {"multiples", test_refused_multiples},
               {"ties", test_ties},
               {"weights", test_weights},
               {"linear", test_linear},
               {"extremes", test_extremes},
               {"conv", test_conv},
               {"padding", test_padding},
               {"models", test_shapes_of_models},
               {"zero", test_zero_sizes},
               {"misaligned", test_misaligned},
               {"concurrent", test_concurrent_callers},
               {"attention", test_attention},
               {"heads", test_refused_attention},
               {"gelu", test_gelu},
               {"geglu", test_geglu},
               {"memory", test_expected_writes},
               {"norms", test_group_norms}};
  for (const auto& test : tests) {
    if (count > 1 && std::string(arguments[1]) != test.name) continue;
    const int before = failures, so_far = checks;
    test.run();
    std::printf("%-12s %8d checks, %d failed\n", test.name, checks - so_far, failures - before);
  }
  std::printf("instruction sets:");
  for (Isa isa : fast_isas()) std::printf(" %s", isa_name(isa));
  std::printf("; threads: %s; %d failures\n", parallel_runtime(), failures);
  return failures != 0;
}
