// A copy of a stream as bytes: what an operator copies from one server to another, and what a
// snapshot holds.
//
// The bytes, little-endian: the magic "CTSTREAM"; the version, uint32; flags, uint32, of which
// 1 is may_lag; the sizes of the name, state and answer, uint64 each; last_first and last_steps,
// int64; last_inputs, uint64; the name, state and answer; the XXH64 of everything before it.

#ifndef CONTINUAL_TRANSFORMERS_SERVER_STREAM_COPY_H_
#define CONTINUAL_TRANSFORMERS_SERVER_STREAM_COPY_H_

#include <string>
#include <string_view>

#include "cc/server/served_model.h"

namespace continual_transformers::server {

std::string EncodeStreamCopy(const StreamCopy& copy);

// Throws Refusal (kInvalidArgument) if the bytes are not such a copy as a whole: of another kind,
// of a newer version, cut off, followed by others, or changed.
StreamCopy DecodeStreamCopy(std::string_view bytes);

}  // namespace continual_transformers::server

#endif  // CONTINUAL_TRANSFORMERS_SERVER_STREAM_COPY_H_
