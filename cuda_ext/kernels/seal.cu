// Packs blocks of keys and values into records, bit for bit as offload/FORMAT.md states the arithmetic.
//
// Every product is __fmul_rn, which no compiler fuses with a sum. 64 threads, a token each, pack K (blockIdx.z 0) or V (1)
// of one KV head of one block; a thread goes through its channels one by one, which bounds it. HEAD_DIM, K_BITS, V_BITS,
// ELEMENT_BYTES, FLOAT16 and where planes begin: K_CODES, K_SCALES, V_CODES, V_SCALES.
#include "block.cuh"
#include "element.cuh"
#include "rotate.cuh"
#include "rounding.cuh"

#if K_BITS <= 8

constexpr int STRIDE = HEAD_DIM + 1;  // of a token's numbers in shared memory
static_assert(SHARED_BYTES == 4 * BLOCK * STRIDE, "variant.py counts the same");

__device__ __forceinline__ u16 scale_of(float x) {
  const u16 scale = bf16_up(x);
  return widen(scale) < INFINITE ? scale : BF16_NAN;
}

__device__ __forceinline__ float code_of(float x, float scale, float least, float most) {
  return scale > 0 ? fminf(fmaxf(rintf(__fdiv_rn(x, scale)), least), most) : 0;
}

// One scale for all channels of a token. Code c goes to codes[c * step].
__device__ __forceinline__ void quantise8(const float* x, signed char* codes, int step, u16* scales) {
  int largest = 0;
  for (int c = 0; c < HEAD_DIM; c++) largest = max(largest, __float_as_int(x[c]) & 0x7fffffff);
  *scales = scale_of(__fdiv_rn(__int_as_float(largest), 127));
  const float scale = widen(*scales);
#pragma unroll 1
  for (int c = 0; c < HEAD_DIM; c++) codes[c * step] = (signed char)code_of(x[c], scale, -127, 127);
}

// A scale and a minimum for each group, at scales[2 * group_step * group]; byte i goes to codes[i * step].
__device__ __forceinline__ void quantise4(const float* x, u8* codes, int step, u16* scales, int group_step) {
  for (int first = 0; first < HEAD_DIM; first += 32) {
    const int half = group_width(first / 32) / 2;
    u16* pair = scales + first / 32 * group_step * 2;
    Bounds bounds;
    for (int c = first; c < first + 2 * half; c++) bounds.add(x[c]);
    pair[1] = bf16_down(bounds.low());
    const float minimum = widen(pair[1]);
    pair[0] = scale_of(__fdiv_rn(bounds.high() - minimum, 15));
    const float scale = widen(pair[0]);
#pragma unroll 1
    for (int c = first; c < first + half; c++) {
      const u8 low = code_of(x[c] - minimum, scale, 0, 15), high = code_of(x[c + half] - minimum, scale, 0, 15);
      codes[(first / 2 + c - first) * step] = low | high << 4;
    }
  }
}

// Each warp rotates half of the tokens.
__device__ __forceinline__ void rotate_tokens(float* x) {
  for (int token = threadIdx.x / WARP; token < BLOCK; token += BLOCK / WARP) rotate_row(x + token * STRIDE, threadIdx.x % WARP);
  __syncthreads();
}

// x: float32 [64, STRIDE] in shared memory.
__device__ __forceinline__ void seal_keys(u8* record, int head, int token, float* x) {
#if K_BITS == 8
  signed char* codes = (signed char*)(record + K_CODES) + head * HEAD_DIM * BLOCK + token;
  quantise8(x + token * STRIDE, codes, BLOCK, (u16*)(record + K_SCALES) + head * BLOCK + token);
#else
  rotate_tokens(x);
  u8* codes = record + K_CODES + head * (HEAD_DIM / 2) * BLOCK + token;
  quantise4(x + token * STRIDE, codes, BLOCK, (u16*)(record + K_SCALES) + (head * GROUPS * BLOCK + token) * 2, BLOCK);
#endif
}

__device__ __forceinline__ void seal_values(u8* record, int head, int token, const float* x) {
  const int row = head * BLOCK + token;
#if V_BITS == 8
  signed char* codes = (signed char*)(record + V_CODES) + row * HEAD_DIM;
  quantise8(x + token * STRIDE, codes, 1, (u16*)(record + V_SCALES) + row);
#else
  u8* codes = record + V_CODES + row * (HEAD_DIM / 2);
  quantise4(x + token * STRIDE, codes, 1, (u16*)(record + V_SCALES) + row * GROUPS * 2, 1);
#endif
}

#endif

// Block i of the call: 64 tokens from firsts[i] on of k and v, elements [KV_HEADS, tokens, HEAD_DIM] with strides in
// elements (channels are adjacent), into the record at byte places[i] of pool. Every byte of it is written.
extern "C" __global__ void __launch_bounds__(64) seal(
    u8* pool, const i64* places, const Element* k, const Element* v, const i64* firsts, i64 head_stride, i64 token_stride) {
  u8* record = pool + places[blockIdx.x];
  const int head = blockIdx.y, token = threadIdx.x;
  const Element* source = (blockIdx.z ? v : k) + head * head_stride + firsts[blockIdx.x] * token_stride;
#if K_BITS > 8
  Element* keys = (Element*)(record + K_CODES) + head * HEAD_DIM * BLOCK + token;
  Element* values = (Element*)(record + V_CODES) + (head * BLOCK + token) * HEAD_DIM;
#pragma unroll 4
  for (int c = 0; c < HEAD_DIM; c++) *(blockIdx.z ? values + c : keys + c * BLOCK) = source[token * token_stride + c];
#else
  SHARED_MEMORY(shared);
  float* x = (float*)shared;
  for (int i = token; i < BLOCK * HEAD_DIM; i += BLOCK)
    x[i / HEAD_DIM * STRIDE + i % HEAD_DIM] = number(source[i / HEAD_DIM * token_stride + i % HEAD_DIM]);
  __syncthreads();
  if (blockIdx.z) seal_values(record, head, token, x);
  else seal_keys(record, head, token, x);
#endif
}
