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

// Fewer page faults while the memory is written for the first time.
void prefer_large_pages([[maybe_unused]] void* memory, [[maybe_unused]] size_t bytes) {
#if defined(MADV_HUGEPAGE)
  const auto begin = reinterpret_cast<std::uintptr_t>(memory);
  const auto whole = (begin + kLargePage - 1) / kLargePage * kLargePage;
  if (begin + bytes < whole + kLargePage) return;
  const size_t size = (begin + bytes - whole) / kLargePage * kLargePage;
  madvise(reinterpret_cast<void*>(whole), size, MADV_HUGEPAGE);  // a wish: nothing is lost when it is refused
#endif
}

Block allocate(size_t bytes) {
  const size_t page = bytes < kLargePage ? 64 : kLargePage;
  const size_t size = (bytes + page - 1) / page * page;
  char* memory = static_cast<char*>(std::aligned_alloc(page, size));
  if (!memory) throw std::bad_alloc();
  prefer_large_pages(memory, size);
  return {memory, size};
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
      std::free(all.remove(all.kept.begin()).memory);
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
  while (!all.kept.empty()) std::free(all.remove(all.kept.begin()).memory);
  all.most_used = all.used_bytes;
}

}  // namespace moekit
