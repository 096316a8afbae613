// What the entries of one shard of the journal say about its streams.

#ifndef CONTINUAL_TRANSFORMERS_SERVER_SHARD_HISTORY_H_
#define CONTINUAL_TRANSFORMERS_SERVER_SHARD_HISTORY_H_

#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "cc/server/journal_entry.h"
#include "cc/server/replay.h"
#include "cc/server/served_model.h"
#include "cc/session/session.h"

namespace continual_transformers::server {

class ShardHistory {
 public:
  ShardHistory(std::string model, uint64_t plan_fingerprint, int64_t receptive_field);

  // Reads the next entry. Returns its rows, without data. There are none if the entry was read
  // before. An entry that is damaged, or of another model, makes everything before it unknown, as
  // nobody knows which streams it was about; this is logged.
  std::vector<JournalRow> Add(std::string_view entry);

  // A stream that took steps or was copied, and that the server did not end.
  struct Known {
    StreamHistory history;
    std::optional<StreamCopy> copy;  // with which it began
    std::vector<uint64_t> weights;   // of each steps of the history
    bool ended = false;              // by its client
    // Neither steps nor a copy: it began without a step.
  };
  std::map<std::string, Known>& streams() { return streams_; }
  // Streams whose end is the last that is known of them.
  const std::set<std::string>& ended() const { return ended_; }

 private:
  void ReadRow(const JournalRow& row, uint64_t weights);

  const std::string model_;
  const uint64_t plan_fingerprint_;
  const int64_t receptive_field_;
  std::map<std::string, Known> streams_;
  std::set<std::string> ended_;
  std::map<uint64_t, uint64_t> numbers_;  // of the newest entry, by writer
  std::string damage_;                    // that was logged last
};

// Returns the stream as it was after its last step, with the answer to it if it was numbered.
// Throws Error (kInvalidArgument) if steps are missing, or (kOtherModel) if they were taken with
// other weights and `other_weights` is not set.
StreamCopy RebuildStream(Session* session, int64_t receptive_field, bool other_weights,
                         ShardHistory::Known* known);

}  // namespace continual_transformers::server

#endif  // CONTINUAL_TRANSFORMERS_SERVER_SHARD_HISTORY_H_
