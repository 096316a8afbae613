// Errors of a session: a code and a message that says what was got, what was expected and how to
// fix it. The C++ code throws them. The C interface turns them into a status and a text.

#ifndef CONTINUAL_TRANSFORMERS_SESSION_ERROR_H_
#define CONTINUAL_TRANSFORMERS_SESSION_ERROR_H_

#include <stdexcept>
#include <string>

namespace continual_transformers {

enum class ErrorCode {
  kInvalidArgument = 1,  // a shape, dtype, value or option that does not fit
  kBadModelFile = 2,     // a file that is truncated, of another kind, newer, or corrupt
  kUnknownStream = 3,    // a stream id that never existed, or was closed
  kTooManyStreams = 4,   // no room for another stream: the limit `streams=`, or memory
  kOtherModel = 5,       // a state or weights of another model, or of another training
  kIo = 6,               // a file that cannot be read or written
  kInternal = 7,
};

class Error : public std::runtime_error {
 public:
  Error(ErrorCode code, const std::string& what) : std::runtime_error(what), code_(code) {}
  ErrorCode code() const { return code_; }

 private:
  ErrorCode code_;
};

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_SESSION_ERROR_H_
