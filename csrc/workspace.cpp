#include "workspace.h"

#include <algorithm>
#include <bit>
#include <cassert>
#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <new>
#include <unordered_map>
#include <utility>
#include <vector>
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

// Large blocks come from the system and not from malloc, which may hand out memory that has small pages already. The
// system gives these large pages where it can: fewer faults while they are first written, fewer addresses to look up.
Block allocate(size_t bytes) {
  const size_t page = bytes < kLargePage ? 64 : kLargePage;
  const size_t size = (bytes + page - 1) / page * page;
#if defined(MADV_HUGEPAGE)
  if (page == kLargePage) {
    void* const all = mmap(nullptr, size + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (all == MAP_FAILED) throw std::bad_alloc();
    char* const begin = static_cast<char*>(all);
    const size_t before = (page - reinterpret_cast<std::uintptr_t>(begin) % page) % page;
    if (before) munmap(begin, before);
    munmap(begin + before + size, page - before);
    madvise(begin + before, size, MADV_HUGEPAGE);  // a wish: nothing is lost when it is refused
    return {begin + before, size};
  }
#endif
  char* const memory = static_cast<char*>(std::aligned_alloc(page, size));
  if (!memory) throw std::bad_alloc();
  return {memory, size};
}

void release(const Block& block) {
#if defined(MADV_HUGEPAGE)
  if (block.size >= kLargePage) {
    munmap(block.memory, block.size);
    return;
  }
#endif
  std::free(block.memory);
}

// The largest size of those that may share a block: whole large pages, at most an eighth more than that.
size_t size_class(size_t bytes) {
  const size_t step = std::max(kLargePage, std::bit_ceil(bytes) / 16);
  return (bytes + step - 1) / step * step;
}

struct Arrays {
  std::mutex guard;
  std::unordered_map<void*, Block> used;
  std::vector<Block> kept;  // the longest kept first
  size_t used_bytes = 0, kept_bytes = 0, most_used = 0;

  Block remove(std::vector<Block>::iterator at) {
    const Block block = *at;
    kept.erase(at);
    kept_bytes -= block.size;
    return block;
  }
};

// Never destroyed: arrays may come back while the process ends.
Arrays& arrays() {
  static Arrays& all = *new Arrays;
  return all;
}

struct Scratch {
  Block block;
  ~Scratch() { release(block); }
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
  release(mine);
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
    release(mine.block);
    mine.block = {};
    mine.block = allocate(bytes);
  }
  return mine.block.memory;
}

void* take_array(size_t bytes) {
  Arrays& all = arrays();
  const std::lock_guard lock(all.guard);
  const size_t size = size_class(bytes);
  const auto latest = std::find_if(all.kept.rbegin(), all.kept.rend(), [&](const Block& b) { return b.size == size; });
  Block block;
  if (latest != all.kept.rend()) block = all.remove(std::next(latest).base());
  all.most_used = std::max(all.most_used, all.used_bytes + size);
  if (!block.memory) {
    while (!all.kept.empty() && all.used_bytes + size + all.kept_bytes > all.most_used)
      release(all.remove(all.kept.begin()));
    block = allocate(size);
  }
  all.used.emplace(block.memory, block);
  all.used_bytes += size;
  return block.memory;
}

void give_back(void* array) {
  Arrays& all = arrays();
  const std::lock_guard lock(all.guard);
  const Block block = all.used.extract(array).mapped();
  all.used_bytes -= block.size;
  all.kept_bytes += block.size;
  all.kept.push_back(block);
#if defined(MADV_FREE)
  madvise(block.memory, block.size, MADV_FREE);  // pages stay until the system is short of them
#endif
}

void release_arrays() {
  Arrays& all = arrays();
  const std::lock_guard lock(all.guard);
  while (!all.kept.empty()) release(all.remove(all.kept.begin()));
  all.most_used = all.used_bytes;
}

}  // namespace moekit
