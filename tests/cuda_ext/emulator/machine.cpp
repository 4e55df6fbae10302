// Runs a kernel on the CPU: one fiber a thread, one block at a time, in an order that a seed decides.
#include "machine.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

#include "detector.h"
#include "half.h"

#ifndef __x86_64__
#error "fibers are switched in x86-64 assembly"
#endif

namespace emulator {
namespace {

constexpr size_t STACK = 128 << 10;
constexpr int MAX_COPIES = 1024;

enum class State { READY, AT_BARRIER, AT_MEETING, DONE };

struct Copy {
  void* to;
  const void* from;
  int bytes, source_bytes, group;
  bool landed;
};

struct Fiber : Thread {
  State state;
  int line;
  Collective kind;
  uint64_t value, result;
  unsigned source;
  uint32_t* registers;
  void* stack;
  int copies, groups;
  Copy copy[MAX_COPIES];
};

enum Landing { EAGER, LATE, RANDOM };

Fiber* fibers;
unsigned char* stacks;
void* scheduler;
void (*kernel)(void**);
void** kernel_arguments;
int threads, ready[MAX_THREADS], ready_count;
uint64_t seed, copied_bytes;
Landing landing;
bool failed;
char message[512];

extern "C" void emulator_switch(void** from, void* to);
asm(R"(.text
.type emulator_switch,@function
emulator_switch:
  push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15
  mov %rsp, (%rdi); mov %rsi, %rsp
  pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp; ret
)");

Fiber* self() { return (Fiber*)running; }

uint64_t draw() {
  seed ^= seed << 13, seed ^= seed >> 7, seed ^= seed << 17;
  return seed;
}

// Keeps the first thing that is wrong.
void report(const char* format, va_list arguments) {
  if (failed) return;
  const int n = snprintf(message, sizeof message, "block (%u, %u, %u) thread %d: ", block.x, block.y, block.z, running ? running->number : 0);
  vsnprintf(message + n, sizeof message - n, format, arguments);
  failed = true;
}

void rest() { emulator_switch(&self()->stack, scheduler); }

void resume(Fiber* fiber) {
  running = fiber;
  emulator_switch(&scheduler, fiber->stack);
  running = nullptr;
}

void body() {
  kernel(kernel_arguments);
  if (self()->copies) fail("a thread exits before its async copies have landed");
  self()->state = State::DONE;
  rest();
}

void make_fiber(Fiber& fiber, int number) {
  const unsigned n = number, width = block_size.x, height = block_size.y;
  fiber.index = {n % width, n / width % height, n / (width * height)};
  fiber.number = number, fiber.lane = number % WARP, fiber.warp = number / WARP;
  fiber.copies = fiber.groups = 0;
  void** top = (void**)(stacks + STACK * (number + 1) - 64);
  *top = (void*)body;
  fiber.stack = top - 6;  // below the registers that a switch restores
  fiber.state = State::READY;
  ready[ready_count++] = number;
}

float bf16_of(uint32_t word, int upper) { return of_bits(upper ? word & 0xffff0000 : word << 16); }
float f16_of(uint32_t word, int upper) { return widen_half(upper ? word >> 16 : word & 0xffff); }

// mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 and its like, fragments as in the PTX manual.
void multiply(Fiber* warp, float (*half_of)(uint32_t word, int upper)) {
  float a[16][16], b[16][8], c[16][8];
  for (int lane = 0; lane < WARP; lane++) {
    const uint32_t* r = warp[lane].registers;
    const int group = lane / 4, member = lane % 4;
    for (int i = 0; i < 8; i++) a[group + (i / 2 % 2) * 8][member * 2 + i % 2 + i / 4 * 8] = half_of(r[i / 2], i % 2);
    for (int i = 0; i < 4; i++) b[member * 2 + i % 2 + i / 2 * 8][group] = half_of(r[4 + i / 2], i % 2);
    for (int i = 0; i < 4; i++) memcpy(&c[group + i / 2 * 8][member * 2 + i % 2], &r[6 + i], 4);
  }
  for (int m = 0; m < 16; m++)
    for (int k = 0; k < 16; k++)
      for (int n = 0; n < 8; n++) c[m][n] += a[m][k] * b[k][n];
  for (int lane = 0; lane < WARP; lane++)
    for (int i = 0; i < 4; i++) memcpy(&warp[lane].registers[6 + i], &c[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2], 4);
}

// ldmatrix.sync.aligned.m8n8.x4: lane 8 * i + r has the address of row r of matrix i.
void load(Fiber* warp, bool transposed) {
  uint16_t rows[4][8][8];
  Thread* const last = running;
  for (int lane = 0; lane < WARP; lane++) {
    running = &warp[lane];
    touch((void*)warp[lane].value, 16, 16, Access::READ);
    memcpy(rows[lane / 8][lane % 8], (void*)warp[lane].value, 16);
  }
  running = last;
  for (int lane = 0; lane < WARP; lane++)
    for (int i = 0; i < 4; i++) {
      const int at = lane / 4, pair = lane % 4 * 2;
      const uint32_t low = transposed ? rows[i][pair][at] : rows[i][at][pair];
      const uint32_t high = transposed ? rows[i][pair + 1][at] : rows[i][at][pair + 1];
      warp[lane].registers[i] = low | high << 16;
    }
}

void resolve(Fiber* warp, Collective kind) {
  uint64_t ballot = 0;
  for (int lane = 0; lane < WARP; lane++) ballot |= (uint64_t)(warp[lane].value & 1) << lane;
  for (int lane = 0; lane < WARP; lane++)
    warp[lane].result = kind == Collective::BALLOT ? ballot : warp[warp[lane].source].value;
  if (kind == Collective::SYNC) order_warp(warp->warp);
  if (kind == Collective::MMA_BF16) multiply(warp, bf16_of);
  if (kind == Collective::MMA_F16) multiply(warp, f16_of);
  if (kind == Collective::LDMATRIX || kind == Collective::LDMATRIX_TRANS) load(warp, kind == Collective::LDMATRIX_TRANS);
}

void land(Copy& copy) {
  memcpy(copy.to, copy.from, copy.source_bytes);
  memset((char*)copy.to + copy.source_bytes, 0, copy.bytes - copy.source_bytes);
  copy.landed = true;
}

void complain(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  report(format, arguments);
  va_end(arguments);
}

// Every thread waits at the same barrier, or all have exited, or something is wrong.
void release_barrier() {
  int waiting = 0, line = 0;
  for (int i = 0; i < threads; i++) {
    const Fiber& fiber = fibers[i];
    if (fiber.state == State::AT_MEETING) complain("line %d: a warp waits for lanes that never come", fiber.line);
    if (fiber.state != State::AT_BARRIER) continue;
    if (waiting++ && fiber.line != line) complain("__syncthreads at lines %d and %d of the same block", line, fiber.line);
    line = fiber.line;
  }
  if (waiting && waiting < threads) complain("line %d: __syncthreads after some threads have exited", line);
  order_block();
  for (int i = 0; i < threads && waiting; i++) {
    fibers[i].state = State::READY;
    ready[ready_count++] = i;
  }
}

int next_ready(int order) {
  const int at = order == 0 ? 0 : order == 1 ? ready_count - 1 : (int)(draw() % ready_count);
  const int number = ready[at];
  memmove(ready + at, ready + at + 1, (--ready_count - at) * sizeof *ready);
  return number;
}

void run_block(int order) {
  begin_block();
  ready_count = 0;
  for (int i = 0; i < threads; i++) make_fiber(fibers[i], i);
  while (ready_count && !failed) {
    while (ready_count && !failed) resume(&fibers[next_ready(order)]);
    if (!failed) release_barrier();
  }
}

}  // namespace

Thread* running;
Index block, block_size, grid_size;

void fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  report(format, arguments);
  va_end(arguments);
  void* abandoned;
  emulator_switch(&abandoned, scheduler);
  __builtin_unreachable();
}

