#include "cc/server/log.h"

// Debian has fmt as a shared object only, which would have to lie beside the server.
#define FMT_HEADER_ONLY
#include <spdlog/sinks/stdout_sinks.h>
#include <spdlog/spdlog.h>

#include <chrono>
#include <ctime>
#include <memory>

#include "cc/session/error.h"

namespace continual_transformers::server {
namespace {

spdlog::logger* Logger() {
  // Never destroyed: threads may log while the process ends.
  static spdlog::logger* const logger = [] {
    auto* const made =
        new spdlog::logger("server", std::make_shared<spdlog::sinks::stderr_sink_mt>());
    made->set_pattern("%v");
    made->flush_on(spdlog::level::trace);
    return made;
  }();
  return logger;
}

spdlog::level::level_enum LevelOf(LogLevel level) {
  switch (level) {
    case LogLevel::kDebug:
      return spdlog::level::debug;
    case LogLevel::kInfo:
      return spdlog::level::info;
    case LogLevel::kWarning:
      return spdlog::level::warn;
    case LogLevel::kError:
      return spdlog::level::err;
    case LogLevel::kOff:
      return spdlog::level::off;
  }
  return spdlog::level::info;
}

constexpr const char* kNames[] = {"debug", "info", "warning", "error", "off"};

// UTC, with milliseconds.
std::string Now() {
  const auto now = std::chrono::system_clock::now();
  const std::time_t seconds = std::chrono::system_clock::to_time_t(now);
  const auto milliseconds =
      std::chrono::duration_cast<std::chrono::milliseconds>(now.time_since_epoch()).count() % 1000;
  std::tm parts;
  gmtime_r(&seconds, &parts);
  char text[32];
  const size_t length = std::strftime(text, sizeof(text), "%Y-%m-%dT%H:%M:%S", &parts);
  return std::string(text, length) + fmt::format(".{:03}Z", milliseconds);
}

}  // namespace

LogLevel LogLevelOf(const std::string& name) {
  for (int i = 0; i < 5; ++i) {
    if (name == kNames[i]) return static_cast<LogLevel>(i);
  }
  throw Error(ErrorCode::kInvalidArgument,
              "got the log level " + name + ", expected debug, info, warning, error or off");
}

void SetLogLevel(LogLevel level) { Logger()->set_level(LevelOf(level)); }

void Log(LogLevel level, const std::string& event, const nlohmann::ordered_json& facts) {
  if (!Logger()->should_log(LevelOf(level))) return;
  nlohmann::ordered_json line = {
      {"time", Now()}, {"level", kNames[static_cast<int>(level)]}, {"event", event}};
  if (facts.is_object()) line.update(facts);
  // Names of streams and paths may hold bytes that are not UTF-8.
  Logger()->log(LevelOf(level),
                line.dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace));
}

}  // namespace continual_transformers::server
