#include "cc/session/cpu_executor.h"

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <string>
#include <utility>
#include <vector>

#include "cc/session/compiler.h"
#include "cc/session/error.h"
#include "cc/session/instruction.h"
#include "cc/session/thread_pool.h"

namespace continual_transformers {
namespace {

// The most rows that go through the plan at a time. Enough rows share one read of the weights, and
// few enough stay in the near caches between two nodes. A multiple of the rows that a matrix
// product keeps in registers.
constexpr int64_t kRowsAtOnce = 96;
// A rough clock rate, in cycles per nanosecond.
constexpr double kCyclesANanosecond = 3;

struct Free {
  void operator()(void* p) const { std::free(p); }
};
using Bytes = std::unique_ptr<char, Free>;

Bytes Allocate(int64_t bytes) {
  const int64_t size = std::max<int64_t>(64, (bytes + 63) / 64 * 64);
  Bytes p(static_cast<char*>(std::aligned_alloc(64, size)));
  if (p == nullptr) throw std::bad_alloc();
  return p;
}

// The working memory of a call: a part for each thread.
class CpuArena final : public Arena {
 public:
  int64_t bytes() const override {
    int64_t bytes = 0;
    for (const Part& part : parts) bytes += part.bytes;
    return bytes;
  }

  // The memory of one thread.
  struct Part {
    Bytes values, scratch;
    int64_t rows = 0;             // room in `values`
    int64_t laid_out_for = -1;    // the number of rows that `pointers` is set for
    std::vector<char*> pointers;  // one per plan value
    int64_t bytes = 0;
    std::vector<double> seconds;  // one per instruction
  };
  std::vector<Part> parts;
  bool profiles = false;
};

}  // namespace

class CpuExecutor::Impl {
 public:
  Impl(const ModelFile& file, const ExecutorOptions& options)
      : plan_(file.plan()), compiled_(Compile(file, options)), pool_(options.threads) {
    for (const Port& input : plan_.inputs) input_bytes_.push_back(RowBytes(input.value));
    for (const Port& output : plan_.outputs) output_bytes_.push_back(RowBytes(output.value));
  }

  const Plan& plan_;
  const CompiledPlan compiled_;

  void SizeArena(CpuArena* arena) const {
    arena->parts.resize(pool_.threads());
    for (CpuArena::Part& part : arena->parts) {
      part.scratch = Allocate(compiled_.scratch_bytes);
      part.bytes = compiled_.scratch_bytes;
      part.seconds.resize(compiled_.instructions.size(), 0);
      part.pointers.resize(plan_.values.size());
    }
  }

  void Step(const StepCall& call, CpuArena* arena) const {
    const int64_t rows = call.streams * call.steps;
    if (rows == 0) return;
    const bool share = pool_.threads() > 1 && EstimatedCycles(rows) > kCyclesWorthThreads;
    // Reserve all memory before the first stream steps. If there is not enough, no stream changes.
    for (int64_t part = 0; part < (share ? pool_.threads() : 1); ++part) {
      Reserve(std::min(rows, kRowsAtOnce), &arena->parts[part]);
    }
    if (!share || call.streams < pool_.threads()) {
      // There are fewer streams than threads: the threads share the widest nodes.
      StepStreams(call, 0, call.streams, share ? &pool_ : nullptr, arena, &arena->parts[0]);
      return;
    }
    // Each thread takes its streams through the whole plan, without waiting for others between
    // nodes.
    const int64_t threads = pool_.threads();
    const int64_t tasks = std::max(threads, (rows + kRowsAtOnce - 1) / kRowsAtOnce);
    const int64_t count = std::min(call.streams, (tasks + threads - 1) / threads * threads);
    pool_.Share(count, [&](int64_t task, int64_t worker) {
      StepStreams(call, task * call.streams / count, (task + 1) * call.streams / count, nullptr,
                  arena, &arena->parts[worker]);
    });
  }

  int64_t EstimatedCycles(int64_t rows) const {
    int64_t cycles = 0;
    for (const auto& entry : compiled_.instructions) cycles += entry.instruction->Cycles(rows);
    return cycles;
  }

 private:
  int64_t RowBytes(int value) const {
    const Value& v = plan_.values[value];
    return v.size * SizeOf(v.dtype);
  }

  // Steps the streams begin, ..., end - 1 of a call, in groups of at most kRowsAtOnce rows.
  void StepStreams(const StepCall& call, int64_t begin, int64_t end, ThreadPool* pool,
                   CpuArena* arena, CpuArena::Part* part) const {
    const int64_t steps = std::min(call.steps, kRowsAtOnce);
    const int64_t most = std::max<int64_t>(1, kRowsAtOnce / call.steps);
    const int64_t groups = (end - begin + most - 1) / most;
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t first = begin + g * (end - begin) / groups;
      const int64_t last = begin + (g + 1) * (end - begin) / groups;
      // A group of several streams takes all steps in one frame, so the rows are contiguous in both
      // cases.
      for (int64_t t = 0; t < call.steps; t += steps) {
        RunFrame(call, first, last - first, t, std::min(steps, call.steps - t), pool, arena, part);
      }
    }
  }

