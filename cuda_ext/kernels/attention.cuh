// One warp attends from up to 16 query rows of a KV head over some tiles of 64 tokens.
//
// A source says which tiles there are and what a row sees of each, and copies planes of keys and values to shared
// memory, STAGES planes ahead of their use. Tensor cores serve even a single row: what bounds a tile is its
// bytes and turning codes into numbers, which is the same work for 1 row and for 16.
#pragma once
#include "output.cuh"

constexpr int PLANE_BYTES = Keys::BYTES > Values::BYTES ? Keys::BYTES : Values::BYTES;
constexpr int LOGITS_BYTES = 4 * ROWS * LOGITS_STRIDE;
static_assert(SHARED_BYTES == Queries::BYTES + LOGITS_BYTES + STAGES * PLANE_BYTES, "variant.py counts the same");

// Planes of shared memory in a ring: keys of a tile, its values, keys of the next tile that some row sees.
template <class Source>
struct Ring {
  const Source& source;
  u8* memory;
  int lane, tile, issued = 0, taken = 0;
  bool values = false;

  __device__ __forceinline__ Ring(const Source& source, u8* memory, int lane)
      : source(source), memory(memory), lane(lane), tile(source.next(source.first)) {
    for (int i = 0; i < STAGES - 1; i++) issue();
  }

  // The next plane, landed. The one taken before may be overwritten from now on: all lanes must be done with it.
  __device__ __forceinline__ u8* take() {
    issue();
    wait_copies<STAGES - 1>();
    __syncwarp();
    return memory + taken++ % STAGES * PLANE_BYTES;
  }

 private:
  __device__ __forceinline__ void issue() {
    u8* plane = memory + issued++ % STAGES * PLANE_BYTES;
    if (tile < source.last) {
      if (values) source.copy_values(plane, tile, lane);
      else source.copy_keys(plane, tile, lane);
      if (values) tile = source.next(tile + 1);
      values = !values;
    }
    commit_copies();
  }
};

// out: float32 [rows, HEAD_DIM], lse: float32 [rows], of this part and KV head; both at row first_row.
template <class Source>
__device__ __forceinline__ void attend(const Source& source, const Queries& queries, const Scale& scale, int rows_here, float* out, float* lse, int lane) {
  float* logits = (float*)(queries.memory + Queries::BYTES);
  Ring<Source> ring(source, (u8*)logits + LOGITS_BYTES, lane);
  Softmax softmax;
  Output output;
  for (int tile = source.next(source.first); tile < source.last; tile = source.next(tile + 1)) {
    multiply(logits, queries, ring.take(), lane);
    __syncwarp();
    const u64 seen = source.seen(tile);
    output.shrink(softmax.weigh(logits, seen, scale, lane), lane);
    u8* values = ring.take();
    if constexpr (TENSOR_CORES) {
      softmax.guard(values, lane / 2 < rows_here ? seen : ~0ull, lane);
    }
    output.add(logits, values, seen, lane);
    __syncwarp();
  }
  const float total = softmax.whole();
  output.finish(total, lane);
  if (lane % 2 == 0 && lane / 2 < rows_here) lse[lane / 2] = softmax.top * LN_2 + logf(total);
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int row = lane / 4 + 8 * half;
    if (row >= rows_here) continue;
#pragma unroll
    for (int tile = 0; tile < HEAD_DIM / 8; tile++)
      for (int i = 0; i < 2; i++)
        out[row * HEAD_DIM + channel_of(tile, lane % 4 * 2 + i)] = output.sum[tile][2 * half + i];
  }
}
