#include "cc/server/snapshot_file.h"

#include <fcntl.h>
#include <sqlite3.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <ctime>
#include <filesystem>
#include <set>
#include <utility>

#include "cc/session/error.h"
#include "cc/session/fingerprint.h"

namespace continual_transformers::server {
namespace {

constexpr char kSchema[] =
    "CREATE TABLE meta (key TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;"
    "INSERT INTO meta VALUES ('version', 1), ('drops', 0);"
    // `ended`: when the stream ended, in seconds since 1970, or 0. The row of a stream that ended
    // has only its last answer.
    "CREATE TABLE streams (name BLOB NOT NULL UNIQUE, ended INTEGER NOT NULL, copy BLOB NOT NULL);"
    "CREATE INDEX ended ON streams (ended) WHERE ended > 0;"
    "CREATE TABLE set_aside (name BLOB, time INTEGER, reason TEXT, copy BLOB);";

bool Exists(const std::string& path) {
  struct stat facts;
  return stat(path.c_str(), &facts) == 0;
}

std::string_view BlobOf(sqlite3_stmt* statement, int column) {
  const void* const data = sqlite3_column_blob(statement, column);
  const int bytes = sqlite3_column_bytes(statement, column);
  return {static_cast<const char*>(data), data == nullptr ? 0 : static_cast<size_t>(bytes)};
}

// Also resets a statement when something is thrown: one that is not reset keeps its transaction.
class Reset {
 public:
  explicit Reset(sqlite3_stmt* statement) : statement_(statement) {}
  ~Reset() {
    sqlite3_reset(statement_);
    sqlite3_clear_bindings(statement_);
  }
  Reset(const Reset&) = delete;
  Reset& operator=(const Reset&) = delete;

 private:
  sqlite3_stmt* const statement_;
};

class Finalize {
 public:
  explicit Finalize(sqlite3_stmt* statement) : statement_(statement) {}
  ~Finalize() { sqlite3_finalize(statement_); }
  Finalize(const Finalize&) = delete;
  Finalize& operator=(const Finalize&) = delete;
  sqlite3_stmt* get() const { return statement_; }

 private:
  sqlite3_stmt* const statement_;
};

}  // namespace

struct SnapshotFile::Note {
  char magic[8] = {'C', 'T', 'S', 'N', 'A', 'P', 'S', '1'};
  int64_t drops = 0;
  uint32_t clean = 0;
  uint32_t made = 0;  // the database has its tables
  uint64_t hash = 0;

