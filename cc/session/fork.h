// Keeps an object with mutexes usable in a child process after fork().

#ifndef CONTINUAL_TRANSFORMERS_SESSION_FORK_H_
#define CONTINUAL_TRANSFORMERS_SESSION_FORK_H_

namespace continual_transformers {

// Only the thread that forked exists in a child process. A mutex that another thread held at the
// fork would stay locked there for ever. A ForkListener locks its mutexes before the fork and
// unlocks them after it on both sides. A derived class must register at the end of its constructor,
// and unregister at the start of its destructor.
class ForkListener {
 public:
  virtual ~ForkListener() = default;

  virtual void BeforeFork() = 0;  // lock
  virtual void AfterFork() = 0;   // unlock, in the parent
  virtual void InChild() = 0;     // unlock, in the child, and forget the other threads

 protected:
  void RegisterFork();
  void UnregisterFork();

 private:
  friend struct ForkRegistry;
  ForkListener* previous_ = nullptr;
  ForkListener* next_ = nullptr;
};

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_SESSION_FORK_H_
