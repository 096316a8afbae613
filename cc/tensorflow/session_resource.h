// A session as a resource of TensorFlow: made by an op, initialized by another from a model file,
// and looked up by those that step its streams.

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

// What `call` throws, as a status with the same sentence.
absl::Status StatusOf(absl::FunctionRef<void()> call);

// Graphs know streams by numbers from 0, of which `held` are open: number i is the session's
// default stream i. Any method may be called by several threads at once.
class SessionResource : public tensorflow::ResourceBase {
 public:
  // Reads the model, opens streams 0 to `streams` - 1, and puts what the file `states` has into the
  // first of them: copies as Session::GetState makes them, one after another; "": none. Does
  // nothing where it was done before. A call that fails leaves the session uninitialized.
  absl::Status Initialize(tensorflow::Env* env, const std::string& model_file,
                          const std::string& states, int64_t streams);
  // Makes room for streams 0 to `count` - 1. Those that are held keep their state.
  absl::Status EnsureStreams(int64_t count, int64_t* held);
  // The ids of these streams.
  absl::Status Ids(absl::Span<const int32_t> streams, StreamIds* ids) const;
  // The session, if it is initialized. It lives as long as this.
  absl::Status Get(Session** session) const;

  std::string DebugString() const override;

 private:
  std::mutex growing_;  // Held by who opens streams.
  mutable std::shared_mutex ids_mutex_;
  std::vector<StreamId> ids_;       // Written by who holds both.
  std::unique_ptr<Session> owner_;  // Once it is set, it stays.
  std::atomic<Session*> session_{nullptr};
};

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_TENSORFLOW_SESSION_RESOURCE_H_
