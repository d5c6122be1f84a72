// Memory that one call needs and the next one needs again.
#pragma once
#include <cstddef>
#include <cstdint>

namespace moekit {

// A block for the length of one call. The largest one freed last is kept for the next, since fresh memory must be
// cleared page by page by the system; calls that overlap get blocks of their own.
class Workspace {
 public:
  explicit Workspace(size_t bytes);  // as much as all calls of `take` will ask for
  ~Workspace();
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  // An array of `count`, aligned to 64 bytes, and the bytes that it takes up.
  template <class T>
  T* take(std::int64_t count) {
    return static_cast<T*>(cut(size_of<T>(count)));
  }
  template <class T>
  static size_t size_of(std::int64_t count) {
    return (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
  }

 private:
  void* cut(size_t bytes);

  char* memory_;
  size_t size_, used_ = 0;
};

// This thread's own, at least so large; what was in it is lost.
void* thread_scratch(size_t bytes);

// Arrays that outlive the call which makes them, as gradients do. What is given back serves the next array of about its
// size, so that a step of training writes to the memory of the step before, with no page to be cleared. Blocks in use
// and blocks kept are together never more than were once in use at one time, and the system may take kept pages when it
// is short of memory.
void* take_array(size_t bytes);
void give_back(void* array);
void release_arrays();  // those that are kept

}  // namespace moekit
