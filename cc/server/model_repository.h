// The models that are served, by name.

#ifndef CONTINUAL_TRANSFORMERS_SERVER_MODEL_REPOSITORY_H_
#define CONTINUAL_TRANSFORMERS_SERVER_MODEL_REPOSITORY_H_

#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "cc/server/model_observer.h"
#include "cc/server/served_model.h"

namespace continual_transformers::server {

// The sentence for a request to load a model that has parameters.
inline constexpr char kLoadsItsFile[] =
    "this server loads a model from the file that it was started with, and takes no parameters: "
    "replace the file, then load without parameters";

class ModelRepository {
 public:
  explicit ModelRepository(const ModelOptions& options) : options_(options) {}

  // Adds one who is told of models that are loaded and unloaded. Call it before Load; it must stay
  // for as long as models are loaded or unloaded.
  void AddObserver(ModelObserver* observer) { observers_.push_back(observer); }

  // Names a model and its file. Load loads it.
  void Add(const std::string& name, const std::string& path);

  // Loads a model, or gives a loaded one the weights that its file has now: its streams go on.
  // Throws Refusal (kNotFound) or Error.
  void Load(const std::string& name);
  // Ends a model and its streams. It can be loaded again. Throws Refusal (kNotFound).
  void Unload(const std::string& name);

  // The loaded model. Throws Refusal (kNotFound) for a name that never was, and for a version other
  // than "" and "1"; kUnavailable for a model that is not loaded.
  std::shared_ptr<ServedModel> Find(const std::string& name, const std::string& version = "") const;
  std::vector<std::shared_ptr<ServedModel>> loaded() const;

  struct Entry {
    std::string name;
    bool ready;
    std::string reason;  // why it is not
  };
  std::vector<Entry> index() const;

  // Whether the server answers steps: all models are loaded, and it does not drain.
  bool ready() const;
  // Refuses later requests (kUnavailable) and waits for those that wait.
  void Drain();

 private:
  struct Place {
    std::string path;
    std::shared_ptr<ServedModel> model;  // null: not loaded
    std::string reason = "not loaded yet";
    bool unloaded = false;  // on request: does not count as not ready
  };

  const ModelOptions options_;
  std::vector<ModelObserver*> observers_;
  mutable std::mutex mutex_;
  std::mutex loading_;  // one load or unload at a time
  std::map<std::string, Place> places_;
  std::atomic<bool> draining_{false};
};

}  // namespace continual_transformers::server

#endif  // CONTINUAL_TRANSFORMERS_SERVER_MODEL_REPOSITORY_H_
