// Blocks that wait for each other, over cuda_host.h: all blocks of a launch are alive at once, each with shared memory
// of its own. A block runs until its threads wait or sleep, then the next.
#pragma once

namespace host {
enum { ASLEEP = DONE + 1 };

// Runs the threads first ... first + threads - 1 until none can go on; whether all have ended. `met`: some have met.
static bool run_on(int first, int threads, bool falling, bool& met) {
  for (bool moved = true; moved && !fault;) {
    moved = false;
    for (int i = 0; i < threads; i++) {
      const int thread = falling ? threads - 1 - i : i;
      current = first + thread;
      if (state[current] != RUNNING) continue;
      threadIdx.x = (unsigned)thread;
      switch_stacks(&scheduler, stacks[current]);
      moved = true;
    }
    bool free = meet(first, threads, AT_BLOCK);
    for (int warp = first; warp < first + threads; warp += WARP)
      free |= meet(warp, WARP, AT_WARP) | meet(warp, WARP, AT_SHUFFLE);
    moved |= free;
    met |= free;
  }
  for (int i = first; i < first + threads; i++)
    if (state[i] != DONE) return false;
  return true;
}

static const char* launch_together(int blocks, int threads, bool falling, const std::function<void()>& body) {
  if (blocks * threads > MOST) return "more threads than the simulation takes";
  kernel = &body;
  falling_order = falling;
  fault = nullptr;
  if (memory.size() < (size_t)blocks * threads * STACK) memory.resize((size_t)blocks * threads * STACK);
  gridDim = {(unsigned)blocks, 1, 1};
  blockDim = {(unsigned)threads, 1, 1};
  const size_t size = (size_t)(__stop_shared_memory - __start_shared_memory);
  std::vector<std::vector<char>> shared((size_t)blocks, std::vector<char>(size, (char)0xff));
  for (int i = 0; i < blocks * threads; i++) start(i);
  for (int idle = 0; !fault;) {
    int ended = 0;
    bool met = false;
    for (int i = 0; i < blocks; i++) {
      const int block = falling ? blocks - 1 - i : i, first = block * threads;
      for (int t = first; t < first + threads; t++)
        if (state[t] == ASLEEP) state[t] = RUNNING;
      blockIdx.x = (unsigned)block;
      memcpy(__start_shared_memory, shared[(size_t)block].data(), size);
      ended += run_on(first, threads, falling, met);
      memcpy(shared[(size_t)block].data(), __start_shared_memory, size);
    }
    if (ended == blocks) break;
    idle = met ? 0 : idle + 1;             // who goes on from a barrier meets the threads of its block
    if (idle > 1) fault = "blocks wait at different places";
  }
  return fault;
}
}  // namespace host

static inline void __nanosleep(unsigned) { host::wait_at(host::ASLEEP); }
