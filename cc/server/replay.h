// Rebuilds a stream from its inputs.
//
// A stream is a function of the inputs of its last receptive field, and of what lives longer than
// that:
//
// - its position, which decides which row of a positional encoding is added, which rows of rings
//   are next, and how much of a window has been filled;
// - the offset of each positional encoding, which is 0 unless the stream came from a copy;
// - the rounding of sums that retroactive attention carries from step to step. A rebuilt stream has
//   them computed afresh, which is within the same bounds (retroactive.h).
//
// So a fresh stream that is set to the right position and offsets, and takes the inputs of the last
// receptive field, goes on as the lost one would: within the bounds for steps that are taken in
// other batches. What it writes before it has seen a whole receptive field is not used.

#ifndef CONTINUAL_TRANSFORMERS_SERVER_REPLAY_H_
#define CONTINUAL_TRANSFORMERS_SERVER_REPLAY_H_

#include <cstdint>
#include <string>
#include <vector>

#include "cc/server/served_model.h"
#include "cc/session/session.h"

namespace continual_transformers::server {

// Returns on how many steps an output depends at most, the step itself included. It is found from
// the nodes, and not taken from the file, which may say anything.
int64_t ReceptiveField(const Plan& plan);

// Whether the stream of a copy (Session::GetState) has something that its inputs do not bring back:
// an offset.
bool HasOffsets(const Session& session, const std::string& state);

// What is known of a stream: how it began, and steps that it took from then on or later.
struct StreamHistory {
  std::string name;
  // Its state before the steps, and at which position; empty: a stream that began, at 0.
  std::string state;
  int64_t state_position = 0;

  // One request's.
  struct Steps {
    int64_t first, count;
    std::string inputs;  // [count, ...] of each input of the plan, one after another
    bool numbered;
  };
  std::vector<Steps> steps;  // without a gap
};

// The first step that Rebuild needs: from there on, the inputs are enough.
int64_t FirstNeeded(int64_t receptive_field, int64_t last_first);

// Returns the stream after all steps, with the answer to the last ones if they were numbered.
// Throws Error (kInvalidArgument) if steps are missing.
StreamCopy Rebuild(Session* session, const StreamHistory& history, bool other_weights = false);

}  // namespace continual_transformers::server

#endif  // CONTINUAL_TRANSFORMERS_SERVER_REPLAY_H_
