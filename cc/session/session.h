// What a program holds: a model, its streams, and their steps.

#ifndef CONTINUAL_TRANSFORMERS_SESSION_SESSION_H_
#define CONTINUAL_TRANSFORMERS_SESSION_SESSION_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "cc/session/executor.h"
#include "cc/session/model_file.h"
#include "cc/session/plan.h"
#include "cc/session/stream_store.h"

namespace continual_transformers {

struct SessionOptions {
  int64_t streams = 0;  // The most that may be open at once; 0: no limit.
  int64_t threads = 1;
  std::optional<DType> cache_dtype;    // Left out: the file's.
  std::optional<DType> weights_dtype;  // Left out: the file's.
};

// Any method may be called by several threads at once. Errors are thrown (error.h), and leave every
// stream as it was.
class Session {
 public:
  Session(std::shared_ptr<const ModelFile> file, const SessionOptions& options);
  ~Session();
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;

  void Open(int64_t count, StreamId* ids);
  void Close(const StreamId* ids, int64_t count);
  // Takes `steps` steps of `count` streams. `ids` null: the first `count` default streams, which
  // the first such step opens, and which the next one opens again after they were closed. Inputs
  // and outputs are contiguous [count, steps, ...]; see StepCall. No streams or no steps: nothing
  // happens, but that `ids` are checked.
  void Step(const StreamId* ids, int64_t count, int64_t steps, const void* const* inputs,
            void* const* outputs, const bool* key_mask = nullptr);
  // The same, and writes how many steps each stream has taken then, this one among them.
  void Step(const StreamId* ids, int64_t count, int64_t steps, const void* const* inputs,
            void* const* outputs, const bool* key_mask, int64_t* positions);
  void Clean(const StreamId* ids, int64_t count);  // `ids` null: every open stream.
  // See StreamStore.
  void Positions(const StreamId* ids, int64_t count, int64_t* positions) const;

  // A copy of one stream: a header with both fingerprints and the position, then its block, in
  // which rows that were never written are zeros.
  int64_t state_bytes() const;
  void GetState(StreamId id, void* state) const;
  // Throws Error (kOtherModel) where a copy is of another model; or, unless other_weights, of
  // another training.
  void SetState(StreamId id, const void* state, int64_t bytes, bool other_weights = false);
  // Several streams at once, all or none: everything is checked before the first one changes.
  void SetStates(const StreamId* ids, int64_t count, const void* const* states,
                 const int64_t* bytes, bool other_weights = false);
  // Writes `state`, a copy as GetState makes it, from a block and a position that came from
  // elsewhere (the state of the Keras model), with this session's fingerprints.
  void MakeState(const void* block, int64_t position, void* state) const;

  // The steps that are in progress end with the old weights, later ones have the new. Throws Error
  // (kOtherModel) where the plan is another.
  void LoadWeights(std::shared_ptr<const ModelFile> file);

  std::shared_ptr<const Executor> executor() const;
  const Plan& plan() const;
  StreamStore* store() const;
  uint64_t plan_fingerprint() const;  // Of the plan and this session's cache dtype.
  uint64_t weights_fingerprint() const;

  struct Memory {
    int64_t weights, model_file, streams, streams_overhead, arenas;  // Bytes.
  };
  Memory memory() const;
  // Takes `repeat` steps of `streams` streams of its own, which no one else sees, on zeros and with
  // full windows.
  std::vector<Executor::ProfileEntry> Profile(int64_t streams, int64_t repeat) const;

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_SESSION_SESSION_H_
