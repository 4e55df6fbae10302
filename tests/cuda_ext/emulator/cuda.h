// CUDA C++ as a C++ compiler for the CPU takes it: keywords, vectors, builtins, and the names of intrinsics.cuh.
#pragma once
#include <math.h>
#include <string.h>

#include <type_traits>
#include <utility>

#include "half.h"
#include "machine.h"

#define SPILLD_EMULATOR 1
#define __global__
#define __device__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __restrict__

typedef unsigned uint2 __attribute__((ext_vector_type(2)));
typedef unsigned uint4 __attribute__((ext_vector_type(4)));
typedef float float2 __attribute__((ext_vector_type(2)));
typedef float float4 __attribute__((ext_vector_type(4)));

#define threadIdx (emulator::running->index)
#define blockIdx (emulator::block)
#define blockDim (emulator::block_size)
#define gridDim (emulator::grid_size)

namespace emulator {

template <class To, class From>
inline To reinterpret(From from) {
  To to{};
  memcpy(&to, &from, sizeof from < sizeof to ? sizeof from : sizeof to);
  return to;
}

template <class T>
inline T shuffle(unsigned mask, T value, unsigned source, int line) {
  static_assert(sizeof(T) <= 8, "a shuffle moves at most eight bytes");
  if (mask != ~0u) fail("line %d: only whole warps shuffle here", line);
  return reinterpret<T>(meet(Collective::SHUFFLE, line, reinterpret<uint64_t>(value), source % WARP));
}

inline int largest(unsigned mask, int value, int line) {
  for (int bits = 1; bits < WARP; bits *= 2) {
    const int other = shuffle(mask, value, running->lane ^ bits, line);
    if (other > value) value = other;
  }
  return value;
}

// Calls a kernel with arguments that lie behind pointers, as cuLaunchKernel does.
template <class F>
struct Entry;
template <class... A>
struct Entry<void (*)(A...)> {
  // Of each argument: 0 for a pointer, else its bytes, negative for a float.
  struct Kinds {
    int count;
    int kind[sizeof...(A)];
  };
  static constexpr Kinds kinds() { return {sizeof...(A), {kind<A>()...}}; }
  template <class T>
  static constexpr int kind() {
    return std::is_pointer<T>::value ? 0 : std::is_floating_point<T>::value ? -(int)sizeof(T) : (int)sizeof(T);
  }
  template <size_t... I>
  static void call(void (*kernel)(A...), void** arguments, std::index_sequence<I...>) {
    kernel(*(std::remove_reference_t<A>*)arguments[I]...);
  }
  static void call(void (*kernel)(A...), void** arguments) {
    call(kernel, arguments, std::index_sequence_for<A...>{});
  }
};

}  // namespace emulator

#define EMULATOR_ENTRY(kernel)                                                                               \
  extern "C" void enter_##kernel(void** arguments) {                                                         \
    emulator::Entry<decltype(&kernel)>::call(&kernel, arguments);                                            \
  }                                                                                                          \
  extern "C" const emulator::Entry<decltype(&kernel)>::Kinds kinds_##kernel =                                \
      emulator::Entry<decltype(&kernel)>::kinds();

#define SHARED_MEMORY(name) unsigned char* name = emulator::shared_memory()

#define __syncthreads() emulator::sync_block(__LINE__)
#define __syncwarp() emulator::meet(emulator::Collective::SYNC, __LINE__)
#define __shfl_sync(mask, value, lane) emulator::shuffle(mask, value, lane, __LINE__)
#define __shfl_xor_sync(mask, value, bits) \
  emulator::shuffle(mask, value, emulator::running->lane ^ (bits), __LINE__)
#define __reduce_max_sync(mask, value) emulator::largest(mask, value, __LINE__)
#define __ballot_sync(mask, bit) \
  ((unsigned)emulator::meet(emulator::Collective::BALLOT, __LINE__, (uint64_t)(bool)(bit)))
#define __any_sync(mask, bit) (__ballot_sync(mask, bit) != 0)
#define __all_sync(mask, bit) (__ballot_sync(mask, bit) == ~0u)

inline unsigned __float_as_uint(float x) { return emulator::reinterpret<unsigned>(x); }
inline int __float_as_int(float x) { return emulator::reinterpret<int>(x); }
inline float __uint_as_float(unsigned x) { return emulator::reinterpret<float>(x); }
inline float __int_as_float(int x) { return emulator::reinterpret<float>(x); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
template <class T>
constexpr T min(T a, T b) { return b < a ? b : a; }
template <class T>
constexpr T max(T a, T b) { return a < b ? b : a; }

inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
  const uint64_t bytes = (uint64_t)high << 32 | low;
  unsigned result = 0;
  for (int i = 0; i < 4; i++) result |= (unsigned)(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  return result;
}

// The names of intrinsics.cuh.

inline float exp2_approximate(float x) { return exp2f(x); }
inline void copy_async16(void* shared, const void* global, bool some) {
  emulator::copy_async(shared, global, 16, some ? 16 : 0);
}
inline void commit_copies() { emulator::commit_copies(); }
template <int GroupsLeft>
inline void wait_copies() { emulator::wait_copies(GroupsLeft); }

inline unsigned nearest_bf16(float x) {
  const unsigned bits = __float_as_uint(x);
  return x == x ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : 0x7fff;
}
inline unsigned add_bf16x2(unsigned a, unsigned b) {
  return nearest_bf16(__uint_as_float(a << 16) + __uint_as_float(b << 16)) |
         nearest_bf16(__uint_as_float(a & 0xffff0000) + __uint_as_float(b & 0xffff0000)) << 16;
}
inline float widen_f16(unsigned short number) { return emulator::widen_half(number); }

#if FLOAT16
#define PAIRED_MMA emulator::Collective::MMA_F16
inline unsigned pack(float low, float high) { return emulator::nearest_half(low) | emulator::nearest_half(high) << 16; }
#else
#define PAIRED_MMA emulator::Collective::MMA_BF16
inline unsigned pack(float low, float high) { return nearest_bf16(low) | nearest_bf16(high) << 16; }
#endif

// Without brackets around its arguments, or indices of arrays among them would not be checked.
#define mma(c, a, b)                                                                  \
  do {                                                                                \
    uint32_t registers[10];                                                           \
    for (int i = 0; i < 4; i++) registers[i] = a[i], registers[6 + i] = __float_as_uint(c[i]); \
    for (int i = 0; i < 2; i++) registers[4 + i] = b[i];                              \
    emulator::meet(PAIRED_MMA, __LINE__, 0, 0, registers);                            \
    for (int i = 0; i < 4; i++) c[i] = __uint_as_float(registers[6 + i]);             \
  } while (0)
#define load_matrices(r, address) \
  emulator::meet(emulator::Collective::LDMATRIX, __LINE__, (uint64_t)(address), 0, r)
#define load_matrices_transposed(r, address) \
  emulator::meet(emulator::Collective::LDMATRIX_TRANS, __LINE__, (uint64_t)(address), 0, r)
