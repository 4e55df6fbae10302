// The running softmax of ROWS rows (Milakov and Gimelshein 2018): lanes 2r and 2r + 1 keep row r.
#pragma once
#include "products.cuh"

// From products of queries and keys to logits, as powers that 2 is raised to.
struct Scale {
  float factor, softcap;

  __device__ __forceinline__ Scale(float scale, float softcap)
      : factor(softcap == 0 ? scale * LOG2_E : 2 * LOG2_E * scale / softcap), softcap(softcap * LOG2_E) {}

  // softcap * tanh(x / softcap) = softcap * (1 - 2 / (exp(2 x / softcap) + 1))
  template <int Count>
  __device__ __forceinline__ void apply(float (&x)[Count]) const {
#pragma unroll
    for (int i = 0; i < Count; i++) x[i] *= factor;
    if (softcap == 0) return;
#pragma unroll
    for (int i = 0; i < Count; i++) x[i] = softcap * (1 - __fdividef(2, exp2_approximate(x[i]) + 1));
  }
};

struct Softmax {
  float top = -INFINITE, total = 0;  // of this lane's columns

  // Makes weights of this row's logits; bit t of seen says whether it sees token t. Returns what the sums so far
  // shrink by.
  __device__ __forceinline__ float weigh(float* logits, u64 seen, const Scale& scale, int lane) {
    const int part = lane % 2;
    float4* columns = (float4*)(logits + lane / 2 * LOGITS_STRIDE) + part;
    const u64 mine = seen >> token_of(4 * part);
    float x[BLOCK / 2], largest = top;
#pragma unroll
    for (int i = 0; i < BLOCK / 8; i++) *(float4*)(x + 4 * i) = columns[2 * i];
    scale.apply(x);
#pragma unroll
    for (int i = 0; i < BLOCK / 2; i++) {
      if (!(mine >> token_of(i / 4 * 8 + i % 4) & 1)) x[i] = -INFINITE;
      largest = fmaxf(largest, x[i]);
    }
    largest = fmaxf(largest, __shfl_xor_sync(ALL, largest, 1));
    const float centre = largest == -INFINITE ? 0 : largest;  // of a row that has seen nothing yet
    const float fade = exp2_approximate(top - centre);
    total *= fade;
    top = largest;
#pragma unroll
    for (int i = 0; i < BLOCK / 2; i++) {
      x[i] = exp2_approximate(x[i] - centre);
      total += x[i];
    }
#pragma unroll
    for (int i = 0; i < BLOCK / 8; i++) columns[2 * i] = float4{x[4 * i], x[4 * i + 1], x[4 * i + 2], x[4 * i + 3]};
    return fade;
  }

  // Weight 0 times NaN would be NaN in the product of all rows. So what is not finite in a tile that some row does not
  // see whole leaves the values, and rows that see it become NaN. seen: every bit if this lane's row is none.
  __device__ __forceinline__ void guard(u8* values, u64 seen, int lane) {
    if (__all_sync(ALL, seen == ~0ull)) return;
    u64 cleared = 0;
#pragma unroll 1  // or registers spill on sm_100
    for (int half = 0; half < 2; half++)
      cleared |= (u64)__ballot_sync(ALL, clear_unless_finite(values, WARP * half + lane)) << WARP * half;
    if (seen & cleared) total = NOT_A_NUMBER;
    __syncwarp();
  }

  __device__ __forceinline__ float whole() const { return total + __shfl_xor_sync(ALL, total, 1); }
};
