// What this server knows of the journal of one shard: which entries Redis has, and which of them
// open streams need.

#ifndef CONTINUAL_TRANSFORMERS_SERVER_SHARD_LOG_H_
#define CONTINUAL_TRANSFORMERS_SERVER_SHARD_LOG_H_

#include <cstdint>
#include <deque>
#include <string>
#include <unordered_map>
#include <vector>

namespace continual_transformers::server {

struct JournalRow;

class ShardLog {
 public:
  explicit ShardLog(int64_t receptive_field = 1) : receptive_field_(receptive_field) {}

  // The id of an entry in a Redis stream, "epoch-number".
  struct Id {
    uint64_t epoch = 0, number = 0;
    static Id Of(const char* text);
    std::string text() const;
  };

  // Redis has a new entry. The data of rows is not looked at.
  void Append(Id id, int64_t bytes, const std::vector<JournalRow>& rows);
  // The stream is not kept here any more.
  void Forget(const std::string& stream) { streams_.erase(stream); }

  int64_t entries() const { return static_cast<int64_t>(entries_.size()); }
  size_t streams() const { return streams_.size(); }
  int64_t appended() const { return next_ - trimmed_to_; }  // entries since the last Trim

  // Forgets entries that no stream needs, but the newest `spare` ones. Returns how many there were;
  // `oldest` is the first that is left.
  int64_t Trim(int64_t spare, Id* oldest);
  // Streams whose oldest needed entry has more than this many bytes of entries after it.
  std::vector<std::string> Behind(int64_t bytes) const;

 private:
  struct Entry {
    Id id;
    int64_t end;  // bytes of all entries up to this one
  };
  struct Request {
    int64_t first;  // its first step
    int64_t entry;
  };
  struct Stream {
    // How the stream began, or a copy of it.
    int64_t base = 0, base_step = 0;
    bool keeps_base = false;
    std::deque<Request> requests;  // after it, as far as they are needed
  };

  int64_t NeededBy(const Stream& stream) const;

  int64_t receptive_field_;
  std::deque<Entry> entries_;  // those from number next_ - size on
  int64_t next_ = 0;
  int64_t trimmed_to_ = 0;
  int64_t end_ = 0;
  std::unordered_map<std::string, Stream> streams_;
};

}  // namespace continual_transformers::server

#endif  // CONTINUAL_TRANSFORMERS_SERVER_SHARD_LOG_H_
