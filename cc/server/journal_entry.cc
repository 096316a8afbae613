#include "cc/server/journal_entry.h"

#include <cstring>

#include "cc/session/error.h"
#include "cc/session/fingerprint.h"

namespace continual_transformers::server {
namespace {

constexpr char kMagic[] = "CTJOURN2";

struct Header {
  char magic[8];
  uint64_t plan, weights, server, writer, number;
  uint64_t rows;
};
static_assert(sizeof(Header) == 56, "the header has no padding");

struct RowHeader {
  uint32_t flags, name_bytes;
  int64_t first, steps;
  uint64_t data_bytes;
};
static_assert(sizeof(RowHeader) == 32, "the header has no padding");

[[noreturn]] void Damaged(const std::string& how) {
  throw Error(ErrorCode::kInvalidArgument, "an entry of the journal is damaged: " + how);
}

}  // namespace

JournalEntryWriter::JournalEntryWriter(const JournalHeader& header) {
  Header bytes = {};
  std::memcpy(bytes.magic, kMagic, sizeof(bytes.magic));
  bytes.plan = header.plan;
  bytes.weights = header.weights;
  bytes.server = header.server;
  bytes.writer = header.writer;
  bytes.number = header.number;
  Append(&bytes, sizeof(bytes));
}

void JournalEntryWriter::AddRow(uint32_t flags, std::string_view name, int64_t first, int64_t steps,
                                size_t data_bytes) {
  const RowHeader header = {flags, static_cast<uint32_t>(name.size()), first, steps, data_bytes};
  bytes_.reserve(bytes_.size() + sizeof(header) + name.size() + data_bytes + sizeof(uint64_t));
  Append(&header, sizeof(header));
  bytes_ += name;
  ++rows_;
}

std::string JournalEntryWriter::Finish() {
  std::memcpy(bytes_.data() + offsetof(Header, rows), &rows_, sizeof(rows_));
  const uint64_t hash = Xxh64(bytes_.data(), bytes_.size());
  Append(&hash, sizeof(hash));
  return std::move(bytes_);
}

JournalHeader ReadJournalEntry(std::string_view bytes, std::vector<JournalRow>* rows) {
  rows->clear();
  Header header;
  uint64_t hash = 0;
  if (bytes.size() < sizeof(header) + sizeof(hash)) Damaged("it is cut off");
  std::memcpy(&header, bytes.data(), sizeof(header));
  if (std::memcmp(header.magic, kMagic, sizeof(header.magic)) != 0) {
    Damaged("it does not begin with " + std::string(kMagic));
  }
  bytes.remove_suffix(sizeof(hash));
  std::memcpy(&hash, bytes.data() + bytes.size(), sizeof(hash));
  if (hash != Xxh64(bytes.data(), bytes.size())) Damaged("its checksum does not fit its contents");
  bytes.remove_prefix(sizeof(header));
  const auto take = [&](uint64_t size) {
    if (size > bytes.size()) Damaged("its sizes do not fit");
    const std::string_view part = bytes.substr(0, size);
    bytes.remove_prefix(size);
    return part;
  };
  for (uint64_t i = 0; i < header.rows; ++i) {
    RowHeader row;
    std::memcpy(&row, take(sizeof(row)).data(), sizeof(row));
    const std::string_view name = take(row.name_bytes);
    rows->push_back({row.flags, std::string(name), row.first, row.steps, take(row.data_bytes)});
  }
  return {header.plan, header.weights, header.server, header.writer, header.number};
}

}  // namespace continual_transformers::server
