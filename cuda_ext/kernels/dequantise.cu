// Unpacks records into keys and values, token by token, for attention that takes these. int4's keys stay rotated.
//
// A thread has 16 channels of a token, so that it writes whole sectors; of a record's keys, which lie channel by channel,
// neighbouring threads read neighbouring tokens. Memory bounds it. HEAD_DIM, KV_HEADS, K_BITS, V_BITS, ELEMENT_BYTES,
// FLOAT16 and where planes begin: K_CODES, K_SCALES, V_CODES, V_SCALES.
#include "block.cuh"
#include "element.cuh"

constexpr int CHANNELS = 16, UNITS = HEAD_DIM / CHANNELS;  // of a token
constexpr int VECTOR = 16 / ELEMENT_BYTES;                 // channels that are written at a time

// Channels of a token, from some on, `step` apart.
struct Exact {
  const Element* numbers;
  int step;

  __device__ __forceinline__ float operator[](int i) const { return number(numbers[i * step]); }
};

struct Codes8 {
  const signed char* codes;
  int step;
  float scale;

  __device__ __forceinline__ float operator[](int i) const { return __fmul_rn((float)codes[i * step], scale); }
};

// Codes, scale and minimum of a group, of which a byte has channel i of both halves; `first`: within it.
struct Codes4 {
  const u8* codes;
  int step, first, half;
  float scale, minimum;

  __device__ __forceinline__ Codes4(const u8* codes, int step, const u16* scales, int channel)
      : codes(codes), step(step), first(channel % 32), half(group_width(channel / 32) / 2), scale(widen(scales[0])), minimum(widen(scales[1])) {}

  __device__ __forceinline__ float operator[](int i) const {
    const u8 byte = codes[(first + i) % half * step];
    return __fmul_rn((float)(first + i < half ? byte & 15 : byte >> 4), scale) + minimum;
  }
};

__device__ __forceinline__ auto keys_of(const u8* record, int head, int token, int first) {
#if K_BITS > 8
  return Exact{(const Element*)(record + K_CODES) + (head * HEAD_DIM + first) * BLOCK + token, BLOCK};
#elif K_BITS == 8
  const float scale = widen(((const u16*)(record + K_SCALES))[head * BLOCK + token]);
  return Codes8{(const signed char*)(record + K_CODES) + (head * HEAD_DIM + first) * BLOCK + token, BLOCK, scale};
#else
  const u8* codes = record + K_CODES + (head * (HEAD_DIM / 2) + first / 32 * 16) * BLOCK + token;
  return Codes4(codes, BLOCK, (const u16*)(record + K_SCALES) + ((head * GROUPS + first / 32) * BLOCK + token) * 2, first);
#endif
}

__device__ __forceinline__ auto values_of(const u8* record, int head, int token, int first) {
  const int row = head * BLOCK + token;
#if V_BITS > 8
  return Exact{(const Element*)(record + V_CODES) + row * HEAD_DIM + first, 1};
#elif V_BITS == 8
  return Codes8{(const signed char*)(record + V_CODES) + row * HEAD_DIM + first, 1, widen(((const u16*)(record + V_SCALES))[row])};
#else
  const u8* codes = record + V_CODES + row * (HEAD_DIM / 2) + first / 32 * 16;
  return Codes4(codes, 1, (const u16*)(record + V_SCALES) + (row * GROUPS + first / 32) * 2, first);
#endif
}

// Each channel becomes the nearest number of the compute dtype, ties to even.
template <class Channels>
__device__ __forceinline__ void store(Element* to, const Channels& x) {
#pragma unroll
  for (int part = 0; part < CHANNELS / VECTOR; part++) {
    const int i = part * VECTOR;
#if ELEMENT_BYTES == 4
    *(float4*)(to + i) = float4{x[i], x[i + 1], x[i + 2], x[i + 3]};
#else
    *(uint4*)(to + i) = uint4{pack(x[i], x[i + 1]), pack(x[i + 2], x[i + 3]), pack(x[i + 4], x[i + 5]), pack(x[i + 6], x[i + 7])};
#endif
  }
}

// keys, values: [KV_HEADS, records * 64, HEAD_DIM]. places: int64 byte offsets in pool, multiples of 64. A block of the
// grid (records, KV_HEADS, 2) has the keys (blockIdx.z 0) or the values (1) of a head of a record.
extern "C" __global__ void __launch_bounds__(128) dequantise(Element* keys, Element* values, const u8* pool, const i64* places) {
  const u8* record = pool + places[blockIdx.x];
  const int head = blockIdx.y;
  const i64 at = ((i64)head * gridDim.x + blockIdx.x) * BLOCK * HEAD_DIM;
  for (int i = threadIdx.x; i < BLOCK * UNITS; i += blockDim.x) {
    if (blockIdx.z) {
      const int token = i / UNITS, first = i % UNITS * CHANNELS;
      store(values + at + token * HEAD_DIM + first, values_of(record, head, token, first));
    } else {
      const int token = i % BLOCK, first = i / BLOCK * CHANNELS;
      store(keys + at + token * HEAD_DIM + first, keys_of(record, head, token, first));
    }
  }
}
