// The base of the ops on a session. If an op fails, it fails before any stream changes.

#ifndef CONTINUAL_TRANSFORMERS_TENSORFLOW_SESSION_OP_H_
#define CONTINUAL_TRANSFORMERS_TENSORFLOW_SESSION_OP_H_

#include <cstdint>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/types/span.h"
#include "cc/session/session.h"
#include "cc/tensorflow/op_io.h"
#include "cc/tensorflow/session_resource.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/resource_mgr.h"
#include "tensorflow/core/framework/shape_inference.h"

namespace continual_transformers {

// The session and the streams of a call.
class SessionCall {
 public:
  absl::Status LookUp(tensorflow::OpKernelContext* ctx, const OpInput& session);
  // Also looks up the ids of the streams. The session must have a model.
  absl::Status LookUp(tensorflow::OpKernelContext* ctx, const OpInput& session,
                      const OpInput& streams);

  // Runs `call`, which steps or changes these streams.
  absl::Status Run(absl::FunctionRef<void()> call) const;

  SessionResource* resource() const { return resource_.get(); }
  Session* session() const { return session_; }
  const StreamIds& ids() const { return ids_; }
  int64_t count() const { return ids_.size(); }

 private:
  tensorflow::core::RefCountPtr<SessionResource> resource_;
  Session* session_ = nullptr;
  absl::Span<const int32_t> streams_;
  StreamIds ids_;
};

// Shape functions: of ops whose inputs and outputs are scalars, and of ops with the input `streams`
// whose other inputs and outputs have one element for each stream.
absl::Status ScalarsShape(tensorflow::shape_inference::InferenceContext* c);
absl::Status OnePerStreamShape(tensorflow::shape_inference::InferenceContext* c);

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_TENSORFLOW_SESSION_OP_H_
