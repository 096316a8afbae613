// The server's log: one JSON object a line, on standard error.

#ifndef CONTINUAL_TRANSFORMERS_SERVER_LOG_H_
#define CONTINUAL_TRANSFORMERS_SERVER_LOG_H_

#include <nlohmann/json.hpp>
#include <string>

namespace continual_transformers::server {

enum class LogLevel { kDebug, kInfo, kWarning, kError, kOff };

// Throws Error (kInvalidArgument) for a name that is not a level.
LogLevel LogLevelOf(const std::string& name);
void SetLogLevel(LogLevel level);

// Writes {"time": ..., "level": ..., "event": event, and the facts}. `facts` is an object. Any
// thread.
void Log(LogLevel level, const std::string& event, const nlohmann::ordered_json& facts = {});

}  // namespace continual_transformers::server

#endif  // CONTINUAL_TRANSFORMERS_SERVER_LOG_H_
