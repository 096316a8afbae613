// How a request ended: with its answer, or with the reason why it was refused.

#ifndef CONTINUAL_TRANSFORMERS_SERVER_OUTCOME_H_
#define CONTINUAL_TRANSFORMERS_SERVER_OUTCOME_H_

#include <cstdint>
#include <exception>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace continual_transformers::server {

struct ShardTable;

enum class Reason {
  kNone,             // not refused
  kInvalidArgument,  // a tensor, parameter or name that does not fit
  kUnauthenticated,  // no token, or a wrong one
  kNotFound,         // no such model, stream or page
  kOutOfStep,        // a step number with a gap before it, or of a step taken long ago
  kEnded,            // the server had ended the stream; this is said once
  kNotStarted,       // --strict-start: no such stream, and no sequence_start
  kTooManyStreams,
  kQueueFull,
  kDeadline,   // the client's deadline passed before its turn
  kCancelled,  // the client went away before its turn
  // Loading or draining. Also: the steps were taken, but the journal or a snapshot cannot be
  // written.
  kUnavailable,
  kWrongServer,  // the stream's shard is another server's
  kUnsupported,  // a part of the protocol that this server does not have
  kInternal,
};
constexpr int kReasons = static_cast<int>(Reason::kInternal) + 1;

const char* NameOf(Reason reason);  // "out_of_step": for metrics and logs

// A stream that stands in the way of a request, and the step that it expects.
struct ExpectedStep {
  std::string stream;
  int64_t step;
};

struct Outcome {
  Reason reason = Reason::kNone;
  std::string message;
  std::vector<ExpectedStep> expected;
  std::shared_ptr<const ShardTable> shards = nullptr;  // for kWrongServer: says who has the stream

  bool ok() const { return reason == Reason::kNone; }
};

// A refusal, thrown where a request is read. Nothing has moved by then.
class Refusal : public std::runtime_error {
 public:
  Refusal(Reason reason, const std::string& message)
      : std::runtime_error(message), reason_(reason) {}
  Reason reason() const { return reason_; }
  Outcome outcome() const { return {reason_, what(), {}}; }

 private:
  Reason reason_;
};

// Formats a client's text for a message: in quotes, at most 80 bytes, and only printable ASCII, as
// logs, HTTP headers and protobuf's strings do not take every byte.
std::string Quoted(const std::string& text);

// The outcome that a caught exception stands for: a Refusal, an Error of cc/session, or another.
Outcome OutcomeOf(const std::exception& error);

}  // namespace continual_transformers::server

#endif  // CONTINUAL_TRANSFORMERS_SERVER_OUTCOME_H_
