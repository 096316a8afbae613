#include "cc/server/model_repository.h"

#include <algorithm>
#include <utility>

namespace continual_transformers::server {

void ModelRepository::Add(const std::string& name, const std::string& path) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (name.empty() || !places_.try_emplace(name, Place{path, nullptr}).second) {
    throw Refusal(Reason::kInvalidArgument,
                  "two models have the name \"" + name + "\": name them, as in name=" + path);
  }
}

void ModelRepository::Load(const std::string& name) {
  std::lock_guard<std::mutex> one(loading_);
  std::string path;
  std::shared_ptr<ServedModel> model;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto found = places_.find(name);
    if (found == places_.end()) {
      throw Refusal(Reason::kNotFound, "this server has no model \"" + name + "\"");
    }
    path = found->second.path;
    model = found->second.model;
  }
  if (model != nullptr) return model->LoadWeights();
  try {
    model = std::make_shared<ServedModel>(name, path, options_);
    for (size_t i = 0; i < observers_.size(); ++i) {
      try {
        observers_[i]->Loaded(model.get());
      } catch (...) {
        model->RemoveKeepers();
        while (i > 0) observers_[--i]->LoadingFailed(model.get());
        throw;
      }
    }
  } catch (const std::exception& error) {
    std::lock_guard<std::mutex> lock(mutex_);
    places_[name].reason = error.what();
    throw;
  }
  std::lock_guard<std::mutex> lock(mutex_);
  places_[name] = {path, std::move(model), "", false};
}

void ModelRepository::Unload(const std::string& name) {
  std::lock_guard<std::mutex> one(loading_);
  std::shared_ptr<ServedModel> model = Find(name);
  model->Close({Reason::kUnavailable, "the model \"" + name + "\" was unloaded", {}});
  model->EndStreams(End::kUnloaded);
  model->RemoveKeepers();
  for (ModelObserver* const observer : observers_) observer->Unloaded(model.get());
  std::lock_guard<std::mutex> lock(mutex_);
  places_[name] = {places_[name].path, nullptr, "unloaded", true};
}

std::shared_ptr<ServedModel> ModelRepository::Find(const std::string& name,
                                                   const std::string& version) const {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto found = places_.find(name);
  if (found == places_.end()) {
    std::string names;
    for (const auto& place : places_) names += (names.empty() ? "\"" : ", \"") + place.first + "\"";
    throw Refusal(Reason::kNotFound,
                  "this server has no model " + Quoted(name) + ": it has " + names);
  }
  if (!version.empty() && version != "1") {
    throw Refusal(Reason::kNotFound, "the model \"" + name + "\" has no version " +
                                         Quoted(version) + ": its only version is 1");
  }
  if (found->second.model == nullptr) {
    throw Refusal(Reason::kUnavailable,
                  "the model \"" + name + "\" is not loaded: " + found->second.reason);
  }
  return found->second.model;
}

std::vector<std::shared_ptr<ServedModel>> ModelRepository::loaded() const {
  std::lock_guard<std::mutex> lock(mutex_);
  std::vector<std::shared_ptr<ServedModel>> models;
  for (const auto& place : places_) {
    if (place.second.model != nullptr) models.push_back(place.second.model);
  }
  return models;
}

std::vector<ModelRepository::Entry> ModelRepository::index() const {
  std::lock_guard<std::mutex> lock(mutex_);
  std::vector<Entry> entries;
  entries.reserve(places_.size());
  for (const auto& place : places_) {
    entries.push_back({place.first, place.second.model != nullptr, place.second.reason});
  }
  return entries;
}

bool ModelRepository::ready() const {
  if (draining_) return false;
  std::lock_guard<std::mutex> lock(mutex_);
  return std::all_of(places_.begin(), places_.end(), [](const auto& place) {
    return place.second.model != nullptr || place.second.unloaded;
  });
}

void ModelRepository::Drain() {
  draining_ = true;
  for (const std::shared_ptr<ServedModel>& model : loaded()) {
    model->Close({Reason::kUnavailable, "the server is shutting down", {}});
  }
}

}  // namespace continual_transformers::server