void sync_block(int line) {
  self()->state = State::AT_BARRIER;
  self()->line = line;
  rest();
}

uint64_t meet(Collective kind, int line, uint64_t value, unsigned source, uint32_t* registers) {
  Fiber* me = self();
  me->state = State::AT_MEETING, me->line = line, me->kind = kind;
  me->value = value, me->source = source, me->registers = registers;
  Fiber* warp = me - me->lane;
  bool all = true;
  for (int lane = 0; lane < WARP; lane++) {
    if (warp[lane].state == State::DONE) fail("line %d: lane %d has exited", line, lane);
    if (warp[lane].state != State::AT_MEETING) all = false;
    else if (warp[lane].line != line || warp[lane].kind != kind) fail("the warp diverged: lines %d and %d", line, warp[lane].line);
  }
  if (!all) {
    rest();
    return me->result;
  }
  resolve(warp, kind);
  for (int lane = 0; lane < WARP; lane++) {
    warp[lane].state = State::READY;
    if (warp + lane != me) ready[ready_count++] = warp[lane].number;
  }
  return me->result;
}

void copy_async(void* to, const void* from, int bytes, int source_bytes) {
  Fiber* me = self();
  if (((uintptr_t)to | (uintptr_t)from) % bytes) fail("misaligned async copy of %d bytes", bytes);
  if (source_bytes) touch(from, source_bytes, 1, Access::READ);
  touch(to, bytes, 1, Access::COPY_ISSUED);
  if (me->copies == MAX_COPIES) fail("more than %d async copies are under way", MAX_COPIES);
  copied_bytes += source_bytes;
  Copy& copy = me->copy[me->copies++] = {to, from, bytes, source_bytes, me->groups, false};
  if (landing == EAGER || (landing == RANDOM && draw() % 2)) land(copy);
}

