// What has no name in CUDA C++: the only lines that an emulated kernel does not share with the GPU's.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#ifndef SPILLD_EMULATOR

// The block's dynamic shared memory.
#define SHARED_MEMORY(name) extern __shared__ __align__(128) unsigned char name[]

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// 16 bytes, both sides aligned; zeros and no read unless `some`.
__device__ __forceinline__ void copy_async16(void* shared, const void* global, bool some) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(some ? 16 : 0) : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most so many of this thread's newest groups are under way.
template <int GroupsLeft>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(GroupsLeft) : "memory");
}

// What tensor cores take: float16 where the numbers of 16 bits are (numbers.cuh), else bfloat16.
#if FLOAT16
#define PAIRED "f16"
#else
#define PAIRED "bf16"
#endif

// c [16, 8] += a [16, 16] b [16, 8]; fragments as the PTX manual lays them over the lanes.
__device__ __forceinline__ void mma(float* c, const u32* a, const u32* b) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32." PAIRED "." PAIRED ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// Four 8 x 8 matrices of 16 bits; lane 8i + r has the address of row r of matrix i.
__device__ __forceinline__ void load_matrices(u32* r, const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}
__device__ __forceinline__ void load_matrices_transposed(u32* r, const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}

// Two numbers in a word, each the nearest.
__device__ __forceinline__ u32 pack(float low, float high) {
  u32 pair;
  asm("cvt.rn." PAIRED "x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
__device__ __forceinline__ float widen_f16(u16 number) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(number));
  return x;
}
// Exact sums of two bfloat16 in a word, where they are representable.
__device__ __forceinline__ u32 add_bf16x2(u32 a, u32 b) {
  u32 sum;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(0x3f803f80u), "r"(b));
  return sum;
}

// 2^x to two units in the last place; 0 where that is subnormal.
__device__ __forceinline__ float exp2_approximate(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

#endif
