// A fixed team of threads that walks through one step together, from barrier to barrier.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace gpt2 {

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#endif
}

// Looks often at first, then lets the system wake it. A look takes 15 to 40 nanoseconds. No waking is lost: wait(old)
// returns at once where the value has changed already.
inline void wait_while(const std::atomic<uint32_t>& value, uint32_t old, int looks) {
  for (int i = 0; i < looks; i++) {
    if (value.load(std::memory_order_acquire) != old) return;
    relax();
  }
  while (value.load(std::memory_order_acquire) == old) value.wait(old, std::memory_order_acquire);
}
constexpr int kBarrierLooks = 2000;  // a phase takes tens of microseconds; with more threads than cores, sleep soon
constexpr int kStepLooks = 10000;    // between two steps the caller chooses a token: a few hundred microseconds

class Team {
 public:
  // The calling thread is member 0; `size - 1` threads are started and stay until the team ends.
  explicit Team(int size) : size_(size), taken_(2 * size) {
    try {
      for (int member = 1; member < size; member++) threads_.emplace_back([this, member] { serve(member); });
    } catch (...) {
      end();
      throw;
    }
  }
  ~Team() { end(); }
  int size() const { return size_; }

  // work(self, member) on every member; back when all are done.
  void run(void (*work)(void*, int), void* self) {
    for (Counter& taken : taken_) taken.items.store(0, std::memory_order_relaxed);
    work_ = work, self_ = self;
    begin();
    work(self, 0);
    barrier();
  }

  // A phase of the work, the same one for every member: call(i) for the items 0 … n-1, then a barrier. A member has a
  // share of items that stand side by side, which memory gives faster than items here and there, and takes `chunk` of
  // them at a time; whoever has done its own helps the others.
  template <class Call>
  void each(int member, int phase, int n, int chunk, Call call) {
    // Between two barriers nobody looks at the counters of the phase that comes next.
    taken_[(phase + 1) % 2 * size_ + member].items.store(0, std::memory_order_relaxed);
    for (int other = 0; other < size_; other++) {
      const int owner = (member + other) % size_;
      const int begin = n * owner / size_, end = n * (owner + 1) / size_;
      std::atomic<int>& taken = taken_[phase % 2 * size_ + owner].items;
      for (int first; (first = begin + taken.fetch_add(chunk, std::memory_order_relaxed)) < end;)
        for (int i = first; i < std::min(first + chunk, end); i++) call(i);
    }
    barrier();
  }

 private:
  struct alignas(64) Counter {
    std::atomic<int> items{0};
  };

  void barrier() {
    if (size_ == 1) return;
    const uint32_t now = epoch_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
      arrived_.store(0, std::memory_order_relaxed);
      epoch_.store(now + 1, std::memory_order_release);
      epoch_.notify_all();
    } else {
      wait_while(epoch_, now, kBarrierLooks);
    }
  }

  void begin() {
    start_.fetch_add(1, std::memory_order_release);
    start_.notify_all();
  }
  void end() {
    work_ = nullptr;
    begin();
    for (auto& thread : threads_) thread.join();
  }
  void serve(int member) {
    for (uint32_t seen = 0;; seen++) {
      wait_while(start_, seen, kStepLooks);
      if (!work_) return;
      work_(self_, member);
      barrier();
    }
  }

  const int size_;
  void (*work_)(void*, int) = nullptr;
  void* self_ = nullptr;
  std::vector<Counter> taken_;  // of each member's share, in this phase and in the other one
  alignas(64) std::atomic<uint32_t> start_{0};
  alignas(64) std::atomic<uint32_t> epoch_{0};
  alignas(64) std::atomic<int> arrived_{0};
  std::vector<std::thread> threads_;  // last: the rest must stand before they start
};

}  // namespace gpt2
