// Loading and unloading of models, with a line in the log.

#ifndef CONTINUAL_TRANSFORMERS_SERVER_LOGGED_LOAD_H_
#define CONTINUAL_TRANSFORMERS_SERVER_LOGGED_LOAD_H_

#include <string>

#include "cc/server/model_repository.h"

namespace continual_transformers::server {

// As ModelRepository's Load and Unload.
void LoadAndLog(ModelRepository* repository, const std::string& name);
void UnloadAndLog(ModelRepository* repository, const std::string& name);

}  // namespace continual_transformers::server

#endif  // CONTINUAL_TRANSFORMERS_SERVER_LOGGED_LOAD_H_
