// The compiler's own vectors. In an unnamed namespace, as all that uses them: each instruction set compiles its own.
#pragma once

#include <cstdint>

namespace halfbyte {
namespace {

// Vectors of 4, 8 and 16 lanes (gcc does not keep a vector's size where it depends on a template argument).
template <int W>
struct Lanes;
template <>
struct Lanes<4> {
  typedef float Floats __attribute__((vector_size(16)));
  typedef int32_t Ints __attribute__((vector_size(16)));
  typedef double Doubles __attribute__((vector_size(32)));
};
template <>
struct Lanes<8> {
  typedef float Floats __attribute__((vector_size(32)));
  typedef int32_t Ints __attribute__((vector_size(32)));
  typedef double Doubles __attribute__((vector_size(64)));
};
template <>
struct Lanes<16> {
  typedef float Floats __attribute__((vector_size(64)));
  typedef int32_t Ints __attribute__((vector_size(64)));
  typedef double Doubles __attribute__((vector_size(128)));
};

}  // namespace
}  // namespace halfbyte
