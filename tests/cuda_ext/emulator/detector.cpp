// Device memory with red zones, a shadow cell for every byte, and the hooks that -fsanitize=thread calls.
#include "detector.h"

#include <string.h>
#include <sys/mman.h>

namespace emulator {
namespace {

constexpr size_t HEAP_BYTES = 256 << 20, RED_ZONE = 256;
constexpr int MAX_ALLOCATIONS = 4096;

struct Allocation {
  size_t start, bytes;
};

// `period` numbers the spans between block barriers and is never used twice; `turn` those between warp syncs.
struct Cell {
  uint32_t write_period, write_turn, read_period, read_turn, read_lanes;
  uint32_t writer_block, reader_block;
  uint16_t writer, read_warp;
  bool many_warps, many_blocks, pending;
};

unsigned char *own_heap, *heap, *shared;
Cell *own_cells, *heap_cells, *shared_cells;
size_t heap_bytes;
Allocation allocations[MAX_ALLOCATIONS];
int allocated;
size_t heap_used, launch_shared;
uint32_t period, turns[MAX_THREADS / WARP], serial, first_serial;

template <class T>
T* reserve(size_t count) {
  return (T*)mmap(nullptr, count * sizeof(T), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
}

void prepare() {
  if (own_heap) return;
  heap_bytes = HEAP_BYTES;
  heap = own_heap = reserve<unsigned char>(HEAP_BYTES);
  heap_cells = own_cells = reserve<Cell>(HEAP_BYTES);
  shared = reserve<unsigned char>(MOST_SHARED);
  shared_cells = reserve<Cell>(MOST_SHARED);
}

const char* verb(Access access) { return access == Access::READ ? "read" : "write"; }

void check_bounds(size_t at, size_t bytes, Access access) {
  int low = 0, high = allocated;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (allocations[middle].start <= at) low = middle + 1;
    else high = middle;
  }
  if (low == 0) fail("global %s before all allocations", verb(access));
  const Allocation& a = allocations[low - 1];
  if (at + bytes > a.start + a.bytes)
    fail("global %s of %zu bytes out of bounds: at byte %zu of an allocation of %zu", verb(access), bytes, at - a.start, a.bytes);
}

bool ordered_after_write(const Cell& cell) {
  return cell.write_period != period || cell.writer == running->number ||
         (cell.writer / WARP == running->warp && cell.write_turn != turns[running->warp]);
}

bool ordered_after_reads(const Cell& cell) {
  if (cell.read_period != period) return true;
  if (cell.many_warps || cell.read_warp != running->warp) return false;
  return cell.read_turn != turns[running->warp] || !(cell.read_lanes & ~(1u << running->lane));
}

void note_read(Cell& cell) {
  const uint32_t turn = turns[running->warp], lane = 1u << running->lane;
  if (cell.read_period != period) {
    cell.many_warps = false;
    cell.read_warp = (uint16_t)running->warp;
    cell.read_lanes = 0;
  }
  cell.many_warps |= cell.read_warp != running->warp;
  cell.read_lanes = cell.read_turn == turn && cell.read_period == period ? cell.read_lanes | lane : lane;
  cell.read_period = period;
  cell.read_turn = turn;
}

void check_blocks(Cell& cell, Access access) {
  if (cell.writer_block >= first_serial && cell.writer_block != serial)
    fail("global %s of a byte that another block writes", verb(access));
  if (access == Access::READ) {
    cell.many_blocks = cell.reader_block >= first_serial && (cell.many_blocks || cell.reader_block != serial);
    cell.reader_block = serial;
    return;
  }
  if (cell.reader_block >= first_serial && (cell.many_blocks || cell.reader_block != serial))
    fail("global write of a byte that another block reads");
  cell.writer_block = serial;
}

void touch_cell(Cell& cell, const char* kind, size_t at, Access access) {
  const bool copy = access == Access::COPY_ISSUED || access == Access::COPY_LANDED;
  if (cell.pending && access != Access::COPY_LANDED) fail("%s %s of byte %zu, which an async copy still fills", kind, verb(access), at);
  if (copy) cell.pending = access == Access::COPY_ISSUED;
  if (!ordered_after_write(cell)) fail("%s %s of byte %zu races with a write by thread %d", kind, verb(access), at, cell.writer);
  if (access == Access::READ) return note_read(cell);
  if (!ordered_after_reads(cell)) fail("%s write of byte %zu races with a read", kind, at);
  cell.write_period = period;
  cell.write_turn = turns[running->warp];
  cell.writer = (uint16_t)running->number;
}

}  // namespace

unsigned char* shared_memory() { return shared; }

void touch(const void* address, size_t bytes, size_t align, Access access) {
  if (!running) return;
  auto* byte = (const unsigned char*)address;
  const bool is_shared = byte >= shared - RED_ZONE && byte < shared + MOST_SHARED + RED_ZONE;
  const bool is_global = byte >= heap && byte < heap + heap_bytes;
  if ((uintptr_t)address < 1 << 16) fail("%s through a null pointer", verb(access));
  if (!is_shared && !is_global) return;  // a thread's own variables
  const char* kind = is_shared ? "shared" : "global";
  if ((uintptr_t)address % align) fail("misaligned %s %s of %zu bytes", kind, verb(access), bytes);
  if (is_global) check_bounds(byte - heap, bytes, access);
  else if (byte < shared || byte + bytes > shared + launch_shared) fail("shared %s at byte %td of %zu", verb(access), byte - shared, launch_shared);
  for (size_t i = 0; i < bytes; i++) {
    Cell& cell = is_shared ? shared_cells[byte - shared + i] : heap_cells[byte - heap + i];
    if (is_global) check_blocks(cell, access);
    touch_cell(cell, kind, is_shared ? byte - shared + i : byte - heap + i, access);
  }
}

void begin_launch(size_t shared_bytes) {
  prepare();
  launch_shared = shared_bytes;
  first_serial = serial + 1;
}

void begin_block() {
  serial++;
  period++;
  memset(shared, 0xff, launch_shared);  // NaN in every float format
  for (size_t i = 0; i < launch_shared; i++) shared_cells[i].pending = false;
}

void order_block() { period++; }
void order_warp(int warp) { turns[warp]++; }

}  // namespace emulator

