// An entry of the journal: what happened to streams of one shard in one batch.
//
// The bytes, little-endian: the magic "CTJOURN2"; the fingerprints of plan and weights, the server,
// the writer and its number of the entry, uint64 each; how many rows there are, uint64. For each
// row: flags, uint32; the size of the name, uint32; first and steps, int64 each; the size of the
// data, uint64; the name; the data. At the end, the XXH64 of everything before it.

#ifndef CONTINUAL_TRANSFORMERS_SERVER_JOURNAL_ENTRY_H_
#define CONTINUAL_TRANSFORMERS_SERVER_JOURNAL_ENTRY_H_

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace continual_transformers::server {

struct JournalHeader {
  uint64_t plan = 0, weights = 0;
  // A hash of the server's name in the table of shards. A server without a table is its process.
  uint64_t server = 0;
  // A random number of the process that wrote it, and its count of entries in this shard: an entry
  // that was sent again, after a connection broke, is read once.
  uint64_t writer = 0, number = 0;
};

struct JournalRow {
  enum Flags : uint32_t {
    kBegan = 1,        // with these steps
    kEnded = 2,        // after them
    kNumbered = 4,     // the request had step numbers
    kCopy = 8,         // the data is a copy of the stream (stream_copy.h), which is at step `first`
    kHasOffsets = 16,  // of a copy: it cannot be replaced by the inputs after it (replay.h)
    kByServer = 32,    // of an end: the client did not ask for it
  };
  uint32_t flags = 0;
  std::string name;
  int64_t first = 0, steps = 0;
  std::string_view data;  // [steps, ...] of each input of the plan, one after another
};

class JournalEntryWriter {
 public:
  explicit JournalEntryWriter(const JournalHeader& header);

  // Adds a row without its data. Append adds it, in pieces, `data_bytes` together.
  void AddRow(uint32_t flags, std::string_view name, int64_t first, int64_t steps,
              size_t data_bytes);
  void Append(const void* data, size_t bytes) {
    bytes_.append(static_cast<const char*>(data), bytes);
  }
  std::string Finish();

 private:
  std::string bytes_;
  uint64_t rows_ = 0;
};

// Reads an entry. `rows` point into the bytes. Throws Error (kInvalidArgument) if they are damaged.
JournalHeader ReadJournalEntry(std::string_view bytes, std::vector<JournalRow>* rows);

}  // namespace continual_transformers::server

#endif  // CONTINUAL_TRANSFORMERS_SERVER_JOURNAL_ENTRY_H_
