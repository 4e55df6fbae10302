// Packs blocks of keys and values into records, bit for bit as offload/FORMAT.md states the arithmetic.
//
// Every product is __fmul_rn, which no compiler fuses with a sum. 64 threads, a token each, pack K (blockIdx.z 0) or V (1)
// of one KV head of one block; the order of the norm's sum makes a thread go through its channels one by one, which
// bounds it. HEAD_DIM, K_BITS, V_BITS, ELEMENT_BYTES, FLOAT16, KV_HEADS and where planes begin: K_CODES, K_SCALES,
// V_CODES, V_SCALES, NORMS, SUMMARY, RADIUS, RECORD_BYTES.
#include "block.cuh"
#include "element.cuh"
#include "rotate.cuh"
#include "rounding.cuh"

constexpr int STRIDE = HEAD_DIM + 1;  // of a token's numbers in shared memory
static_assert(SHARED_BYTES == 4 * (BLOCK * STRIDE + HEAD_DIM + 2), "variant.py counts the same");

// |r|, never below the true one.
struct Norm {
  float total = 0x1p-142f;

  __device__ __forceinline__ void add(float r) { total = total + __fmul_rn(r, r); }
  __device__ __forceinline__ float value() const { return __fmul_rn(__fsqrt_rn(total), 1 + 0x1p-14f); }
};

__device__ __forceinline__ u16 scale_of(float x) {
  const u16 scale = bf16_up(x);
  return widen(scale) < INFINITE ? scale : BF16_NAN;
}

__device__ __forceinline__ float code_of(float x, float scale, float least, float most) {
  return scale > 0 ? fminf(fmaxf(rintf(__fdiv_rn(x, scale)), least), most) : 0;
}

// One scale for all channels of a token. Code c goes to codes[c * step]. Returns the norm of the residual.
__device__ __forceinline__ float quantise8(const float* x, signed char* codes, int step, u16* scales) {
  int largest = 0;
  for (int c = 0; c < HEAD_DIM; c++) largest = max(largest, __float_as_int(x[c]) & 0x7fffffff);
  *scales = scale_of(__fdiv_rn(__int_as_float(largest), 127));
  const float scale = widen(*scales);
  Norm residual;
#pragma unroll 1
  for (int c = 0; c < HEAD_DIM; c++) {
    const float code = code_of(x[c], scale, -127, 127);
    codes[c * step] = (signed char)code;
    residual.add(x[c] - __fmul_rn(code, scale));
  }
  return residual.value();
}

// A scale and a minimum for each group, at scales[2 * group_step * group]; byte i goes to codes[i * step]. x becomes what
// a reader has. Returns the norm of the difference.
__device__ __forceinline__ float quantise4(float* x, u8* codes, int step, u16* scales, int group_step) {
  Norm residual;
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
    for (int c = first; c < first + 2 * half; c++) {
      const float code = code_of(x[c] - minimum, scale, 0, 15), value = __fmul_rn(code, scale) + minimum;
      u8* byte = codes + (first / 2 + c % half) * step;
      *byte = c < first + half ? (u8)code : *byte | (u8)code << 4;
      residual.add(x[c] - value);
      x[c] = value;
    }
  }
  return residual.value();
}

// Each warp rotates half of the tokens.
__device__ __forceinline__ void rotate_tokens(float* x) {
  __syncthreads();
  for (int token = threadIdx.x / WARP; token < BLOCK; token += BLOCK / WARP) rotate_row(x + token * STRIDE, threadIdx.x % WARP);
  __syncthreads();
}

// Sum number i of `Count` that the fixed tree of halves still adds up: of 64 the tokens themselves, of 1 the whole.
template <int Count>
__device__ __forceinline__ float tree(const float* x, int i) {
  if constexpr (Count == BLOCK) return x[i * STRIDE];
  else return tree<2 * Count>(x, i) + tree<2 * Count>(x, i + Count);
}

__device__ __forceinline__ float mean_of_tokens(const float* x, int channel) {
  return __fmul_rn(tree<1>(x + channel, 0), 1.0f / BLOCK);
}

// A token's norm against a centre.
__device__ __forceinline__ float distance(const float* x, const float* centre) {
  Norm norm;
#pragma unroll 4
  for (int c = 0; c < HEAD_DIM; c++) norm.add(x[c] - centre[c]);
  return norm.value();
}

__device__ __forceinline__ float norm_of(const float* x) {
  Norm norm;
#pragma unroll 4
  for (int c = 0; c < HEAD_DIM; c++) norm.add(x[c]);
  return norm.value();
}

struct Place {
  u8* record;
  int head, token;

  __device__ __forceinline__ u16* summary(int which) const { return (u16*)(record + SUMMARY) + (which * KV_HEADS + head) * HEAD_DIM; }
  __device__ __forceinline__ u16* norm(int which) const { return (u16*)(record + NORMS) + (which * KV_HEADS + head) * BLOCK + token; }
};