  uint64_t Hash() const { return Xxh64(this, offsetof(Note, hash)); }
};

SnapshotFile::SnapshotFile(std::string path, bool power_loss)
    : path_(std::move(path)),
      database_(path_ + ".sqlite3"),
      note_(path_ + ".note"),
      power_loss_(power_loss) {}

SnapshotFile::~SnapshotFile() { Disconnect(); }

SnapshotFile::Contents SnapshotFile::Open(const Read& read) {
  CheckAccess();
  Contents contents;
  Note note;
  const bool exists = Exists(database_);
  const bool noted = ReadNote(&note);
  bool trusted = true;  // its rows may be read
  if (!exists) {
    if (noted && note.made != 0) contents.damage = "the file is missing";
    // A log without its file is of no use, and SQLite would take it for the new file's.
    std::remove((database_ + "-wal").c_str());
  } else {
    try {
      Connect();
      if (!HasTables()) {
        if (noted && note.made != 0) throw Error(ErrorCode::kIo, "it is empty");
        // The process was killed before it had made the tables.
        Run("BEGIN");
        Run(kSchema);
        Run("COMMIT");
      }
      const int64_t version = Value("SELECT value FROM meta WHERE key = 'version'");
      if (version != 1) {
        trusted = false;
        throw Error(ErrorCode::kIo, "it has version " + std::to_string(version) +
                                        ", and this server reads version 1");
      }
      drops_ = Value("SELECT value FROM meta WHERE key = 'drops'");
      if (!noted && Value("SELECT count(*) FROM streams") > 0) {
        trusted = false;
        throw Error(ErrorCode::kIo, "the note beside it is missing or damaged");
      }
      if (noted && drops_ < note.drops) {
        trusted = false;
        throw Error(ErrorCode::kIo,
                    "it has lost the newest changes: streams that have ended would "
                    "be open again");
      }
      const Finalize check(Prepare("PRAGMA quick_check(1)"));
      const int result = sqlite3_step(check.get());
      const std::string found(BlobOf(check.get(), 0));
      if (result != SQLITE_ROW || found != "ok") {
        throw Error(ErrorCode::kIo, result == SQLITE_ROW ? found : sqlite3_errmsg(db_));
      }
    } catch (const Error& error) {
      contents.damage = error.what();
      // Without these, nobody knows which rows are too old.
      if (!noted || drops_ < note.drops || db_ == nullptr) trusted = false;
    }
  }
  contents.clean = contents.damage.empty() && noted && note.clean != 0;

  std::vector<std::pair<int64_t, std::string>> aside;
  if (exists && trusted) {
    std::set<int64_t> seen;
    const auto row = [&](int64_t id, const std::string& name, std::string_view copy) {
      if (!seen.insert(id).second) return;
      std::string reason = read(name, copy, contents.clean);
      if (!reason.empty()) aside.emplace_back(id, std::move(reason));
    };
    try {
      ReadRows(false, row);
    } catch (const Error& error) {
      if (contents.damage.empty()) contents.damage = error.what();
      contents.clean = false;
      try {
        ReadRows(true, row);  // those after the damage
      } catch (const Error& from_end) {
        contents.damage += "; from the end: " + std::string(from_end.what());
      }
    }
  }
  contents.set_aside = static_cast<int64_t>(aside.size());
  if (exists && !contents.damage.empty()) {
    contents.aside = MoveAside();
    drops_ = 0;
  } else if (db_ != nullptr) {
    try {
      Run("BEGIN");
      for (const auto& [id, reason] : aside) SetAside(id, reason);
      Run("COMMIT");
    } catch (const Error&) {
      // The disk is full. They will be read again, and refused again.
      sqlite3_exec(db_, "ROLLBACK", nullptr, nullptr, nullptr);
    }
  }
  try {
    if (db_ == nullptr) Connect();
    WriteNote(false, HasTables(), true);
    noted_ = true;
  } catch (const Error&) {
    // The disk is full; Commit tries again. Until then no note may say that the file is clean.
    // Without one, its rows are not read.
    Disconnect();
    if (std::remove(note_.c_str()) != 0 && errno != ENOENT) {
      throw Error(ErrorCode::kIo, "cannot write or remove " + note_ + ": " + std::strerror(errno));
    }
  }
  return contents;
}

void SnapshotFile::CheckAccess() const {
  const std::string folder = std::filesystem::path(path_).parent_path().string();
  for (const std::string& path : {folder, database_, database_ + "-wal", note_}) {
    struct stat facts;
    if (lstat(path.c_str(), &facts) != 0) continue;
    if (!S_ISREG(facts.st_mode) && !S_ISDIR(facts.st_mode)) {
      throw Error(ErrorCode::kIo, path + " is no ordinary file: remove it");
    }
    if (access(path.c_str(), R_OK | W_OK) != 0) {
      throw Error(ErrorCode::kIo, "cannot read and write " + path + ": " + std::strerror(errno) +
                                      ". The server's user needs both");
    }
  }
}

void SnapshotFile::Connect() {
  const int result =
      sqlite3_open_v2(database_.c_str(), &db_,
                      SQLITE_OPEN_READWRITE | SQLITE_OPEN_CREATE | SQLITE_OPEN_NOMUTEX, nullptr);
  try {
    Check(result, "open");
    sqlite3_extended_result_codes(db_, 1);
    // Larger pages than SQLite's 4 KiB, as a row has tens of kilobytes.
    Run("PRAGMA page_size = 16384");
    // Only one process uses the file, and so the log needs no shared memory.
    Run("PRAGMA locking_mode = EXCLUSIVE");
    Run("PRAGMA journal_mode = WAL");
    Run(power_loss_ ? "PRAGMA synchronous = FULL" : "PRAGMA synchronous = NORMAL");
    Run("PRAGMA wal_autocheckpoint = 1000");
    Run("PRAGMA journal_size_limit = 67108864");
    // What was deleted is zeros: in a damaged file it must not look like a row again.
    Run("PRAGMA secure_delete = ON");
    Run("PRAGMA cell_size_check = ON");
    Run("PRAGMA trusted_schema = OFF");
    Run("PRAGMA temp_store = MEMORY");
  } catch (...) {
    Disconnect();
    throw;
  }
}

void SnapshotFile::Disconnect() {
  sqlite3_finalize(put_);
  sqlite3_finalize(delete_);
  put_ = delete_ = nullptr;
  sqlite3_close(db_);
  db_ = nullptr;
}

void SnapshotFile::ReadRows(
    bool backwards, const std::function<void(int64_t, const std::string&, std::string_view)>& row) {
  const Finalize select(Prepare(backwards
                                    ? "SELECT rowid, name, copy FROM streams ORDER BY rowid DESC"
                                    : "SELECT rowid, name, copy FROM streams ORDER BY rowid"));
  int result = sqlite3_step(select.get());
  for (; result == SQLITE_ROW; result = sqlite3_step(select.get())) {
    row(sqlite3_column_int64(select.get(), 0), std::string(BlobOf(select.get(), 1)),
        BlobOf(select.get(), 2));
  }
  if (result != SQLITE_DONE) Check(result, "read");
}

void SnapshotFile::SetAside(int64_t row, const std::string& reason) {
  const Finalize insert(
      Prepare("INSERT INTO set_aside SELECT name, ?1, ?2, copy FROM streams WHERE rowid = ?3"));
  sqlite3_bind_int64(insert.get(), 1, std::time(nullptr));
  sqlite3_bind_text(insert.get(), 2, reason.c_str(), -1, SQLITE_STATIC);
  sqlite3_bind_int64(insert.get(), 3, row);
  Check(sqlite3_step(insert.get()), "set a row aside");
  const Finalize erase(Prepare("DELETE FROM streams WHERE rowid = ?1"));
  sqlite3_bind_int64(erase.get(), 1, row);
  Check(sqlite3_step(erase.get()), "set a row aside");
}

void SnapshotFile::Commit(const std::vector<Change>& changes) {
  if (db_ == nullptr) Connect();
  if (!noted_) {
    WriteNote(false, HasTables(), true);
    noted_ = true;
  }
  try {
    Run("BEGIN IMMEDIATE");
    const bool makes = !HasTables();
    if (makes) Run(kSchema);
    if (put_ == nullptr) {
      put_ = Prepare(
          "INSERT INTO streams (name, ended, copy) VALUES (?1, ?2, ?3) ON CONFLICT (name) DO "
          "UPDATE "
          "SET ended = excluded.ended, copy = excluded.copy");
      delete_ = Prepare("DELETE FROM streams WHERE name = ?1");
    }
    bool drops = false;
    for (const Change& change : changes) {
      sqlite3_stmt* const statement = change.copy.empty() ? delete_ : put_;
      const Reset reset(statement);
      sqlite3_bind_blob64(statement, 1, change.name.data(), change.name.size(), SQLITE_STATIC);
      if (!change.copy.empty()) {
        sqlite3_bind_int64(statement, 2, change.drops ? std::time(nullptr) : 0);
        sqlite3_bind_blob64(statement, 3, change.copy.data(), change.copy.size(), SQLITE_STATIC);
      }
      Check(sqlite3_step(statement), "write a row");
      drops = drops || change.drops;
    }
    if (drops) Run("UPDATE meta SET value = value + 1 WHERE key = 'drops'");
    Run("COMMIT");
    if (drops) ++drops_;
    // After a failure of the system, the note may be older than the file, but not newer.
    if (drops || makes) WriteNote(false, true, makes);
  } catch (...) {
    // Some errors have rolled back already; then this one fails, and that is all right.
    sqlite3_exec(db_, "ROLLBACK", nullptr, nullptr, nullptr);
    throw;
  }
}

void SnapshotFile::DeleteEnded(int64_t before,
                               const std::function<void(const std::string& name)>& deleted) {
  if (db_ == nullptr || !HasTables()) return;  // The first commit makes them.
  std::vector<Change> changes;
  {
    const Finalize select(Prepare("SELECT name FROM streams WHERE ended > 0 AND ended < ?1"));
    sqlite3_bind_int64(select.get(), 1, before);
    int result = sqlite3_step(select.get());
    for (; result == SQLITE_ROW; result = sqlite3_step(select.get())) {
      changes.push_back({std::string(BlobOf(select.get(), 0)), "", false});
    }
    if (result != SQLITE_DONE) Check(result, "read");
  }
  if (changes.empty()) return;
  Commit(changes);
  for (const Change& change : changes) deleted(change.name);
}

void SnapshotFile::Finish() {
  if (db_ == nullptr) return;
  const bool made = HasTables();
  Disconnect();  // writes the log into the file
  noted_ = false;
  // If it could not be, the file is not complete without the log.
  if (!Exists(database_ + "-wal")) WriteNote(true, made, true);
}

std::string SnapshotFile::MoveAside() {
  Disconnect();
  std::string aside;
  for (int n = 1; aside.empty() || Exists(aside); ++n) {
    aside = database_ + ".damaged-" + std::to_string(n);
  }
  if (std::rename(database_.c_str(), aside.c_str()) != 0) {
    throw Error(ErrorCode::kIo, "cannot move the damaged file " + database_ + " to " + aside +
                                    ": " + std::strerror(errno));
  }
  std::rename((database_ + "-wal").c_str(), (aside + "-wal").c_str());
  return aside;
}

bool SnapshotFile::HasTables() {
  return Value("SELECT count(*) FROM sqlite_schema WHERE name = 'streams'") > 0;
}

void SnapshotFile::Run(const char* sql) {
  Check(sqlite3_exec(db_, sql, nullptr, nullptr, nullptr), sql);
}

int64_t SnapshotFile::Value(const char* sql) {
  const Finalize select(Prepare(sql));
  const int result = sqlite3_step(select.get());
  if (result == SQLITE_DONE) throw Error(ErrorCode::kIo, "a table has lost its rows");
  if (result != SQLITE_ROW) Check(result, sql);
  return sqlite3_column_int64(select.get(), 0);
}

sqlite3_stmt* SnapshotFile::Prepare(const char* sql) {
  sqlite3_stmt* statement = nullptr;
  Check(sqlite3_prepare_v2(db_, sql, -1, &statement, nullptr), sql);
  return statement;
}

void SnapshotFile::Check(int result, const char* what) {
  if (result == SQLITE_OK || result == SQLITE_DONE || result == SQLITE_ROW) return;
  std::string message = db_ == nullptr ? sqlite3_errstr(result) : sqlite3_errmsg(db_);
  const int error = db_ == nullptr ? 0 : sqlite3_system_errno(db_);
  if (error != 0 && result != SQLITE_CORRUPT) message += std::string(": ") + std::strerror(error);
  throw Error(ErrorCode::kIo, message + " (SQLite error " + std::to_string(result) + ", " + what +
                                  ", " + database_ + ")");
}

bool SnapshotFile::ReadNote(Note* note) const {
  std::FILE* const file = std::fopen(note_.c_str(), "rbe");
  if (file == nullptr) return false;
  Note read;
  const size_t bytes = std::fread(&read, 1, sizeof(read), file);
  const bool at_end = std::fgetc(file) == EOF;
  std::fclose(file);
  if (bytes != sizeof(read) || !at_end || read.hash != read.Hash() ||
      std::memcmp(read.magic, note->magic, sizeof(read.magic)) != 0) {
    return false;
  }
  *note = read;
  return true;
}

void SnapshotFile::WriteNote(bool clean, bool made, bool sync) {
  Note note;
  note.drops = drops_;
  note.clean = clean ? 1 : 0;
  note.made = made ? 1 : 0;
  note.hash = note.Hash();
  const int file = open(note_.c_str(), O_WRONLY | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
  // One call, so that a process that is killed has written all of it or nothing.
  const bool written = file >= 0 &&
                       pwrite(file, &note, sizeof(note), 0) == static_cast<ssize_t>(sizeof(note)) &&
                       (!sync || !power_loss_ || fsync(file) == 0);
  const int error = errno;
  if (file >= 0) close(file);
  if (!written) {
    throw Error(ErrorCode::kIo, "cannot write " + note_ + ": " + std::strerror(error));
  }
}

}  // namespace continual_transformers::server
