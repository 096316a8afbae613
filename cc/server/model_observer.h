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
  // After its last answer, and after its streams have ended. Or loading was given up.
  virtual void Unloaded(ServedModel* model) = 0;
};

}  // namespace continual_transformers::server

#endif  // CONTINUAL_TRANSFORMERS_SERVER_MODEL_OBSERVER_H_
