#include "workspace.h"

#include <cassert>
#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <new>
#include <utility>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace moekit {
namespace {

constexpr size_t kLargePage = size_t{2} << 20;

struct Block {
  char* memory = nullptr;
  size_t size = 0;
};

std::mutex guard;
Block kept;

Block allocate(size_t bytes) {
  const size_t page = bytes < kLargePage ? 64 : kLargePage;
  const size_t size = (bytes + page - 1) / page * page;
  char* memory = static_cast<char*>(std::aligned_alloc(page, size));
  if (!memory) throw std::bad_alloc();
  prefer_large_pages(memory, size);
  return {memory, size};
}

struct Scratch {
  Block block;
  ~Scratch() { std::free(block.memory); }
};

}  // namespace

Workspace::Workspace(size_t bytes) {
  Block block;
  {
    const std::lock_guard lock(guard);
    if (kept.size >= bytes) std::swap(block, kept);
  }
  if (block.size < bytes || !block.memory) block = allocate(bytes + 64);
  memory_ = block.memory;
  size_ = block.size;
}

Workspace::~Workspace() {
  Block mine{memory_, size_};
  {
    const std::lock_guard lock(guard);
    if (kept.size < mine.size) std::swap(mine, kept);
  }
  std::free(mine.memory);
}

void* Workspace::cut(size_t bytes) {
  void* const begin = memory_ + used_;
  used_ += bytes;
  assert(used_ <= size_);
  return begin;
}

void* thread_scratch(size_t bytes) {
  thread_local Scratch mine;
  if (mine.block.size < bytes) {
    std::free(mine.block.memory);
    mine.block = {};
    mine.block = allocate(bytes);
  }
  return mine.block.memory;
}

void prefer_large_pages([[maybe_unused]] void* memory, [[maybe_unused]] size_t bytes) {
#if defined(MADV_HUGEPAGE)
  const auto begin = reinterpret_cast<std::uintptr_t>(memory);
  const auto whole = (begin + kLargePage - 1) / kLargePage * kLargePage;
  if (begin + bytes < whole + kLargePage) return;
  const size_t size = (begin + bytes - whole) / kLargePage * kLargePage;
  madvise(reinterpret_cast<void*>(whole), size, MADV_HUGEPAGE);  // a wish: nothing is lost when it is refused
#endif
}

void populate([[maybe_unused]] void* memory, [[maybe_unused]] size_t bytes) {
#if defined(MADV_POPULATE_WRITE)
  constexpr std::uintptr_t kPage = 4096;
  const auto begin = reinterpret_cast<std::uintptr_t>(memory) / kPage * kPage;
  const auto end = (reinterpret_cast<std::uintptr_t>(memory) + bytes + kPage - 1) / kPage * kPage;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_POPULATE_WRITE);  // refused by old kernels: faults then
#endif
}

}  // namespace moekit
