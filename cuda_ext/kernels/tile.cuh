// Keys and values of one KV head and 64 tokens in shared memory, as a record or a window has them.
//
// HEAD_DIM; K_BITS, V_BITS: 32 (float32), 16 (bfloat16, or float16 if FLOAT16), 8 or 4 (codes, as offload/FORMAT.md has them);
// KEYS_BY_TOKEN: rows of keys are tokens (a window), not channels (a record).
#pragma once
#include "block.cuh"

// Rows of codes, then scales. Rows are 16 bytes apart, so that the lanes of a fragment read from different banks;
// rows that are no whole vectors are copied as one.
template <int Rows, int RowBytes, int ScaleBytes>
struct Plane {
  static constexpr bool SPACED = RowBytes % 16 == 0;
  static constexpr int ROWS = Rows, STRIDE = SPACED ? RowBytes + 16 : RowBytes;
  static constexpr int VECTORS = Rows * RowBytes / 16, ROW_VECTORS = RowBytes / 16;
  static constexpr int SCALES = Rows * STRIDE, SCALE_VECTORS = ScaleBytes / 16, BYTES = SCALES + ScaleBytes;
};

__device__ constexpr int plane_scales(int bits) { return bits > 8 ? 0 : bits == 8 ? 2 * BLOCK : 4 * BLOCK * GROUPS; }

using Values = Plane<BLOCK, HEAD_DIM * V_BITS / 8, plane_scales(V_BITS)>;
#if KEYS_BY_TOKEN
using Keys = Plane<BLOCK, HEAD_DIM * K_BITS / 8, 0>;
#else
using Keys = Plane<K_BITS == 4 ? HEAD_DIM / 2 : HEAD_DIM, K_BITS == 4 ? BLOCK : BLOCK * K_BITS / 8, plane_scales(K_BITS)>;
#endif

// A lane reads the codes of four neighbouring tokens at once, and they become its columns in four products. So
// the column of a token in the logits is not its number, and its values' row is that column.
constexpr bool REORDERED = K_BITS <= 8;
__device__ __forceinline__ int column_of(int token) {
  return REORDERED ? (token & 32) | (token & 3) << 3 | (token >> 2 & 7) : token;
}
__device__ __forceinline__ int token_of(int column) {
  return REORDERED ? (column & 32) | (column & 7) << 2 | (column >> 3 & 3) : column;
}
__device__ __forceinline__ int value_row(int column) {
  return (Values::SPACED ? column : token_of(column)) * Values::STRIDE;
}

// The channel that a column (0..7) of a product with values is; likewise, it is 8 * tile + column only for exact numbers.
__device__ __forceinline__ int channel_of(int tile, int column) {
  const int group = tile / 4, i = tile % 4;
  const bool wide = group_width(group) == 32;
  if (V_BITS > 8) return 8 * tile + column;
  if (V_BITS == 8) return 32 * group + (wide ? 4 : 2) * column + i;
  return 32 * group + (wide ? 16 * (i / 2) + 2 * column + i % 2 : 8 * i + column);
}

// Starts the copy of a plane: codes and scales in global memory, of `rows` rows; the others become zero.
template <class P, bool Reorder>
__device__ __forceinline__ void copy_plane(u8* shared, const u8* codes, const u8* scales, int rows, int lane) {
  for (int i = lane; i < P::VECTORS; i += WARP) {
    const int row = P::SPACED ? i / P::ROW_VECTORS : 0;
    const int to = P::SPACED ? (Reorder ? column_of(row) : row) * P::STRIDE + i % P::ROW_VECTORS * 16 : i * 16;
    copy_async16(shared + to, codes + i * 16, row < rows);
  }
  for (int i = lane; i < P::SCALE_VECTORS; i += WARP) copy_async16(shared + P::SCALES + i * 16, scales + i * 16, true);
}

// What of values can be infinite or NaN: exact numbers, or scales and minima, by two; of int8 a scale.
#if V_BITS == 8
typedef u16 Fallible;
#else
typedef u32 Fallible;
#endif

__device__ __forceinline__ bool finite(Fallible x) { return (x & EXPONENT) != EXPONENT && (x >> 16 & EXPONENT) != EXPONENT; }

// Clears the values of a token if one is infinite or NaN; whether it did.
__device__ __forceinline__ bool clear_unless_finite(u8* values, int token) {
  constexpr int COUNT = V_BITS == 16 ? HEAD_DIM / 2 : V_BITS == 4 ? GROUPS : 1;
  Fallible* const numbers = (Fallible*)(values + (V_BITS == 16 ? value_row(token) : Values::SCALES + token * COUNT * (int)sizeof(Fallible)));
  bool every = true;
  for (int i = 0; i < COUNT; i++) every &= finite(numbers[i]);
  if (every) return false;
  for (int i = 0; i < COUNT; i++) numbers[i] = 0;
  return true;
}
