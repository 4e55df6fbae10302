// Attention of M queries over records where they lie: partial sums, split over the blocks.
//
// A warp is a block of the grid (parts, KV_HEADS, ceil(M * group / 16)). It reads each plane of its records once, with
// async copies of 16 bytes, so that bytes = blocks seen * (codes + scales of K and V); DRAM bounds it where the
// instructions that turn codes into numbers do not.
// Offsets in a record (bytes): K_CODES, K_SCALES, V_CODES, V_SCALES; KV_HEADS.
#define KEYS_BY_TOKEN 0
#include "attention.cuh"

// Blocks [first, last) of a call; what this lane's row, lane / 2, sees of them.
struct Records {
  const u8* pool;
  const i64 *places, *positions;
  i64 low, high;
  int head, first, last;

  __device__ __forceinline__ u64 seen(int block) const {
    const i64 position = positions[block];
    const int begin = (int)min(max(low - position, 0ll), (i64)BLOCK), end = (int)min(max(high - position, 0ll), (i64)BLOCK);
    return begin < end ? ~0ull >> (BLOCK - (end - begin)) << begin : 0;
  }

  // The first block from `block` on that some row sees.
  __device__ __forceinline__ int next(int block) const {
    while (block < last && !__any_sync(ALL, seen(block) != 0)) block++;
    return block;
  }

  __device__ __forceinline__ void copy_keys(u8* plane, int block, int lane) const {
    constexpr int CODES = Keys::VECTORS * 16, SCALES = Keys::SCALE_VECTORS * 16;
    const u8* record = pool + places[block];
    copy_plane<Keys, false>(plane, record + K_CODES + head * CODES, record + K_SCALES + head * SCALES, Keys::ROWS, lane);
  }

  __device__ __forceinline__ void copy_values(u8* plane, int block, int lane) const {
    constexpr int CODES = Values::VECTORS * 16, SCALES = Values::SCALE_VECTORS * 16;
    const u8* record = pool + places[block];
    copy_plane<Values, true>(plane, record + V_CODES + head * CODES, record + V_SCALES + head * SCALES, Values::ROWS, lane);
  }
};

// out: float32 [parts, KV_HEADS, M * group, HEAD_DIM], lse: float32 [parts, KV_HEADS, M * group].
// q: float32 [M, KV_HEADS * group, HEAD_DIM], rotated if keys have four bits, within +-65504 if they are float16.
// places: byte offsets of the records in pool, multiples of 64; positions: their first tokens; both int64 [blocks], in
// any order. Query m sees position t iff low[m] <= t < high[m]; int64 [M]. Where nothing is seen, out = 0 and lse = -inf.
extern "C" __global__ void __launch_bounds__(32) attend_records(
    float* out, float* lse, const float* q, const u8* pool, const i64* places, const i64* positions, const i64* low,
    const i64* high, int blocks, int blocks_per_part, int queries, int group, float scale, float softcap) {
  SHARED_MEMORY(shared);
  const int lane = threadIdx.x, head = blockIdx.y, rows = queries * group, first_row = blockIdx.z * ROWS;
  const int row = first_row + lane / 2, rows_here = min(ROWS, rows - first_row), first = blockIdx.x * blocks_per_part;
  Records source = {pool, places, positions, 0, 0, head, first, min(blocks, first + blocks_per_part)};
  if (row < rows) {
    source.low = low[row / group];
    source.high = high[row / group];
  }
  const Queries tile = {shared};
  tile.load(q, first_row, rows, head, KV_HEADS, group, lane);
  const i64 at = ((i64)blockIdx.x * KV_HEADS + head) * rows + first_row;
  attend(source, tile, Scale(scale, softcap), rows_here, out + at * HEAD_DIM, lse + at, lane);
}
