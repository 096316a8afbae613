// How the emulator runs kernels; see cuda_runtime.h.
//
// The blocks of a launch run one after another, or, if they may wait for each other, each until it
// waits (cooperative_groups.h). The threads of a block run as fibers, which switch
// where they wait for each other: at __syncthreads and at shuffles. cuda_emulator_set_order sets
// the order in which blocks and threads run. Tests thus find a kernel whose result depends on the
// order, or that waits at a point that not all threads reach. The emulator cannot find races.
// Between two waits of a thread, compute-sanitizer finds them on a GPU, for shared memory. Between
// two blocks, only reading the code and wrong results show them.
//
// Some blocks of a graph's kernel begin early if its edges are programmatic: up to kMostEarly nodes
// before their turn they run as far as they may, and stand still where they wait for the kernels
// before theirs. So a kernel that reads or writes too early gives wrong numbers. What such a block
// has put into shared memory by then is lost, because all blocks share it. Every thread of a kernel
// that may begin early must wait.

#ifndef CONTINUAL_TRANSFORMERS_TESTS_GPU_EMULATOR_EMULATED_BLOCKS_H_
#define CONTINUAL_TRANSFORMERS_TESTS_GPU_EMULATOR_EMULATED_BLOCKS_H_

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// The running thread, and its block.
inline dim3 threadIdx(0, 0, 0), blockIdx(0, 0, 0), blockDim, gridDim;

namespace cuda_emulator {

// How many blocks ran. Tests read it.
inline std::atomic<int64_t> blocks{0};

constexpr int kLanes = 32;

// 0: blocks and threads run in the order of their numbers. 1: in reverse order. Other numbers:
// shuffled, with the number as seed.
inline int order = 0;

inline std::vector<int> Ordered(int count) {
  std::vector<int> numbers(count);
  std::iota(numbers.begin(), numbers.end(), 0);
  if (order == 1) std::reverse(numbers.begin(), numbers.end());
  if (order > 1) std::shuffle(numbers.begin(), numbers.end(), std::mt19937(order));
  return numbers;
}

// A point at which threads wait for each other. `generation` counts how often all have arrived.
struct Barrier {
  int waiting = 0;
  unsigned generation = 0;
};

// Where the threads of all blocks of a launch wait for each other; see cooperative_groups.h.
struct GridBarrier {
  Barrier barrier;
  int threads;
};

class Block {
 public:
  // `must_wait`: whether each thread has to call cudaGridDependencySynchronize. `grid`: null if the
  // blocks of the launch do not run together.
  Block(int number, int threads, const std::function<void()>& body, bool must_wait,
        GridBarrier* grid)
      : number_(number),
        body_(body),
        must_wait_(must_wait),
        grid_(grid),
        fibers_(threads),
        warps_((threads + kLanes - 1) / kLanes),
        alive_(threads),
        numbers_(Ordered(threads)) {}

  // Runs the threads to their end. If the kernels before this one have not ended, it runs them
  // until they wait for these; the next call goes on. So it does if they wait for other blocks.
  // Returns whether any thread moved.
  bool Run(bool previous_ended) {
    running_ = this;
    previous_ended_ = previous_ended;
    blockIdx = dim3(number_, 0, 0);
    bool any_moved = false;
    for (bool moved = true; alive_ > 0 && moved;) {
      moved = false;
      for (int number : numbers_) {
        Fiber& fiber = fibers_[number];
        if (fiber.done || !Released(fiber)) continue;
        any_moved = moved = true;
        threadIdx = dim3(number, 0, 0);
        current_ = &fiber;
        Resume(&fiber);
        if (fiber.done) End(&fiber);
        // Threads that have ended are not waited for.
        if (alive_ > 0 && block_.waiting == alive_) Release(&block_);
      }
    }
    if (alive_ > 0 && previous_ended && grid_ == nullptr) {
      Stop("some threads wait for others that never arrive");
    }
    return any_moved;
  }

  bool ended() const { return alive_ == 0; }

  // For cooperative_groups.h: the thread arrives where all threads of all blocks do, and waits for
  // the others. Returns what the wait needs.
  unsigned ArriveAtGrid() {
    if (grid_ == nullptr) Stop("blocks that do not run together cannot wait for each other");
    Barrier& barrier = grid_->barrier;
    const unsigned generation = barrier.generation;
    if (++barrier.waiting == grid_->threads) Release(&barrier);
    return generation;
  }
  void WaitForGrid(unsigned generation) {
    current_->barrier = &grid_->barrier;
    current_->generation = generation;
    if (!Released(*current_)) Switch();
    current_->barrier = nullptr;
  }

  // The same for a cluster, which is all blocks. The hardware keeps what the wait needs.
  void ArriveAtCluster() { current_->cluster_generation = ArriveAtGrid(); }
  void WaitForCluster() { WaitForGrid(current_->cluster_generation); }

  static Block& Running() { return *running_; }

  [[noreturn]] static void Stop(const char* why) {
    std::fprintf(stderr, "CUDA emulator, block %u: %s\n", blockIdx.x, why);
    std::abort();
  }

  void WaitForBlock() { Wait(&block_, -1); }

  void WaitForPrevious() {
    current_->has_waited = true;
    if (previous_ended_) return;
    current_->waits_for_previous = true;
    Switch();
    current_->waits_for_previous = false;
  }

