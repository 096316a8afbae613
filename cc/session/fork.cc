#include "cc/session/fork.h"

#include <pthread.h>

#include <mutex>

namespace continual_transformers {

// One per process. The handlers walk a list under its mutex. Lock order: this mutex before a
// listener's mutexes, never the other way round.
struct ForkRegistry {
  std::mutex mutex;
  ForkListener* first = nullptr;

  ForkRegistry() { pthread_atfork(BeforeFork, AfterFork, InChild); }

  // Never destroyed: a process may fork while it destroys its static objects.
  static ForkRegistry& Get() {
    static ForkRegistry* registry = new ForkRegistry;
    return *registry;
  }

  void Add(ForkListener* listener) {
    std::lock_guard<std::mutex> lock(mutex);
    listener->next_ = first;
    if (first != nullptr) first->previous_ = listener;
    first = listener;
  }

  void Remove(ForkListener* listener) {
    std::lock_guard<std::mutex> lock(mutex);
    (listener->previous_ != nullptr ? listener->previous_->next_ : first) = listener->next_;
    if (listener->next_ != nullptr) listener->next_->previous_ = listener->previous_;
    listener->previous_ = listener->next_ = nullptr;
  }

  static void BeforeFork() {
    ForkRegistry& registry = Get();
    registry.mutex.lock();
    for (ForkListener* i = registry.first; i != nullptr; i = i->next_) i->BeforeFork();
  }

  static void AfterFork() {
    ForkRegistry& registry = Get();
    for (ForkListener* i = registry.first; i != nullptr; i = i->next_) i->AfterFork();
    registry.mutex.unlock();
  }

  static void InChild() {
    ForkRegistry& registry = Get();
    for (ForkListener* i = registry.first; i != nullptr; i = i->next_) i->InChild();
    registry.mutex.unlock();
  }
};

void ForkListener::RegisterFork() { ForkRegistry::Get().Add(this); }

void ForkListener::UnregisterFork() { ForkRegistry::Get().Remove(this); }

}  // namespace continual_transformers
