// What goes wrong in a session: a kind and a sentence that says what was got, what was expected,
// and how to mend it. Thrown inside; the C interface turns it into a code and a text.

#ifndef CONTINUAL_TRANSFORMERS_SESSION_ERROR_H_
#define CONTINUAL_TRANSFORMERS_SESSION_ERROR_H_

#include <stdexcept>
#include <string>

namespace continual_transformers {

enum class ErrorCode {
  kInvalidArgument = 1,  // A shape, dtype, value or option that does not fit.
  kBadModelFile = 2,     // A file that is truncated, foreign, newer, or wrong inside.
  kUnknownStream = 3,    // A stream id that was never given out, or was closed.
  kTooManyStreams = 4,   // No room for another stream, by `streams=` or by memory.
  kOtherModel = 5,       // State or weights of another model or another training.
  kIo = 6,               // A file that cannot be read or written.
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
