// Attention of M queries over slots of a window, exact numbers by token: partial sums, split over tiles of 64 slots.
//
// A warp is a block of the grid (parts, kv_heads, ceil(M * group / 16)); it reads the keys and values of each tile that
// a row sees once, with async copies of 16 bytes. A window is small: launches bound it before bytes do.
#define KEYS_BY_TOKEN 1
#include "attention.cuh"

// Tiles [first, last) of a call; what this lane's row, lane / 2, sees of them.
struct Window {
  const u8 *keys, *values;  // of this KV head: [slots, HEAD_DIM]
  const i64* ranges;        // of this row
  int ranges_here, slots, first, last;

  __device__ __forceinline__ u64 seen(int tile) const {
    u64 bits = 0;
    for (int i = 0; i < ranges_here; i++) {
      const i64 slot = (i64)tile * BLOCK, start = ranges[2 * i] - slot, stop = ranges[2 * i + 1] - slot;
      const int begin = (int)min(max(start, 0ll), (i64)BLOCK), end = (int)min(max(stop, 0ll), (i64)BLOCK);
      if (begin < end) bits |= ~0ull >> (BLOCK - (end - begin)) << begin;
    }
    return bits;
  }

  // The first tile from `tile` on that some row sees.
  __device__ __forceinline__ int next(int tile) const {
    while (tile < last && !__any_sync(ALL, seen(tile) != 0)) tile++;
    return tile;
  }

  __device__ __forceinline__ void copy_keys(u8* plane, int tile, int lane) const {
    copy_plane<Keys, false>(plane, keys + (i64)tile * Keys::VECTORS * 16, nullptr, slots - tile * BLOCK, lane);
  }

  __device__ __forceinline__ void copy_values(u8* plane, int tile, int lane) const {
    copy_plane<Values, false>(plane, values + (i64)tile * Values::VECTORS * 16, nullptr, slots - tile * BLOCK, lane);
  }
};

// out: float32 [parts, kv_heads, M * group, HEAD_DIM], lse: float32 [parts, kv_heads, M * group].
// q: float32 [M, kv_heads * group, HEAD_DIM], within +-65504 if planes are float16. planes: [2, kv_heads, slots, HEAD_DIM],
// float32, bfloat16 or float16. ranges: int64 [M, ranges_each, 2], the slots [start, stop) that each query sees; an
// empty one counts nothing, none leaves the window. Where nothing is seen, out = 0 and lse = -inf.
extern "C" __global__ void __launch_bounds__(32) attend_window(
    float* out, float* lse, const float* q, const u8* planes, const i64* ranges, int ranges_each, int slots,
    int tiles_per_part, int queries, int group, float scale, float softcap) {
  SHARED_MEMORY(shared);
  constexpr int TOKEN_BYTES = HEAD_DIM * K_BITS / 8;
  const int lane = threadIdx.x, head = blockIdx.y, kv_heads = gridDim.y, rows = queries * group;
  const int first_row = blockIdx.z * ROWS, row = first_row + lane / 2, rows_here = min(ROWS, rows - first_row);
  const int first = blockIdx.x * tiles_per_part, tiles = (slots + BLOCK - 1) / BLOCK;
  const u8* keys = planes + (i64)head * slots * TOKEN_BYTES;
  Window source = {keys, keys + (i64)kv_heads * slots * TOKEN_BYTES, ranges, 0, slots, first, min(tiles, first + tiles_per_part)};
  if (row < rows) {
    source.ranges += (i64)(row / group) * ranges_each * 2;
    source.ranges_here = ranges_each;
  }
  const Queries tile = {shared};
  tile.load(q, first_row, rows, head, kv_heads, group, lane);
  const i64 at = ((i64)blockIdx.x * kv_heads + head) * rows + first_row;
  attend(source, tile, Scale(scale, softcap), rows_here, out + at * HEAD_DIM, lse + at, lane);
}
