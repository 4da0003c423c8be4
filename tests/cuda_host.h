// Runs generated CUDA C on the CPU, for tests: what of CUDA it uses, and a simulated block.
//
// Every thread of a block is a fiber. At a shuffle or __syncwarp it waits until all 32 lanes of its warp are there, at
// __syncthreads until the whole block is; threads that diverge (one ends while others wait, or waits elsewhere) are a
// fault. Threads run in rising or falling order between two such points, so a race shows as a difference between the
// two. Shared memory is full of NaN when a block starts.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#include <functional>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(threads)
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __shared__ static __attribute__((section("shared_memory")))
__attribute__((section("shared_memory"), used)) static char shared_start_marker;  // so that the section exists
extern char __start_shared_memory[] __attribute__((visibility("hidden")));
extern char __stop_shared_memory[] __attribute__((visibility("hidden")));

struct Position { unsigned x, y, z; };
static Position threadIdx, blockIdx, blockDim, gridDim;

static float __int_as_float(int bits) { float value; memcpy(&value, &bits, 4); return value; }
static int __float_as_int(float value) { int bits; memcpy(&bits, &value, 4); return bits; }
static double __longlong_as_double(long long bits) { double value; memcpy(&value, &bits, 8); return value; }

// The C library has no erfinv: Newton's method on erf, from where it converges.
static double erfinv(double x) {
  if (!(fabs(x) < 1)) return fabs(x) == 1 ? x * INFINITY : NAN;
  const double c = 2 / (M_PI * 0.147) + log1p(-x * x) / 2;
  double y = fabs(x) < 1e-6 ? fabs(x) * 0.886226925452758 : sqrt(sqrt(c * c - log1p(-x * x) / 0.147) - c);
  for (int i = 0; i < 8; i++) {
    const double error = fabs(x) < 0.5 ? erf(y) - fabs(x) : 1 - fabs(x) - erfc(y);
    y -= error * exp(y * y) * 0.886226925452758;
  }
  return copysign(y, x);
}
static float erfinvf(float x) { return (float)erfinv(x); }

