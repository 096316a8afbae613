// The objects that both ports of a server use: models, and what keeps their streams.

#ifndef CONTINUAL_TRANSFORMERS_SERVER_SERVER_PARTS_H_
#define CONTINUAL_TRANSFORMERS_SERVER_SERVER_PARTS_H_

namespace continual_transformers::server {

class Journal;
class ModelRepository;
class ShardOwner;
class Snapshots;

struct ServerParts {
  ModelRepository* repository;
  // Null: this server has none.
  Snapshots* snapshots = nullptr;
  Journal* journal = nullptr;
  ShardOwner* shards = nullptr;
};

}  // namespace continual_transformers::server

#endif  // CONTINUAL_TRANSFORMERS_SERVER_SERVER_PARTS_H_