  template <typename T>
  T Exchange(T value, int distance) {
    static_assert(sizeof(T) <= 8);
    const int number = threadIdx.x, lane = number % kLanes;
    Warp& warp = warps_[number / kLanes];
    auto& slots = warp.slots[warp.barrier.generation % 2];
    std::memcpy(slots[lane], &value, sizeof(T));
    Wait(&warp.barrier, std::min<int>(kLanes, fibers_.size() - number / kLanes * kLanes));
    std::memcpy(&value, slots[lane ^ distance], sizeof(T));
    return value;
  }

 private:
  static constexpr size_t kStack = 64 << 10;

  struct Fiber {
    std::unique_ptr<char[]> stack;  // null: it has not begun, or has ended
    jmp_buf state;
    bool done = false, has_waited = false, waits_for_previous = false;
    Barrier* barrier = nullptr;
    unsigned generation = 0, cluster_generation = 0;
  };
  struct Warp {
    Barrier barrier;
    // Two sets: the first thread in the next exchange must not overwrite what others still read.
    char slots[2][kLanes][8];
  };

  bool Released(const Fiber& fiber) const {
    if (fiber.waits_for_previous) return previous_ended_;
    return fiber.barrier == nullptr || fiber.barrier->generation != fiber.generation;
  }
  static void Release(Barrier* barrier) {
    barrier->waiting = 0;
    ++barrier->generation;
  }

  // Waits until `all` threads have arrived. -1: until Run() sees that all remaining ones have.
  void Wait(Barrier* barrier, int all) {
    Fiber& fiber = *current_;
    fiber.barrier = barrier;
    fiber.generation = barrier->generation;
    if (++barrier->waiting == all) Release(barrier);
    Switch();
    fiber.barrier = nullptr;
  }

  // Lets other threads run.
  void Switch() {
    const dim3 index = threadIdx;
    if (_setjmp(current_->state) == 0) _longjmp(scheduler_, 1);
    threadIdx = index;
  }

  // Switches to a fiber. Only its first start uses a context: swapcontext makes a system call for
  // the signal mask at every switch, and jumps do not.
  void Resume(Fiber* fiber) {
    if (_setjmp(scheduler_) != 0) return;
    if (fiber->stack != nullptr) _longjmp(fiber->state, 1);
    if (stacks_.empty()) stacks_.emplace_back(new char[kStack]);
    fiber->stack = std::move(stacks_.back());
    stacks_.pop_back();
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = fiber->stack.get();
    context.uc_stack.ss_size = kStack;
    context.uc_link = nullptr;
    makecontext(&context, &Block::Begin, 0);
    setcontext(&context);
  }
  static void Begin() {
    running_->body_();
    running_->current_->done = true;
    _longjmp(running_->scheduler_, 1);
  }
  void End(Fiber* fiber) {
    --alive_;
    stacks_.push_back(std::move(fiber->stack));
    if (must_wait_ && !fiber->has_waited) {
      Stop("a kernel may begin early, but a thread did not wait for the kernels before it");
    }
  }

  static inline Block* running_;
  static inline bool previous_ended_;
  // Kept for later threads: freeing the memory and allocating it again would take most of the time.
  static inline std::vector<std::unique_ptr<char[]>> stacks_;
  const int number_;
  const std::function<void()>& body_;
  const bool must_wait_;
  GridBarrier* const grid_;
  std::vector<Fiber> fibers_;
  std::vector<Warp> warps_;
  Barrier block_;
  int alive_;
  const std::vector<int> numbers_;
  Fiber* current_ = nullptr;
  jmp_buf scheduler_;
};

// A launch's blocks.
class Grid {
 public:
  // `together`: whether the blocks may wait for each other.
  Grid(dim3 blocks, dim3 threads, std::function<void()> body, bool must_wait, bool together = false)
      : blocks_(blocks),
        threads_(threads),
        body_(std::move(body)),
        must_wait_(must_wait),
        together_(together) {}

  // Lets some blocks run until they wait for the kernels before this one.
  void Begin() {
    constexpr unsigned kMostThreads = 512;
    Enter();
    for (int block : Ordered(blocks_.x)) {
      if (begun_.size() * threads_.x >= kMostThreads) break;
      begun_.try_emplace(block, block, threads_.x, body_, must_wait_, nullptr)
          .first->second.Run(false);
    }
  }

  void Run() {
    Enter();
    blocks += blocks_.x;
    if (together_) return RunTogether();
    for (int block : Ordered(blocks_.x)) {
      const auto begun = begun_.find(block);
      if (begun == begun_.end()) {
        Block(block, threads_.x, body_, must_wait_, nullptr).Run(true);
      } else {
        begun->second.Run(true);
      }
    }
    begun_.clear();
  }

 private:
  void Enter() const {
    gridDim = blocks_;
    blockDim = threads_;
  }

  // Runs each block until it waits for others, then the next one. They share what is __shared__, so
  // a block must not need it from before it waits.
  void RunTogether() {
    GridBarrier barrier = {{}, static_cast<int>(blocks_.x * threads_.x)};
    for (int block : Ordered(blocks_.x)) {
      begun_.try_emplace(block, block, threads_.x, body_, must_wait_, &barrier);
    }
    for (bool moved = true; moved;) {
      moved = false;
      for (int block : Ordered(blocks_.x)) moved |= begun_.at(block).Run(true);
    }
    for (const auto& [number, block] : begun_) {
      if (!block.ended()) Block::Stop("some blocks wait for others that never arrive");
    }
    begun_.clear();
  }

  const dim3 blocks_, threads_;
  const std::function<void()> body_;
  const bool must_wait_, together_;
  std::map<int, Block> begun_;  // by number
};

}  // namespace cuda_emulator

#endif  // CONTINUAL_TRANSFORMERS_TESTS_GPU_EMULATOR_EMULATED_BLOCKS_H_
