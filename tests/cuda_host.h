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

enum { WARP = 32, MOST = 1024, STACK = 1 << 15 };
enum { RUNNING, AT_WARP, AT_SHUFFLE, AT_BLOCK, DONE };
static void* scheduler;
static void* stacks[MOST];                 // where each fiber's stack ends
static std::vector<char> memory;
static int state[MOST];
static unsigned parity[MOST];
static unsigned long long slots[2][MOST];  // in turn, as a lane may write again before all have read
static int current;
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

static void start(int thread) {
  void** top = (void**)(((uintptr_t)memory.data() + (size_t)(thread + 1) * STACK & ~(uintptr_t)15) - 8);
  *top = nullptr;                          // the return address, aligned as after a call; it is never used
  *--top = (void*)fiber;
  for (int i = 0; i < SAVED; i++) *--top = nullptr;
  stacks[thread] = top;
  state[thread] = RUNNING;
  parity[thread] = 0;
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
    if (ended) return;
    if (!moved) {
      fault = "threads wait at different places";
      return;
    }
  }
}

static const char* launch(int blocks, int threads, bool falling, const std::function<void()>& body) {
  kernel = &body;
  fault = nullptr;
  memory.resize((size_t)MOST * STACK);
  gridDim = {(unsigned)blocks, 1, 1};
  blockDim = {(unsigned)threads, 1, 1};
  for (int block = 0; block < blocks && !fault; block++) {
    blockIdx.x = (unsigned)(falling ? blocks - 1 - block : block);
    run_block(threads, falling);
  }
  return fault;
}

}  // namespace host

// Blocks run one after the other, and the fibers of a block change places only where they wait.
static inline void __threadfence() {}
template <class T> static T atomicAdd(T* at, T value) {
  const T old = *at;
  *at = old + value;
  return old;
}

static inline void __syncwarp() { host::wait_at(host::AT_WARP); }
static inline void __syncthreads() { host::wait_at(host::AT_BLOCK); }

template <class T> static T __shfl_xor_sync(unsigned mask, T value, int step) {
  using namespace host;
  if (mask != 0xffffffffu) fault = "a shuffle of a part of a warp";
  const int lane = current;
  unsigned long long* slot = slots[parity[lane]++ % 2];
  memcpy(&slot[lane], &value, sizeof value);
  wait_at(AT_SHUFFLE);
  memcpy(&value, &slot[lane / WARP * WARP + (lane % WARP ^ step)], sizeof value);
  return value;
}
