// What has a mutex, and must go on in a child process that another thread's fork() makes.

#ifndef CONTINUAL_TRANSFORMERS_SESSION_FORK_H_
#define CONTINUAL_TRANSFORMERS_SESSION_FORK_H_

namespace continual_transformers {

// In a child process only the thread that forked goes on: a mutex that another thread held is
// locked there for ever. A ForkListener takes its mutexes before the fork, and lets them go after
// it on both sides. Derived classes register once they are complete, and leave before they fall
// apart.
class ForkListener {
 public:
  virtual ~ForkListener() = default;

  virtual void BeforeFork() = 0;  // Lock.
  virtual void AfterFork() = 0;   // Unlock, in the parent.
  virtual void InChild() = 0;     // Unlock, in the child, and forget the other threads.

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