// Saves the registers that a call keeps on the stack of the fiber that stops, and goes on with another's.
extern "C" void switch_stacks(void** from, void* to) __attribute__((visibility("hidden")));
#if defined(__x86_64__)
asm(R"(
.text
.hidden switch_stacks
.type switch_stacks, @function
switch_stacks:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
enum { SAVED = 6 };
#else
#error "the simulated block switches stacks on x86-64 only"
#endif

namespace host {

// Shared memory that a launch asks for, and canaries behind it.
enum { MOST_SHARED = 227 << 10, BEHIND = 1 << 10 };
alignas(16) static char asked_for[MOST_SHARED + BEHIND];
static int shared_bytes;

#ifndef HOST_THREADS
#define HOST_THREADS 1024
#endif
enum { WARP = 32, MOST = HOST_THREADS, STACK = 1 << 15 };
enum { RUNNING, AT_WARP, AT_SHUFFLE, AT_BLOCK, DONE };
static void* scheduler;
static void* stacks[MOST];                 // where each fiber's stack ends
static std::vector<char> memory;
static int state[MOST];
static unsigned parity[MOST], asked[MOST];
static unsigned long long slots[2][MOST];  // in turn, as a lane may write again before all have read
static int current;
static bool falling_order;
static const char* fault;
static const std::function<void()>* kernel;

static void wait_at(int point) {
  state[current] = point;
  switch_stacks(&stacks[current], scheduler);
}

static void fiber() {
  (*kernel)();
  for (;;) wait_at(DONE);
}

// Copies to shared memory that a thread has begun, by group.
struct Begun { void* to; const void* from; int bytes; bool holds; int group; };
static std::vector<Begun> begun[MOST];
static int ended[MOST];

static void arrive(const Begun& copy) {
  if (copy.holds) memcpy(copy.to, copy.from, copy.bytes);
  else memset(copy.to, 0, copy.bytes);
}

static void start(int thread) {
  if (!begun[thread].empty()) fault = "copies that nothing waited for";
  begun[thread].clear();
  ended[thread] = 0;
  void** top = (void**)(((uintptr_t)memory.data() + (size_t)(thread + 1) * STACK & ~(uintptr_t)15) - 8);
  *top = nullptr;                          // the return address, aligned as after a call; it is never used
  *--top = (void*)fiber;
  for (int i = 0; i < SAVED; i++) *--top = nullptr;
  stacks[thread] = top;
  state[thread] = RUNNING;
  parity[thread] = asked[thread] = 0;
}

// Frees the threads first ... first + count - 1 if all of them wait at the same point.
static bool meet(int first, int count, int point) {
  for (int i = first; i < first + count; i++)
    if (state[i] != point) return false;
  for (int i = first; i < first + count; i++) state[i] = RUNNING;
  return true;
}

static void run_block(int threads, bool falling) {
  memset(__start_shared_memory, 0xff, __stop_shared_memory - __start_shared_memory);
  memset(asked_for, 0xff, shared_bytes);
  memset(asked_for + shared_bytes, 0xa5, BEHIND);
  for (int i = 0; i < threads; i++) start(i);
  for (;;) {
    bool moved = false, ended = true;
    for (int i = 0; i < threads; i++) {
      current = falling ? threads - 1 - i : i;
      if (state[current] != RUNNING) continue;
      threadIdx.x = (unsigned)current;
      switch_stacks(&scheduler, stacks[current]);
      moved = true;
    }
    for (int first = 0; first < threads; first += WARP)
      moved |= meet(first, WARP, AT_WARP) | meet(first, WARP, AT_SHUFFLE);
    moved |= meet(0, threads, AT_BLOCK);
    for (int i = 0; i < threads; i++) ended &= state[i] == DONE;
    if (ended) {
      for (int i = 0; i < BEHIND; i++)
        if (asked_for[shared_bytes + i] != (char)0xa5) fault = "a write behind shared memory";
      return;
    }
    if (!moved) {
      fault = "threads wait at different places";
      return;
    }
  }
}

// Where a pack lies, which must be aligned to its size.
template <class Pack> static Pack* aligned(Pack* at) {
  static typename std::remove_const<Pack>::type nowhere;
  if ((uintptr_t)at % alignof(Pack) == 0) return at;
  fault = "a pack that is not aligned";
  return &nowhere;
}

static const char* launch(int blocks, int threads, int shared, bool falling, const std::function<void()>& body) {
  kernel = &body;
  falling_order = falling;
  fault = shared > MOST_SHARED ? "more shared memory than a block may have" : nullptr;
  shared_bytes = shared;
  if (memory.size() < (size_t)threads * STACK) memory.resize((size_t)threads * STACK);
  gridDim = {(unsigned)blocks, 1, 1};
  blockDim = {(unsigned)threads, 1, 1};
  for (int block = 0; block < blocks && !fault; block++) {
    blockIdx.x = (unsigned)(falling ? blocks - 1 - block : block);
    run_block(threads, falling);
  }
  return fault;
}

// With a function: g++ takes longer over a std::function for each kernel than over most kernels.
static const char* launch(int blocks, int threads, int shared, bool falling, void (*body)(void**, const long long*),
                          void** a, const long long* s) {
  return launch(blocks, threads, shared, falling, [&] { body(a, s); });
}

}  // namespace host

static char* gf_shared() {
  if (!host::shared_bytes) host::fault = "shared memory that the launch does not ask for";
  return host::asked_for;
}

// Blocks run one after the other, and the fibers of a block change places only where they wait.
static inline void __threadfence() {}
template <class T> static T atomicAdd(T* at, T value) {
  const T old = *at;
  *at = old + value;
  return old;
}

static inline void __syncwarp() { host::wait_at(host::AT_WARP); }
static inline void __syncthreads() { host::wait_at(host::AT_BLOCK); }
static int __syncthreads_or(int mine) {
  static int any[2];                       // in turn, as a thread may ask again before thread 0 clears it
  int& vote = any[host::asked[host::current]++ % 2];
  vote |= mine;
  __syncthreads();
  const int result = vote;
  __syncthreads();
  if (host::current == 0) vote = 0;
  return result;
}

// What a lane gets for what all lanes of its warp bring.
template <class T> static T exchanged(unsigned mask, T value, int lane) {
  using namespace host;
  if (mask != 0xffffffffu) fault = "a shuffle of a part of a warp";
  const int own = current;
  unsigned long long* slot = slots[parity[own]++ % 2];
  memcpy(&slot[own], &value, sizeof value);
  wait_at(AT_SHUFFLE);
  memcpy(&value, &slot[own / WARP * WARP + lane], sizeof value);
  return value;
}
template <class T> static T __shfl_xor_sync(unsigned mask, T value, int step) {
  return exchanged(mask, value, host::current % host::WARP ^ step);
}
template <class T> static T __shfl_up_sync(unsigned mask, T value, int step) {
  const int lane = host::current % host::WARP;
  return exchanged(mask, value, lane < step ? lane : lane - step);
}
template <class T> static T __shfl_sync(unsigned mask, T value, int lane) { return exchanged(mask, value, lane); }
static unsigned __ballot_sync(unsigned mask, bool holds) {
  unsigned all = holds ? 1u << host::current % host::WARP : 0;
  for (int step = 1; step < host::WARP; step *= 2) all |= __shfl_xor_sync(mask, all, step);
  return all;
}
static int __popc(unsigned bits) { return __builtin_popcount(bits); }

// Copies to shared memory arrive as late as they may, or, where threads run in falling order, at once.
template <int COUNT, class T> static void gf_copy(T* to, const T* from, bool holds) {
  using namespace host;
  const Begun copy = {to, from, COUNT * (int)sizeof(T), holds, ended[current]};
  if ((uintptr_t)to % copy.bytes) fault = "a copy to a place that is not aligned";
  if (falling_order) arrive(copy);
  else begun[current].push_back(copy);
}
static void gf_copies_end() { host::ended[host::current]++; }
template <int COUNT> static void gf_copies_wait() {
  using namespace host;
  std::vector<Begun> left;
  for (const Begun& copy : begun[current])
    if (copy.group < ended[current] - COUNT) arrive(copy);
    else left.push_back(copy);
  begun[current].swap(left);
}

// Tensor cores, by the layouts that the PTX manual gives: what each lane of a warp brings is put where all see it.
namespace host {
struct Brought { const unsigned short* from; unsigned rows[4], columns[2]; };
static Brought brought[2][MOST];

static Brought* meet_with(const Brought& mine) {  // the warp's
  Brought* all = brought[parity[current]++ % 2];
  all[current] = mine;
  wait_at(AT_SHUFFLE);
  return all + current / WARP * WARP;
}

static float widened(unsigned bits, int kind) {  // 0: tf32, 1: bf16, 2: f16
  if (kind < 2) return __int_as_float((int)(kind ? bits << 16 : bits));
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const float size = exponent == 31 ? (fraction ? NAN : INFINITY)
                     : exponent ? ldexpf(1024 + fraction, exponent - 25) : ldexpf(fraction, -24);
  return bits & 0x8000 ? -size : size;
}

// Element x (along k) of a fragment's row or column `number`, whose registers hold two halves or a word each.
static float element(const Brought* warp, bool row, int number, int x, int kind) {
  const int wide = kind ? 2 : 1, high = x / (4 * wide), lane = number % 8 * 4 + x / wide % 4;
  const unsigned bits = row ? warp[lane].rows[high * 2 + number / 8] : warp[lane].columns[high];
  return widened(kind ? bits >> x % 2 * 16 & 0xffff : bits, kind);
}

static void multiply(float* sums, const unsigned* rows, const unsigned* columns, int kind) {
  Brought mine = {};
  memcpy(mine.rows, rows, sizeof mine.rows);
  memcpy(mine.columns, columns, sizeof mine.columns);
  const Brought* warp = meet_with(mine);
  const int lane = current % WARP;
  for (int i = 0; i < 4; i++)
    for (int x = 0; x < (kind ? 16 : 8); x++)
      sums[i] = fmaf(element(warp, true, lane / 4 + i / 2 * 8, x, kind),
                     element(warp, false, lane % 4 * 2 + i % 2, x, kind), sums[i]);
}

static void matrices(unsigned* to, const unsigned short* from, bool turned) {
  if ((uintptr_t)from % 16) fault = "a row of a matrix that is not aligned";
  const Brought* warp = meet_with({from, {}, {}});
  const int row = current % WARP / 4, column = current % WARP % 4 * 2;
  for (int i = 0; i < 4; i++) {
    const unsigned short* const rows[2] = {warp[i * 8 + (turned ? column : row)].from,
                                           warp[i * 8 + (turned ? column + 1 : row)].from};
    to[i] = rows[0][turned ? row : column] | (unsigned)rows[1][turned ? row : column + 1] << 16;
  }
}
}  // namespace host

static void gf_mma_f16(float* sums, const unsigned* rows, const unsigned* columns) {
  host::multiply(sums, rows, columns, 2);
}
static void gf_mma_bf16(float* sums, const unsigned* rows, const unsigned* columns) {
  host::multiply(sums, rows, columns, 1);
}
static void gf_mma_tf32(float* sums, const unsigned* rows, const unsigned* columns) {
  host::multiply(sums, rows, columns, 0);
}
static void gf_matrices(unsigned* to, const unsigned short* from) { host::matrices(to, from, false); }
static void gf_matrices_turned(unsigned* to, const unsigned short* from) { host::matrices(to, from, true); }
static unsigned gf_tf32(float x) {  // to the nearest, ties away from zero
  const unsigned bits = (unsigned)__float_as_int(x);
  return x == x && fabsf(x) != INFINITY ? (bits + 0x1000u) & 0xffffe000u : bits;
}
