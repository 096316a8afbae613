// The command line of the server.

#ifndef CONTINUAL_TRANSFORMERS_SERVER_OPTIONS_H_
#define CONTINUAL_TRANSFORMERS_SERVER_OPTIONS_H_

#include <string>
#include <utility>
#include <vector>

#include "cc/server/grpc_server.h"
#include "cc/server/http_server.h"
#include "cc/server/journal.h"
#include "cc/server/log.h"
#include "cc/server/model_repository.h"
#include "cc/server/snapshots.h"

namespace continual_transformers::server {

struct Options {
  std::vector<std::pair<std::string, std::string>> models;  // name and path
  ModelOptions model;
  GrpcOptions grpc;
  HttpOptions http;
  JournalOptions journal;     // url empty: there is none
  SnapshotOptions snapshots;  // directory empty: none are kept
  LogLevel log_level = LogLevel::kInfo;
  std::string tls_certificate, tls_key, tls_client_ca, token_file, operator_token_file;
  bool sharded = false;    // one of several servers: takes steps of the shards that it is given
  std::string ready_file;  // written when the server is ready; empty: none
  double drain_seconds = 10;
  bool die_with_parent = false;
};

// Returns whether the program goes on, or else ends with *status: after --help, or a mistake in the
// arguments, of which it prints a sentence.
bool ParseOptions(int argc, char** argv, Options* options, int* status);

}  // namespace continual_transformers::server

#endif  // CONTINUAL_TRANSFORMERS_SERVER_OPTIONS_H_