  void RunFrame(const StepCall& call, int64_t first, int64_t streams, int64_t first_step,
                int64_t steps, ThreadPool* pool, CpuArena* arena, CpuArena::Part* part) const {
    const int64_t rows = streams * steps, row = first * call.steps + first_step;
    if (part->laid_out_for != rows) LayOutFor(rows, part);
    char** pointers = part->pointers.data();
    for (size_t i = 0; i < plan_.inputs.size(); ++i) {
      // const_cast: instructions only read inputs.
      pointers[plan_.inputs[i].value] =
          static_cast<char*>(const_cast<void*>(call.inputs[i])) + row * input_bytes_[i];
    }
    for (size_t i = 0; i < plan_.outputs.size(); ++i) {
      if (!compiled_.written_in_place[i]) continue;
      const int root = compiled_.storage[plan_.outputs[i].value];
      pointers[root] = call.outputs[i] == nullptr
                           ? part->values.get() + compiled_.arena_offset[root] * rows
                           : static_cast<char*>(call.outputs[i]) + row * output_bytes_[i];
    }
    const Frame frame = {streams,
                         steps,
                         call.blocks + first,
                         call.positions + first,
                         first_step,
                         call.key_mask == nullptr ? nullptr : call.key_mask + row,
                         pointers,
                         part->scratch.get(),
                         pool};
    if (arena->profiles) {
      RunProfiled(frame, part);
    } else {
      for (const auto& entry : compiled_.instructions) entry.instruction->Run(frame);
    }
    for (size_t i = 0; i < plan_.outputs.size(); ++i) {
      if (compiled_.written_in_place[i] || call.outputs[i] == nullptr) continue;
      std::memcpy(static_cast<char*>(call.outputs[i]) + row * output_bytes_[i],
                  pointers[compiled_.storage[plan_.outputs[i].value]], rows * output_bytes_[i]);
    }
  }

  // Makes room for frames of up to `rows` rows.
  void Reserve(int64_t rows, CpuArena::Part* part) const {
    if (part->rows >= rows) return;
    part->values = Allocate(compiled_.arena_bytes_a_row * rows);
    part->bytes += compiled_.arena_bytes_a_row * (rows - part->rows);
    part->rows = rows;
    part->laid_out_for = -1;
  }

  // Sets the pointers of all values that instructions write, for frames of `rows` rows.
  void LayOutFor(int64_t rows, CpuArena::Part* part) const {
    for (size_t value = 0; value < part->pointers.size(); ++value) {
      const int64_t offset = compiled_.arena_offset[value];
      part->pointers[value] = offset < 0 ? nullptr : part->values.get() + offset * rows;
    }
    part->laid_out_for = rows;
  }

  void RunProfiled(const Frame& frame, CpuArena::Part* part) const {
    auto before = std::chrono::steady_clock::now();
    for (size_t i = 0; i < compiled_.instructions.size(); ++i) {
      compiled_.instructions[i].instruction->Run(frame);
      const auto now = std::chrono::steady_clock::now();
      part->seconds[i] += std::chrono::duration<double>(now - before).count();
      before = now;
    }
  }

  std::vector<int64_t> input_bytes_, output_bytes_;  // of one row
  mutable ThreadPool pool_;
};

CpuExecutor::CpuExecutor(std::shared_ptr<const ModelFile> file, const ExecutorOptions& options)
    : Executor(std::move(file), options),
      impl_(std::make_unique<Impl>(this->file(), this->options())) {}

CpuExecutor::~CpuExecutor() = default;

int64_t CpuExecutor::weights_bytes() const { return impl_->compiled_.weights_bytes; }

std::unique_ptr<Arena> CpuExecutor::NewArena() const {
  auto arena = std::make_unique<CpuArena>();
  impl_->SizeArena(arena.get());
  return arena;
}

void CpuExecutor::Step(const StepCall& call, Arena* arena) const {
  impl_->Step(call, static_cast<CpuArena*>(arena));
}

int64_t CpuExecutor::EstimatedNanoseconds(int64_t streams, int64_t steps) const {
  // Many rows take time in proportion. Counting the cycles of all could overflow.
  constexpr double kMostCounted = 1 << 20;
  const double rows = static_cast<double>(streams) * static_cast<double>(steps);
  const int64_t counted = static_cast<int64_t>(std::clamp(rows, 0.0, kMostCounted));
  const double nanoseconds = static_cast<double>(impl_->EstimatedCycles(counted)) /
                             kCyclesANanosecond * std::max(1.0, rows / kMostCounted);
  return static_cast<int64_t>(std::min(nanoseconds, 9e18));
}

void CpuExecutor::BeginProfile(Arena* arena) const {
  auto* const own = static_cast<CpuArena*>(arena);
  own->profiles = true;
  for (CpuArena::Part& part : own->parts) std::fill(part.seconds.begin(), part.seconds.end(), 0);
}

std::vector<Executor::ProfileEntry> CpuExecutor::EndProfile(Arena* arena) const {
  auto* const own = static_cast<CpuArena*>(arena);
  own->profiles = false;
  std::vector<ProfileEntry> entries;
  for (size_t i = 0; i < impl_->compiled_.instructions.size(); ++i) {
    const auto& entry = impl_->compiled_.instructions[i];
    double seconds = 0;
    for (const CpuArena::Part& part : own->parts) seconds += part.seconds[i];
    entries.push_back({entry.name, entry.op, seconds});
  }
  return entries;
}

}  // namespace continual_transformers
