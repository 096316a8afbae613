// A model file in memory: the plan and its tensors. See docs/model_file.md.

#ifndef CONTINUAL_TRANSFORMERS_SESSION_MODEL_FILE_H_
#define CONTINUAL_TRANSFORMERS_SESSION_MODEL_FILE_H_

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>

#include "cc/session/plan.h"

namespace continual_transformers {

class ModelFile {
 public:
  // Maps a file into memory, without a copy. Throws Error: kIo, kBadModelFile.
  static std::shared_ptr<const ModelFile> Map(const std::string& path);
  // Copies a file's bytes. Throws Error: kBadModelFile.
  static std::shared_ptr<const ModelFile> Copy(const void* data, size_t bytes);

  ~ModelFile();
  ModelFile(const ModelFile&) = delete;
  ModelFile& operator=(const ModelFile&) = delete;

  const Plan& plan() const { return plan_; }
  const Tensor& tensor(const std::string& name) const;  // `name` must be in the plan
  const std::map<std::string, Tensor>& tensors() const { return tensors_; }
  uint64_t weights_fingerprint() const { return weights_fingerprint_; }

  // The whole file as it was read.
  const void* data() const { return data_; }
  size_t size() const { return size_; }
  // Writes the file to a path, completely or not at all: a temporary file beside it is renamed.
  // Throws Error.
  void Save(const std::string& path) const;

 private:
  ModelFile() = default;
  void Parse();

  const void* data_ = nullptr;
  size_t size_ = 0;
  bool mapped_ = false;
  std::map<std::string, Tensor> tensors_;
  Plan plan_;
  uint64_t weights_fingerprint_ = 0;
};

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_SESSION_MODEL_FILE_H_
