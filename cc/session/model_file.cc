#include "cc/session/model_file.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstring>
#include <limits>
#include <new>

#include "cc/session/error.h"
#include "cc/session/fingerprint.h"
#include "cc/session/strict_json.h"

namespace continual_transformers {
namespace {

using nlohmann::json;

constexpr size_t kLengthBytes = 8;
constexpr uint64_t kMostHeaderBytes = 100'000'000;  // the limit of the safetensors library
constexpr char kFormat[] = "continual-transformers";
constexpr char kFormatVersion[] = "1";

struct DTypeName {
  const char* name;
  DType dtype;
};
constexpr DTypeName kDTypes[] = {
    {"F32", DType::kFloat32}, {"F64", DType::kFloat64}, {"BF16", DType::kBFloat16},
    {"F16", DType::kFloat16}, {"I32", DType::kInt32},   {"I64", DType::kInt64},
    {"BOOL", DType::kBool},
};

[[noreturn]] void FailIo(const std::string& what, const std::string& path, int error) {
  throw Error(ErrorCode::kIo, what + " " + path + ": " + std::strerror(error));
}

// A file descriptor that closes itself.
class Descriptor {
 public:
  explicit Descriptor(int fd) : fd_(fd) {}
  ~Descriptor() {
    if (fd_ >= 0) close(fd_);
  }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  int get() const { return fd_; }
  // Returns whether closing succeeded. Some file systems report a full disk only here.
  bool Close() {
    const int fd = fd_;
    fd_ = -1;
    return close(fd) == 0;
  }

