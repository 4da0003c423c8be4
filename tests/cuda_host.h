// Runs the CUDA C of loop kernels on the CPU, for tests: what of CUDA they use, and a simulated warp.
//
// Every lane of a warp is a fiber. At a shuffle or __syncwarp it waits until all 32 lanes are there; a warp that
// diverges (a lane ends while others wait, or waits elsewhere) is a fault. Lanes run in rising or falling order
// between two such points, so a race between lanes shows as a difference between the two.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>

#include <functional>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(threads)

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

namespace host {

enum { WARP = 32, STACK = 1 << 16 };
static ucontext_t scheduler, fibers[WARP];
static char stacks[WARP][STACK];
static bool done[WARP];
static int place[WARP];                    // the kind of point at which a lane waits
static unsigned parity[WARP];
static unsigned long long slots[2][WARP];  // in turn, as a lane may write again before all have read
static int current;
static const char* fault;
static const std::function<void()>* kernel;

static void wait_at(int kind) {
  place[current] = kind;
  swapcontext(&fibers[current], &scheduler);
}

static void fiber() {
  (*kernel)();
  done[current] = true;
  wait_at(0);
}

static void run_warp(unsigned first, bool falling) {
  for (int lane = 0; lane < WARP; lane++) {
    getcontext(&fibers[lane]);
    fibers[lane].uc_stack.ss_sp = stacks[lane];
    fibers[lane].uc_stack.ss_size = STACK;
    fibers[lane].uc_link = nullptr;
    makecontext(&fibers[lane], fiber, 0);
    done[lane] = false;
    parity[lane] = 0;
  }
  for (int left = WARP; left > 0 && !fault;) {
    for (int i = 0; i < WARP; i++) {
      current = falling ? WARP - 1 - i : i;
      if (done[current]) continue;
      threadIdx.x = first + current;
      swapcontext(&scheduler, &fibers[current]);
      left -= done[current];
    }
    for (int lane = 1; lane < WARP; lane++)
      if (place[lane] != place[0]) fault = "the lanes of a warp wait at different places";
  }
}

static const char* launch(int blocks, int threads, bool falling, const std::function<void()>& body) {
  kernel = &body;
  fault = nullptr;
  gridDim = {(unsigned)blocks, 1, 1};
  blockDim = {(unsigned)threads, 1, 1};
  for (int block = 0; block < blocks; block++)
    for (int first = 0; first < threads && !fault; first += WARP) {
      blockIdx.x = (unsigned)(falling ? blocks - 1 - block : block);
      run_warp((unsigned)first, falling);
    }
  return fault;
}

}  // namespace host

static inline void __syncwarp() { host::wait_at(1); }

template <class T> static T __shfl_xor_sync(unsigned mask, T value, int step) {
  using namespace host;
  if (mask != 0xffffffffu) fault = "a shuffle of a part of a warp";
  const int lane = current;
  unsigned long long* slot = slots[parity[lane]++ % 2];
  memcpy(&slot[lane], &value, sizeof value);
  wait_at(2);
  memcpy(&value, &slot[lane ^ step], sizeof value);
  return value;
}