void commit_copies() { self()->groups++; }

void wait_copies(int groups_left) {
  Fiber* me = self();
  int kept = 0;
  for (int i = 0; i < me->copies; i++) {
    Copy& copy = me->copy[i];
    if (copy.group >= me->groups - groups_left) {
      me->copy[kept++] = copy;
      continue;
    }
    touch(copy.to, copy.bytes, 1, Access::COPY_LANDED);
    if (!copy.landed) land(copy);
  }
  me->copies = kept;
}

}  // namespace emulator

using namespace emulator;

// Runs a grid; null, or what is wrong with it. order: 0 ascending, 1 descending, 2 random. landing: of async
// copies, 0 at once, 1 as late as is legal, 2 either.
extern "C" const char* emulator_launch(void (*entry)(void**), const unsigned* grid, const unsigned* size, size_t shared_bytes, void** arguments, int order, int landing_mode, uint64_t seed_) {
  threads = size[0] * size[1] * size[2];
  if (threads < 1 || threads > MAX_THREADS || threads % WARP) return "a block must be of 32 to 1024 threads, whole warps";
  if (shared_bytes > MOST_SHARED) return "a block cannot have so much shared memory";
  if (!fibers) {
    const auto reserve = [](size_t n) { return mmap(nullptr, n, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0); };
    fibers = (Fiber*)reserve(sizeof(Fiber) * MAX_THREADS);
    stacks = (unsigned char*)reserve(STACK * MAX_THREADS);
  }
  kernel = entry, kernel_arguments = arguments;
  block_size = {size[0], size[1], size[2]}, grid_size = {grid[0], grid[1], grid[2]};
  landing = (Landing)landing_mode, seed = seed_ * 0x9e3779b97f4a7c15 + 88172645463325252, copied_bytes = 0, failed = false;
  begin_launch(shared_bytes);
  for (block.z = 0; block.z < grid_size.z; block.z++)
    for (block.y = 0; block.y < grid_size.y; block.y++)
      for (block.x = 0; block.x < grid_size.x && !failed; block.x++) run_block(order);
  running = nullptr;
  return failed ? message : nullptr;
}

// Bytes that the async copies of the last launch have read.
extern "C" uint64_t emulator_copied_bytes() { return copied_bytes; }