 private:
  int fd_;
};

// Describes another kind of file by its first bytes. Empty: unknown.
std::string OtherKind(const char* data, size_t size) {
  const auto begins = [&](const std::string& text) {
    return size >= text.size() && std::memcmp(data, text.data(), text.size()) == 0;
  };
  if (begins("PK\x03\x04")) {
    return "it is a ZIP archive, like a .keras file: make a model file of it with "
           "`continual-transformers pack model.keras model.safetensors`";
  }
  if (begins("\x89HDF\r\n")) {
    return "it is an HDF5 file: load it with Keras, and save a session of the model with "
           "session.save(...)";
  }
  return "";
}

// Returns the size of the JSON header in bytes.
size_t HeaderBytes(const char* data, size_t size) {
  const std::string other = OtherKind(data, size);
  // `other` has its own cure. Refuse would add that the file should be written again.
  if (!other.empty()) {
    throw Error(ErrorCode::kBadModelFile, "expected a safetensors file, but " + other);
  }
  if (size < kLengthBytes) {
    Refuse("expected a safetensors file, but it has only " + std::to_string(size) + " bytes");
  }
  uint64_t length;
  std::memcpy(&length, data, kLengthBytes);
  if (length > kMostHeaderBytes) {
    Refuse("expected a safetensors file, but its first 8 bytes are not the length of a header");
  }
  if (length > size - kLengthBytes) {
    Refuse("it is truncated, or not a safetensors file: its header has " + std::to_string(length) +
           " bytes, but only " + std::to_string(size - kLengthBytes) + " follow");
  }
  return static_cast<size_t>(length);
}

// Returns the plan's JSON, after checking the other entries of the metadata.
std::string PlanOf(const json& header) {
  const auto metadata = header.find("__metadata__");
  const std::string what = "the header's \"__metadata__\"";
  if (metadata == header.end() || !metadata->is_object() || !metadata->contains("format") ||
      (*metadata)["format"] != kFormat) {
    Refuse(
        "it is a safetensors file, but not a model file: its metadata does not have \"format\": "
        "\"" +
        std::string(kFormat) + "\"");
  }
  ObjectReader reader(*metadata, what);
  const std::string version = reader.Text("format_version");
  if (version != kFormatVersion) {
    RefuseAsNewer("its format version is " + Quoted(version) + ", this version reads \"" +
                  kFormatVersion + "\"");
  }
  return reader.Text("plan");  // Other entries are allowed.
}

Tensor TensorOf(const json& entry, const std::string& name, const char* data, size_t size) {
  const std::string what = "the tensor " + Quoted(name);
  ObjectReader reader(entry, what);
  Tensor tensor;
  const std::string dtype = reader.Text("dtype");
  const DTypeName* known = nullptr;
  for (const DTypeName& candidate : kDTypes) {
    if (dtype == candidate.name) known = &candidate;
  }
  if (known == nullptr) {
    RefuseAsNewer(what + " has the dtype " + Quoted(dtype) + ", which this version does not know");
  }
  tensor.dtype = known->dtype;
  uint64_t bytes = static_cast<uint64_t>(SizeOf(tensor.dtype));
  for (const json& axis : reader.List("shape")) {
    int64_t length;
    if (!IsWhole(axis, &length) || length < 0 ||
        (length > 0 &&
         bytes > static_cast<uint64_t>(std::numeric_limits<int64_t>::max() / length))) {
      Refuse(what + " has the shape " + Shown(entry["shape"]) +
             ", expected whole numbers whose product is a size in memory");
    }
    tensor.shape.push_back(length);
    bytes *= static_cast<uint64_t>(length);
  }
  const json& offsets = reader.List("data_offsets");
  int64_t begin, end;
  if (offsets.size() != 2 || !IsWhole(offsets[0], &begin) || !IsWhole(offsets[1], &end) ||
      begin < 0 || end < begin) {
    Refuse(what + " has the data_offsets " + Shown(offsets) + ", expected [begin, end]");
  }
  if (static_cast<uint64_t>(end) > size) {
    Refuse(what + " ends at byte " + std::to_string(end) + " of the data, which has only " +
           std::to_string(size) + ": the file is truncated");
  }
  if (static_cast<uint64_t>(end - begin) != bytes) {
    Refuse(what + " has " + std::to_string(end - begin) + " bytes, but its shape " +
           Shown(entry["shape"]) + " in " + NameOf(tensor.dtype) + " has " + std::to_string(bytes));
  }
  reader.RefuseOthers();
  tensor.data = data + begin;
  tensor.bytes = end - begin;
  return tensor;
}

// Hashes the tensors in the plan's order: node by node, sorted by the weights' names. A tensor that
// several nodes share is read once.
uint64_t WeightsFingerprint(const ModelFile& file) {
  std::map<std::string, int64_t> hashes;
  Fingerprint print;
  for (const Node& node : file.plan().nodes) {
    for (const auto& weight : node.weights) {
      auto found = hashes.find(weight.second);
      if (found == hashes.end()) {
        const Tensor& tensor = file.tensor(weight.second);
        const uint64_t hash = Xxh64(tensor.data, static_cast<size_t>(tensor.bytes));
        found = hashes.emplace(weight.second, static_cast<int64_t>(hash)).first;
      }
      print.Add(found->second);
    }
  }
  return print.Hash();
}

// Writes all bytes, in as many calls as needed. Returns 0 or errno.
int WriteAll(int fd, const char* data, size_t size) {
  while (size > 0) {
    const ssize_t written = write(fd, data, size);
    if (written < 0) {
      if (errno == EINTR) continue;
      return errno;
    }
    data += written;
    size -= static_cast<size_t>(written);
  }
  return 0;
}

}  // namespace

std::shared_ptr<const ModelFile> ModelFile::Map(const std::string& path) {
  // O_NONBLOCK: a pipe is refused below; opening must not wait for it.
  Descriptor fd(open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  if (fd.get() < 0) FailIo("cannot open the model file", path, errno);
  struct stat status;
  if (fstat(fd.get(), &status) != 0) FailIo("cannot read the model file", path, errno);
  if (S_ISDIR(status.st_mode)) FailIo("cannot read the model file", path, EISDIR);
  if (!S_ISREG(status.st_mode)) {
    throw Error(ErrorCode::kIo, "cannot map the model file " + path + ": it is not a regular file");
  }
  const std::shared_ptr<ModelFile> file(new ModelFile);
  file->size_ = static_cast<size_t>(status.st_size);
  if (file->size_ > 0) {  // mmap refuses an empty file; the message of Parse is better.
    void* data = mmap(nullptr, file->size_, PROT_READ, MAP_PRIVATE, fd.get(), 0);
    if (data == MAP_FAILED) FailIo("cannot map the model file", path, errno);
    file->data_ = data;
    file->mapped_ = true;
  }
  try {
    file->Parse();
  } catch (const Error& error) {
    throw Error(error.code(), "cannot load " + path + ": " + error.what());
  }
  return file;
}

std::shared_ptr<const ModelFile> ModelFile::Copy(const void* data, size_t bytes) {
  const std::shared_ptr<ModelFile> file(new ModelFile);
  void* copy = nullptr;
  // Allocate exactly `bytes`, so that AddressSanitizer catches reads past the end.
  if (posix_memalign(&copy, 64, bytes > 0 ? bytes : 1) != 0) throw std::bad_alloc();
  if (bytes > 0) std::memcpy(copy, data, bytes);
  file->data_ = copy;
  file->size_ = bytes;
  file->Parse();
  return file;
}

ModelFile::~ModelFile() {
  if (mapped_) {
    munmap(const_cast<void*>(data_), size_);
  } else {
    free(const_cast<void*>(data_));
  }
}

void ModelFile::Parse() {
  const char* bytes = static_cast<const char*>(data_);
  const size_t header_bytes = HeaderBytes(bytes, size_);
  const json header = ParseJson(bytes + kLengthBytes, header_bytes, "the safetensors header");
  if (!header.is_object()) {
    Refuse("the safetensors header is " + Shown(header) + ", expected a JSON object");
  }
  const std::string plan = PlanOf(header);
  const char* tensors = bytes + kLengthBytes + header_bytes;
  const size_t tensors_bytes = size_ - kLengthBytes - header_bytes;
  for (const auto& member : header.items()) {
    if (member.key() == "__metadata__") continue;
    tensors_[member.key()] = TensorOf(member.value(), member.key(), tensors, tensors_bytes);
  }
  plan_ = ParsePlan(plan, [this](const std::string& name) -> const Tensor* {
    const auto found = tensors_.find(name);
    return found == tensors_.end() ? nullptr : &found->second;
  });
  weights_fingerprint_ = WeightsFingerprint(*this);
}

const Tensor& ModelFile::tensor(const std::string& name) const {
  const auto found = tensors_.find(name);
  if (found == tensors_.end()) {
    throw Error(ErrorCode::kInternal, "the model file has no tensor " + Quoted(name));
  }
  return found->second;
}

void ModelFile::Save(const std::string& path) const {
  const std::string what = "cannot write the model file";
  // In the same folder: a rename cannot cross file systems.
  std::string temporary;
  int fd = -1;
  for (int attempt = 0; fd < 0; ++attempt) {
    temporary = path + ".tmp" + std::to_string(getpid()) + "-" + std::to_string(attempt);
    // O_EXCL: two savers never write the same file. 0666: the umask decides, as for any new file.
    fd = open(temporary.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    if (fd < 0 && (errno != EEXIST || attempt == 1000)) FailIo(what, path, errno);
  }
  Descriptor file(fd);
  int error = WriteAll(fd, static_cast<const char*>(data_), size_);
  if (error == 0 && fsync(fd) != 0) error = errno;
  if (!file.Close() && error == 0) error = errno;
  if (error == 0 && rename(temporary.c_str(), path.c_str()) != 0) error = errno;
  if (error != 0) {
    unlink(temporary.c_str());
    FailIo(what, path, error);
  }
  // fsync of the folder makes the rename survive a power cut. Some file systems refuse it; the file
  // is complete even then.
  const size_t slash = path.rfind('/');
  const std::string folder = slash == std::string::npos ? "." : path.substr(0, slash + 1);
  Descriptor folder_fd(open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (folder_fd.get() >= 0) fsync(folder_fd.get());
}

}  // namespace continual_transformers
