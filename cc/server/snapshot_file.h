// The file with the snapshots of one model's streams: an SQLite database with a row for each
// stream, and a note of 32 bytes beside it.
//
// SQLite finds most damage by itself, and every row has a checksum (stream_copy.h). The note is for
// what both do not see: a write-ahead log that was cut off gives back an older state of the file,
// in which streams that ended are open. The note counts the transactions with such an end, so a
// file with fewer is not read. The note also says whether the file was closed with everything
// written. It is overwritten in place, which works on a full disk too.

#ifndef CONTINUAL_TRANSFORMERS_SERVER_SNAPSHOT_FILE_H_
#define CONTINUAL_TRANSFORMERS_SERVER_SNAPSHOT_FILE_H_

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

struct sqlite3;
struct sqlite3_stmt;

namespace continual_transformers::server {

// One thread at a time uses a file. Errors are thrown as Error (kIo).
class SnapshotFile {
 public:
  // `path` without its ending. With `power_loss`, a transaction is on the disk when Commit returns;
  // without, it is with the system, which writes it even if this process is killed.
  SnapshotFile(std::string path, bool power_loss);
  ~SnapshotFile();
  SnapshotFile(const SnapshotFile&) = delete;
  SnapshotFile& operator=(const SnapshotFile&) = delete;

  struct Contents {
    bool clean = false;  // the file was closed with everything written
    std::string damage;  // what was wrong with it; empty: nothing
    std::string aside;   // where a damaged file was moved
    int64_t set_aside = 0;
  };
  // Opens the file, and calls `read` for each row, with whether the file was closed with everything
  // written. If that returns a reason, the row is set aside: it is kept, and not read again. A file
  // that is damaged is moved aside, after the rows that can be read were read. Throws nothing: a
  // file that cannot be made is made by a later Commit.
  using Read =
      std::function<std::string(const std::string& name, std::string_view copy, bool clean)>;
  Contents Open(const Read& read);

  struct Change {
    std::string name;
    std::string copy;    // empty: the row is deleted
    bool drops = false;  // it ends a stream
  };
  // Makes all changes, in order, or none.
  void Commit(const std::vector<Change>& changes);
  // Deletes what is left of streams that ended before this time, in seconds since 1970.
  void DeleteEnded(int64_t before, const std::function<void(const std::string& name)>& deleted);
  // Closes the file, and notes that everything is written.
  void Finish();
  // Closes the file and moves it aside.
  std::string MoveAside();

 private:
  struct Note;

  // Throws Error (kIo) if a file is there that this process may not read and write: it is not
  // damaged, and must not be moved aside.
  void CheckAccess() const;

  void Connect();
  void Disconnect();
  void ReadRows(bool backwards,
                const std::function<void(int64_t, const std::string&, std::string_view)>& row);
  void SetAside(int64_t row, const std::string& reason);
  bool HasTables();
  void Run(const char* sql);
  int64_t Value(const char* sql);
  sqlite3_stmt* Prepare(const char* sql);
  void Check(int result, const char* what);
  bool ReadNote(Note* note) const;
  void WriteNote(bool clean, bool made, bool sync);

  const std::string path_, database_, note_;
  const bool power_loss_;
  sqlite3* db_ = nullptr;
  sqlite3_stmt* put_ = nullptr;
  sqlite3_stmt* delete_ = nullptr;
  int64_t drops_ = 0;   // transactions that ended streams
  bool noted_ = false;  // the note is there, and says that the file is not clean
};

}  // namespace continual_transformers::server

#endif  // CONTINUAL_TRANSFORMERS_SERVER_SNAPSHOT_FILE_H_
