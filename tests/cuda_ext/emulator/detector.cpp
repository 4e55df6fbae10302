// Device memory with red zones, a shadow cell for every byte, and the hooks that -fsanitize=thread calls.
#include "detector.h"

#include <string.h>
#include <sys/mman.h>

namespace emulator {
namespace {

constexpr size_t HEAP_BYTES = 256 << 20, RED_ZONE = 256, WORD = 4;
constexpr int MAX_ALLOCATIONS = 4096;

struct Allocation {
  size_t start, bytes;
};

// Moments are numbers of one clock, which each block, barrier and warp sync of every launch sets forward. An access is
// noted with the newest moment that its thread is known to follow: the block's `barrier`, or a later sync of its warp.
struct Cell {
  uint32_t written, read;  // when last
  uint32_t lanes;          // of read_warp, which read at the moment `read`
  uint16_t writer;
  uint8_t read_warp;
  bool many_warps : 1, many_blocks : 1;  // that read, since the barrier and in this launch
  bool pending : 1;                      // filled by an async copy
  bool split : 1;                        // of a word: its bytes differ, and have cells of their own
};
static_assert(sizeof(Cell) == 16);

// Most accesses are of whole words, and of those one cell says it all.
struct Shadow {
  Cell *words, *bytes;
};

unsigned char *own_heap, *heap, *shared;
Shadow own_shadow, heap_shadow, shared_shadow;
size_t heap_bytes;
Allocation allocations[MAX_ALLOCATIONS];
int allocated;
size_t heap_used, launch_shared;
uint32_t moment, launch_began, block_began, barrier, syncs[MAX_THREADS / WARP];

template <class T>
T* reserve(size_t count) {
  return (T*)mmap(nullptr, count * sizeof(T), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
}

Shadow reserve_shadow(size_t bytes) { return {reserve<Cell>(bytes / WORD), reserve<Cell>(bytes)}; }

void prepare() {
  if (own_heap) return;
  heap_bytes = HEAP_BYTES;
  heap = own_heap = reserve<unsigned char>(HEAP_BYTES);
  heap_shadow = own_shadow = reserve_shadow(HEAP_BYTES);
  shared = reserve<unsigned char>(MOST_SHARED);
  shared_shadow = reserve_shadow(MOST_SHARED);
}

const char* verb(Access access) { return access == Access::READ ? "read" : "write"; }

void check_bounds(size_t at, size_t bytes, Access access) {
  static int last;
  if (last < allocated && allocations[last].start <= at && at + bytes <= allocations[last].start + allocations[last].bytes) return;
  int low = 0, high = allocated;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (allocations[middle].start <= at) low = middle + 1;
    else high = middle;
  }
  if (low == 0) fail("global %s before all allocations", verb(access));
  const Allocation& a = allocations[last = low - 1];
  if (at + bytes > a.start + a.bytes)
    fail("global %s of %zu bytes out of bounds: at byte %zu of an allocation of %zu", verb(access), bytes, at - a.start, a.bytes);
}

// The running thread, and the newest moment that it follows.
struct Now {
  uint32_t moment, lane;
  uint16_t number;
  uint8_t warp;
};

Now now() {
  const uint32_t sync = syncs[running->warp];
  return {sync > barrier ? sync : barrier, 1u << running->lane, (uint16_t)running->number, (uint8_t)running->warp};
}

bool follows_write(const Cell& cell, const Now& now) {
  return cell.written < barrier || cell.writer == now.number || (cell.writer / WARP == now.warp && cell.written != now.moment);
}

bool follows_reads(const Cell& cell, const Now& now) {
  if (cell.read < barrier) return true;
  if (cell.many_warps || cell.read_warp != now.warp) return false;
  return cell.read != now.moment || !(cell.lanes & ~now.lane);
}

void note_read(Cell& cell, const Now& now) {
  cell.many_blocks = cell.read >= launch_began && (cell.many_blocks || cell.read < block_began);
  cell.many_warps = cell.read >= barrier && (cell.many_warps || cell.read_warp != now.warp);
  cell.lanes = cell.read == now.moment ? cell.lanes | now.lane : now.lane;
  cell.read_warp = now.warp;
  cell.read = now.moment;
}

// Blocks run one after another, but nothing says that they do.
void check_blocks(const Cell& cell, Access access) {
  if (cell.written >= launch_began && cell.written < block_began) fail("global %s of a byte that another block writes", verb(access));
  if (access != Access::READ && cell.read >= launch_began && (cell.many_blocks || cell.read < block_began))
    fail("global write of a byte that another block reads");
}

void touch_cell(Cell& cell, bool global, size_t at, Access access, const Now& now) {
  if (global) check_blocks(cell, access);
  const char* kind = global ? "global" : "shared";
  const bool copy = access == Access::COPY_ISSUED || access == Access::COPY_LANDED;
  if (cell.pending && access != Access::COPY_LANDED) fail("%s %s of byte %zu, which an async copy still fills", kind, verb(access), at);
  if (copy) cell.pending = access == Access::COPY_ISSUED;
  if (!follows_write(cell, now)) fail("%s %s of byte %zu races with a write by thread %d", kind, verb(access), at, cell.writer);
  if (access == Access::READ) return note_read(cell, now);
  if (!follows_reads(cell, now)) fail("%s write of byte %zu races with a read", kind, at);
  cell.written = now.moment;
  cell.writer = now.number;
}

// The bytes of one word from `at` to `stop`.
void touch_word(const Shadow& shadow, bool global, size_t at, size_t stop, Access access, const Now& now) {
  Cell &word = shadow.words[at / WORD], *bytes = shadow.bytes + at / WORD * WORD;
  const bool whole = stop - at == WORD;
  if (whole && !word.split) return touch_cell(word, global, at, access, now);
  for (size_t i = 0; i < WORD && !word.split; i++) bytes[i] = word;
  word.split = true;
  for (; at < stop; at++) touch_cell(shadow.bytes[at], global, at, access, now);
  if (whole && !memcmp(bytes, bytes + 1, (WORD - 1) * sizeof(Cell))) word = bytes[0];
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
  const Shadow& shadow = is_shared ? shared_shadow : heap_shadow;
  const Now here = now();
  for (size_t at = byte - (is_shared ? shared : heap), stop = at + bytes, next; at < stop; at = next) {
    next = at / WORD * WORD + WORD;
    touch_word(shadow, is_global, at, next < stop ? next : stop, access, here);
  }
}

void begin_launch(size_t shared_bytes) {
  prepare();
  launch_shared = shared_bytes;
  launch_began = moment + 1;
}

void begin_block() {
  block_began = barrier = ++moment;
  memset(shared, 0xff, launch_shared);  // NaN in every float format
  memset(shared_shadow.words, 0, (launch_shared + WORD - 1) / WORD * sizeof(Cell));
}

void order_block() { barrier = ++moment; }
void order_warp(int warp) { syncs[warp] = ++moment; }

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
  if (heap != own_heap) {
    munmap(heap_shadow.words, heap_bytes / WORD * sizeof(Cell));
    munmap(heap_shadow.bytes, heap_bytes * sizeof(Cell));
  }
  heap = memory ? memory : own_heap;
  heap_bytes = memory ? bytes : HEAP_BYTES;
  heap_shadow = memory ? reserve_shadow(bytes) : own_shadow;
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
