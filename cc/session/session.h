// A session: a model, its streams and their steps.

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
  int64_t streams = 0;  // the most streams open at once; 0: no limit
  int64_t threads = 1;
  std::optional<DType> cache_dtype;    // absent: the file's
  std::optional<DType> weights_dtype;  // absent: the file's
  std::string device = "cpu";          // or "cuda:0" and so on
};

// Several threads may call any method at once. Errors (error.h) are thrown and leave every stream
// as it was.
class Session {
 public:
  Session(std::shared_ptr<const ModelFile> file, const SessionOptions& options);
  ~Session();
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;

  void Open(int64_t count, StreamId* ids);
  void Close(const StreamId* ids, int64_t count);
  // Takes `steps` steps of `count` streams. `ids` null: the first `count` default streams. A step
  // opens those that are not open yet, or were closed. Inputs and outputs are contiguous
  // [count, steps, ...]; see StepCall. On a GPU they may be in its memory, except inputs of whole
  // numbers: these are checked. Work on them that was put on CUDA's default stream is waited for.
  // With no streams or no steps, the call only checks `ids`.
  void Step(const StreamId* ids, int64_t count, int64_t steps, const void* const* inputs,
            void* const* outputs, const bool* key_mask = nullptr);
  // The same. Also writes the number of steps that each stream has taken, including these.
  void Step(const StreamId* ids, int64_t count, int64_t steps, const void* const* inputs,
            void* const* outputs, const bool* key_mask, int64_t* positions);
  void Clean(const StreamId* ids, int64_t count);  // `ids` null: every open stream
  // See StreamStore.
  void Positions(const StreamId* ids, int64_t count, int64_t* positions) const;

  // A copy of one stream: a header with both fingerprints and the position, then its block. Rows
  // that were never written are zeros.
  int64_t state_bytes() const;
  void GetState(StreamId id, void* state) const;
  // Throws Error (kOtherModel) if the copy is of another model, or of another training unless
  // `other_weights` is true.
  void SetState(StreamId id, const void* state, int64_t bytes, bool other_weights = false);
  // Sets several streams, all or none: everything is checked before the first one changes.
  void SetStates(const StreamId* ids, int64_t count, const void* const* states,
                 const int64_t* bytes, bool other_weights = false);
  // Writes `state`, a copy in the format of GetState, from a block and a position of another source
  // (the state of the Keras model). It gets this session's fingerprints.
  void MakeState(const void* block, int64_t position, void* state) const;

  // Steps in progress end with the old weights, later steps use the new ones. Throws Error
  // (kOtherModel) if the plan is another.
  void LoadWeights(std::shared_ptr<const ModelFile> file);

  std::shared_ptr<const Executor> executor() const;
  const Plan& plan() const;
  StreamStore* store() const;
  uint64_t plan_fingerprint() const;  // of the plan and this session's cache dtype
  uint64_t weights_fingerprint() const;

  struct Memory {
    int64_t weights, model_file, streams, streams_overhead, arenas;  // in bytes
  };
  Memory memory() const;
  // Profiles `repeat` steps of `streams` private streams, with zeros as input and full windows.
  std::vector<Executor::ProfileEntry> Profile(int64_t streams, int64_t repeat) const;

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_SESSION_SESSION_H_
