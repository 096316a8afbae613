// Those who want to know which models are loaded.

#ifndef CONTINUAL_TRANSFORMERS_SERVER_MODEL_OBSERVER_H_
#define CONTINUAL_TRANSFORMERS_SERVER_MODEL_OBSERVER_H_

namespace continual_transformers::server {

class ServedModel;

class ModelObserver {
 public:
  ModelObserver() = default;
  virtual ~ModelObserver() = default;
  ModelObserver(const ModelObserver&) = delete;
  ModelObserver& operator=(const ModelObserver&) = delete;

  // Before the model answers its first request. An exception means that it cannot be served.
  virtual void Loaded(ServedModel* model) = 0;
  // After its last answer, and after its streams have ended.
  virtual void Unloaded(ServedModel* model) = 0;
  // After Loaded, if the model cannot be served because of another observer. Its streams have not
  // ended: a later load may go on with them.
  virtual void LoadingFailed(ServedModel* model) { Unloaded(model); }
};

}  // namespace continual_transformers::server

#endif  // CONTINUAL_TRANSFORMERS_SERVER_MODEL_OBSERVER_H_
