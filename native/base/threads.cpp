#include "base/threads.hpp"

#include <algorithm>

#include "base/processor.hpp"

namespace gossamer {
namespace {

constexpr int kSpins = 4000;  // of about 40 cycles: some 50 microseconds

void wait_for_change(const std::atomic<std::uint32_t>& word, std::uint32_t old) {
    for (int spin = 0; spin < kSpins; ++spin) {
        if (word.load(std::memory_order_acquire) != old) return;
        pause_spinning();
    }
    while (word.load(std::memory_order_acquire) == old) word.wait(old, std::memory_order_acquire);
}

}  // namespace

ThreadPool::ThreadPool(int num_threads) : size_(std::max(1, num_threads)) {
    for (int thread = 1; thread < size_; ++thread) workers_.emplace_back([this, thread] { work(thread); });
}

ThreadPool::~ThreadPool() {
    stopping_.store(true, std::memory_order_relaxed);
    epoch_.fetch_add(1, std::memory_order_release);
    epoch_.notify_all();
    for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::start(Entry entry, void* context) {
    if (size_ == 1) return entry(context, 0);
    entry_ = entry;
    context_ = context;
    epoch_.fetch_add(1, std::memory_order_release);
    epoch_.notify_all();
    entry(context, 0);
    barrier();
}

void ThreadPool::work(int thread) {
    for (std::uint32_t epoch = 0;;) {
        wait_for_change(epoch_, epoch++);
        if (stopping_.load(std::memory_order_relaxed)) return;
        entry_(context_, thread);
        barrier();
    }
}

void ThreadPool::barrier() {
    if (size_ == 1) return;
    const std::uint32_t phase = phase_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == std::uint32_t(size_)) {
        arrived_.store(0, std::memory_order_relaxed);
        phase_.store(phase + 1, std::memory_order_release);
        phase_.notify_all();
    } else {
        wait_for_change(phase_, phase);
    }
}

}  // namespace gossamer
