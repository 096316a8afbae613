#include "cc/server/outcome.h"

#include <new>

#include "cc/session/error.h"

namespace continual_transformers::server {

const char* NameOf(Reason reason) {
  switch (reason) {
    case Reason::kNone:
      return "none";
    case Reason::kInvalidArgument:
      return "invalid_argument";
    case Reason::kUnauthenticated:
      return "unauthenticated";
    case Reason::kNotFound:
      return "not_found";
    case Reason::kOutOfStep:
      return "out_of_step";
    case Reason::kEnded:
      return "ended";
    case Reason::kNotStarted:
      return "not_started";
    case Reason::kTooManyStreams:
      return "too_many_streams";
    case Reason::kQueueFull:
      return "queue_full";
    case Reason::kDeadline:
      return "deadline";
    case Reason::kCancelled:
      return "cancelled";
    case Reason::kUnavailable:
      return "unavailable";
    case Reason::kWrongServer:
      return "wrong_server";
    case Reason::kUnsupported:
      return "unsupported";
    case Reason::kInternal:
      return "internal";
  }
  return "internal";
}

std::string Quoted(const std::string& text) {
  constexpr size_t kMost = 80;
  std::string quoted = "\"";
  for (const char c : text.substr(0, kMost)) quoted += c >= ' ' && c < 0x7f && c != '"' ? c : '?';
  return quoted + (text.size() > kMost ? "...\"" : "\"");
}

Outcome OutcomeOf(const std::exception& error) {
  if (const auto* refusal = dynamic_cast<const Refusal*>(&error)) return refusal->outcome();
  if (const auto* of_session = dynamic_cast<const Error*>(&error)) {
    switch (of_session->code()) {
      case ErrorCode::kInvalidArgument:
      case ErrorCode::kBadModelFile:
      case ErrorCode::kOtherModel:
        return {Reason::kInvalidArgument, error.what(), {}};
      case ErrorCode::kUnknownStream:
        return {Reason::kNotFound, error.what(), {}};
      case ErrorCode::kTooManyStreams:
        return {Reason::kTooManyStreams, error.what(), {}};
      case ErrorCode::kIo:
      case ErrorCode::kInternal:
        return {Reason::kInternal, error.what(), {}};
    }
  }
  if (dynamic_cast<const std::bad_alloc*>(&error) != nullptr) {
    return {Reason::kTooManyStreams, "the server has no memory for this request", {}};
  }
  return {Reason::kInternal, error.what(), {}};
}

}  // namespace continual_transformers::server