__device__ __forceinline__ void seal_keys(const Place& to, float* x, const Element* source, i64 token_stride) {
  for (int c = to.token; c < HEAD_DIM; c += BLOCK) {
    Bounds bounds;
    for (int token = 0; token < BLOCK; token++) bounds.add(x[token * STRIDE + c]);
    to.summary(0)[c] = bf16_down(bounds.low());
    to.summary(1)[c] = bf16_up(bounds.high());
    to.summary(2)[c] = bf16_nearest(mean_of_tokens(x, c));
  }
  const float* own = x + to.token * STRIDE;
#if K_BITS > 8
  Element* codes = (Element*)(to.record + K_CODES) + to.head * HEAD_DIM * BLOCK + to.token;
#pragma unroll 4
  for (int c = 0; c < HEAD_DIM; c++) codes[c * BLOCK] = source[to.token * token_stride + c];
  *to.norm(0) = 0;
#elif K_BITS == 8
  signed char* codes = (signed char*)(to.record + K_CODES) + to.head * HEAD_DIM * BLOCK + to.token;
  *to.norm(0) = bf16_up(quantise8(own, codes, BLOCK, (u16*)(to.record + K_SCALES) + to.head * BLOCK + to.token));
#else
  rotate_tokens(x);
  u8* codes = to.record + K_CODES + to.head * (HEAD_DIM / 2) * BLOCK + to.token;
  u16* scales = (u16*)(to.record + K_SCALES) + (to.head * GROUPS * BLOCK + to.token) * 2;
  quantise4(x + to.token * STRIDE, codes, BLOCK, scales, BLOCK);
  rotate_tokens(x);
  Norm residual;
#pragma unroll 4
  for (int c = 0; c < HEAD_DIM; c++) residual.add(number(source[to.token * token_stride + c]) - own[c]);
  *to.norm(0) = bf16_up(residual.value());
#endif
}

// shared: centre [HEAD_DIM], then a number of each warp.
__device__ __forceinline__ void seal_values(const Place& to, float* x, const Element* source, i64 token_stride, float* shared) {
  float *own = x + to.token * STRIDE, *centre = shared, *largest = shared + HEAD_DIM;
  for (int c = to.token; c < HEAD_DIM; c += BLOCK) {
    const u16 mean = bf16_nearest(mean_of_tokens(x, c));
    to.summary(3)[c] = mean;
    centre[c] = widen(mean);
  }
  __syncthreads();
  *to.norm(2) = bf16_up(norm_of(own));
  int radius = __float_as_int(distance(own, centre)) & 0x7fffffff;
  radius = __reduce_max_sync(ALL, radius);
  if (to.token % WARP == 0) largest[to.token / WARP] = __int_as_float(radius);
  __syncthreads();
  if (to.token == 0) {
    radius = max(__float_as_int(largest[0]), __float_as_int(largest[1]));
    const float x = __int_as_float(radius);
    ((float*)(to.record + RADIUS))[to.head] = x == x ? x : NOT_A_NUMBER;
  }
#if V_BITS > 8
  Element* codes = (Element*)(to.record + V_CODES) + (to.head * BLOCK + to.token) * HEAD_DIM;
#pragma unroll 4
  for (int c = 0; c < HEAD_DIM; c++) codes[c] = source[to.token * token_stride + c];
  *to.norm(1) = 0;
#elif V_BITS == 8
  signed char* codes = (signed char*)(to.record + V_CODES) + (to.head * BLOCK + to.token) * HEAD_DIM;
  *to.norm(1) = bf16_up(quantise8(own, codes, 1, (u16*)(to.record + V_SCALES) + to.head * BLOCK + to.token));
#else
  u8* codes = to.record + V_CODES + (to.head * BLOCK + to.token) * HEAD_DIM / 2;
  u16* scales = (u16*)(to.record + V_SCALES) + (to.head * BLOCK + to.token) * GROUPS * 2;
  *to.norm(1) = bf16_up(quantise4(own, codes, 1, scales, 1));
#endif
}

// Block i of the call: 64 tokens from firsts[i] on of k and v, elements [KV_HEADS, tokens, HEAD_DIM] with strides in
// elements (channels are adjacent), into the record at byte places[i] of pool. Every byte of it is written.
extern "C" __global__ void __launch_bounds__(64) seal(
    u8* pool, const i64* places, const Element* k, const Element* v, const i64* firsts, i64 head_stride, i64 token_stride) {
  SHARED_MEMORY(shared);
  float* x = (float*)shared;
  const Place to = {pool + places[blockIdx.x], (int)blockIdx.y, (int)threadIdx.x};
  const Element* source = (blockIdx.z ? v : k) + to.head * head_stride + firsts[blockIdx.x] * token_stride;
  for (int i = to.token; i < BLOCK * HEAD_DIM; i += BLOCK)
    x[i / HEAD_DIM * STRIDE + i % HEAD_DIM] = number(source[i / HEAD_DIM * token_stride + i % HEAD_DIM]);
  __syncthreads();
  if (blockIdx.z) return seal_values(to, x, source, token_stride, x + BLOCK * STRIDE);
  seal_keys(to, x, source, token_stride);
  const int padding = RADIUS + 4 * KV_HEADS + to.token;  // only the last plane has any, less than 64 bytes
  if (blockIdx.y == 0 && padding < RECORD_BYTES) to.record[padding] = 0;
}
