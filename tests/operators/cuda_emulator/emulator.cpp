#include <ucontext.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <thread>
#include <vector>

#include "cuda_runtime.h"

namespace emulator {
namespace {

constexpr size_t kStackBytes = 1 << 18;  // a kernel's arguments alone take 32 KiB

// What a thread waits for; kNothing while it can go on.
enum class Waiting { kNothing, kWarp, kBlock, kGrid, kForever };

struct Coroutine {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  Waiting waiting;
};

// The threads of a block, on this thread of the operating system.
struct Block {
  std::vector<Coroutine> threads;
  ucontext_t scheduler;
  const std::function<void()>* kernel;
};
thread_local Block running;

uint64_t launches = 0;

// Blocks that have come to the barrier of the grid, over all of its barriers.
struct Launch {
  uint32_t blocks;
  std::atomic<uint64_t> arrivals{0};
};

[[noreturn]] void fail(const char* why) {
  std::fprintf(stderr, "CUDA emulator: %s\n", why);
  std::abort();
}

void enter() {
  (*running.kernel)();
  Coroutine& self = running.threads[threadIdx.x];
  self.waiting = Waiting::kForever;
  swapcontext(&self.context, &running.scheduler);
}

void wait(Waiting for_what) {
  Coroutine& self = running.threads[threadIdx.x];
  self.waiting = for_what;
  swapcontext(&self.context, &running.scheduler);
}

// Whether all threads from first to before last wait for one thing, which then is over.
bool release(uint32_t first, uint32_t last, Waiting for_what) {
  const auto begin = running.threads.begin() + first, end = running.threads.begin() + last;
  if (!std::all_of(begin, end, [&](const Coroutine& one) { return one.waiting == for_what; })) return false;
  std::for_each(begin, end, [](Coroutine& one) { one.waiting = Waiting::kNothing; });
  return true;
}

// Runs a warp as far as it gets without the others.
void run_warp(uint32_t first, bool backwards) {
  do {
    for (uint32_t i = 0; i < 32; ++i) {
      threadIdx.x = first + (backwards ? 31 - i : i);
      Coroutine& one = running.threads[threadIdx.x];
      if (one.waiting == Waiting::kNothing) swapcontext(&running.scheduler, &one.context);
    }
  } while (release(first, first + 32, Waiting::kWarp));
}

void run_block(uint32_t index, uint32_t count, const std::function<void()>& kernel, Launch* launch) {
  static const char* const order = std::getenv("CUDA_EMULATOR_ORDER");
  static const bool backwards = order != nullptr && std::strcmp(order, "backwards") == 0;
  if (count % 32 != 0) fail("a block of whole warps is needed");
  running.kernel = &kernel;
  blockIdx.x = index;
  if (running.threads.size() < count) running.threads = std::vector<Coroutine>(1024);
  for (uint32_t i = 0; i < count; ++i) {
    Coroutine& one = running.threads[i];
    getcontext(&one.context);
    one.context.uc_stack.ss_sp = one.stack.get();
    one.context.uc_stack.ss_size = kStackBytes;
    one.context.uc_link = nullptr;
    makecontext(&one.context, enter, 0);
    one.waiting = Waiting::kNothing;
  }
  for (uint64_t barriers = 0;;) {
    for (uint32_t i = 0; i < count; i += 32) run_warp(backwards ? count - 32 - i : i, backwards);
    if (release(0, count, Waiting::kForever)) return;
    if (release(0, count, Waiting::kBlock)) continue;
    if (launch == nullptr || !release(0, count, Waiting::kGrid)) fail("threads wait for others that do not come");
    ++barriers;
    ++launch->arrivals;
    while (launch->arrivals < barriers * launch->blocks) std::this_thread::yield();
  }
}

}  // namespace

void wait_for_warp() {
  wait(Waiting::kWarp);
}

void wait_for_block() {
  wait(Waiting::kBlock);
}

void wait_for_grid() {
  wait(Waiting::kGrid);
}

void run(uint32_t blocks, uint32_t threads, bool together, const std::function<void()>& kernel) {
  ++launches;
  gridDim.x = blocks;
  if (!together) {
    for (uint32_t i = 0; i < blocks; ++i) run_block(i, threads, kernel, nullptr);
    return;
  }
  Launch launch{blocks};
  std::vector<std::thread> workers;
  for (uint32_t i = 0; i < blocks; ++i) {
    workers.emplace_back([&, i] {
      gridDim.x = blocks;
      run_block(i, threads, kernel, &launch);
    });
  }
  for (std::thread& worker : workers) worker.join();
}

}  // namespace emulator

extern "C" uint64_t count_launches() {
  return emulator::launches;
}

// What csrc/cuda/operators.cpp asks of torch about devices and streams: there is one of each.
#define IN_PLACE_OF_TORCH extern "C" __attribute__((visibility("hidden"))) int32_t

IN_PLACE_OF_TORCH aoti_torch_create_device_guard(int32_t, void** guard) {
  *guard = nullptr;
  return 0;
}

IN_PLACE_OF_TORCH aoti_torch_delete_device_guard(void*) {
  return 0;
}

IN_PLACE_OF_TORCH aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}
