// Protobuf messages as JSON.

#ifndef CONTINUAL_TRANSFORMERS_SERVER_MESSAGE_JSON_H_
#define CONTINUAL_TRANSFORMERS_SERVER_MESSAGE_JSON_H_

#include <google/protobuf/message.h>

#include <nlohmann/json.hpp>

namespace continual_transformers::server {

// Returns all fields, with their names in the protocol, and integers as numbers. (protobuf's own
// function writes 64-bit integers as strings.)
nlohmann::ordered_json JsonOf(const google::protobuf::Message& message);

}  // namespace continual_transformers::server

#endif  // CONTINUAL_TRANSFORMERS_SERVER_MESSAGE_JSON_H_