using namespace emulator;

extern "C" {

// Device memory full of NaN. Null when there is no more.
void* emulator_allocate(size_t bytes) {
  prepare();
  const size_t start = (heap_used + RED_ZONE + 255) / 256 * 256;
  if (allocated == MAX_ALLOCATIONS || start + bytes + RED_ZONE > heap_bytes) return nullptr;
  allocations[allocated++] = {start, bytes};
  heap_used = start + bytes;
  memset(heap + start, 0xff, bytes);
  return heap + start;
}

void emulator_free_all() {
  heap_used = 0;
  allocated = 0;
}

// From now on launches work on this memory of the caller's, of which they may touch what is allowed; null: on the
// emulator's own.
void emulator_use(unsigned char* memory, size_t bytes) {
  prepare();
  emulator_free_all();
  if (heap != own_heap) munmap(heap_cells, heap_bytes * sizeof(Cell));
  heap = memory ? memory : own_heap;
  heap_bytes = memory ? bytes : HEAP_BYTES;
  heap_cells = memory ? reserve<Cell>(bytes) : own_cells;
}

// Ranges come in ascending order. False when there are too many.
bool emulator_allow(unsigned char* start, size_t bytes) {
  if (allocated == MAX_ALLOCATIONS) return false;
  allocations[allocated++] = {(size_t)(start - heap), bytes};
  return true;
}

#define HOOKS(N)                                                                              \
  void __tsan_read##N(void* p) { touch(p, N, N, Access::READ); }                              \
  void __tsan_write##N(void* p) { touch(p, N, N, Access::WRITE); }                            \
  void __tsan_unaligned_read##N(void* p) { touch(p, N, 1, Access::READ); }                    \
  void __tsan_unaligned_write##N(void* p) { touch(p, N, 1, Access::WRITE); }
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)
void* __tsan_memset(void* p, int value, size_t bytes) {
  touch(p, bytes, 1, Access::WRITE);
  return memset(p, value, bytes);
}
void* __tsan_memcpy(void* to, const void* from, size_t bytes) {
  touch(from, bytes, 1, Access::READ);
  touch(to, bytes, 1, Access::WRITE);
  return memcpy(to, from, bytes);
}
void* __tsan_memmove(void* to, const void* from, size_t bytes) {
  touch(from, bytes, 1, Access::READ);
  touch(to, bytes, 1, Access::WRITE);
  return memmove(to, from, bytes);
}
void __ubsan_handle_out_of_bounds(void*, void* index) { fail("index %td outside of an array", (ptrdiff_t)index); }
void __ubsan_handle_shift_out_of_bounds(void*, void*, void* bits) { fail("a shift by %td bits", (ptrdiff_t)bits); }
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
}
