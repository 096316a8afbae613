// A session as a TensorFlow resource. One op makes it, another loads its model from a file, and the
// ops that step its streams look it up.

#ifndef CONTINUAL_TRANSFORMERS_TENSORFLOW_SESSION_RESOURCE_H_
#define CONTINUAL_TRANSFORMERS_TENSORFLOW_SESSION_RESOURCE_H_

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <string>
#include <vector>

#include "absl/container/inlined_vector.h"
#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/types/span.h"
#include "cc/session/session.h"
#include "cc/session/stream_store.h"
#include "tensorflow/core/framework/resource_base.h"
#include "tensorflow/core/platform/env.h"

namespace continual_transformers {

using StreamIds = absl::InlinedVector<StreamId, 64>;

// Runs `call`. Returns a status with the message of what it throws.
absl::Status StatusOf(absl::FunctionRef<void()> call);

// Graphs number streams from 0; `held` of them are open. Stream i is the session's default stream
// i. Several threads may call any method at once.
class SessionResource : public tensorflow::ResourceBase {
 public:
  // Reads the model, opens streams 0 to `streams` - 1, and sets the first of them to the states in
  // the file `states`: copies by Session::GetState, one after another; "": none. Does nothing if
  // the session is already initialized. If it fails, the session stays uninitialized.
  absl::Status Initialize(tensorflow::Env* env, const std::string& model_file,
                          const std::string& states, int64_t streams);
  // Makes room for streams 0 to `count` - 1. Streams that exist keep their state.
  absl::Status EnsureStreams(int64_t count, int64_t* held);
  // Returns the ids of these streams.
  absl::Status Ids(absl::Span<const int32_t> streams, StreamIds* ids) const;
  // Returns the session if it is initialized. It lives as long as this object.
  absl::Status Get(Session** session) const;

  std::string DebugString() const override;

 private:
  std::mutex growing_;  // held while streams are opened
  mutable std::shared_mutex ids_mutex_;
  std::vector<StreamId> ids_;       // written only with both mutexes held
  std::unique_ptr<Session> owner_;  // never changes once it is set
  std::atomic<Session*> session_{nullptr};
};

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_TENSORFLOW_SESSION_RESOURCE_H_
