// A pool of threads that run one function together, meeting at barriers.
//
// A decode step at the 1B shape has some 150 meetings in 25 ms, so a meeting must cost about a microsecond:
// threads spin a while and only then sleep on a futex. The caller is thread 0.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace gossamer {

class ThreadPool {
  public:
    explicit ThreadPool(int num_threads);
    ~ThreadPool();
    ThreadPool(const ThreadPool&) = delete;
    ThreadPool& operator=(const ThreadPool&) = delete;

    int size() const { return size_; }

    // Runs task(thread) on every thread, 0 .. size() - 1, and returns when all have ended. It must not throw.
    template <class Task>
    void run(Task&& task) {
        start([](void* context,
                 int thread) { (*static_cast<std::remove_reference_t<Task>*>(context))(thread); },
              const_cast<void*>(static_cast<const void*>(&task)));
    }

    // Inside a task: returns when all threads have come here.
    void barrier();

  private:
    using Entry = void (*)(void* context, int thread);

    void start(Entry entry, void* context);
    void work(int thread);

    int size_;
    Entry entry_ = nullptr;
    void* context_ = nullptr;
    alignas(64) std::atomic<std::uint32_t> epoch_{0};    // one higher for each task
    alignas(64) std::atomic<std::uint32_t> arrived_{0};  // threads waiting at the barrier
    alignas(64) std::atomic<std::uint32_t> phase_{0};    // one higher for each barrier passed
    std::atomic<bool> stopping_{false};
    std::vector<std::thread> workers_;
};

// The part [begin, end) of `count` items that belongs to a thread.
struct Part {
    int begin, end;
    Part(int count, int thread, int num_threads)
        : begin(int(std::int64_t(count) * thread / num_threads)),
          end(int(std::int64_t(count) * (thread + 1) / num_threads)) {}
};

}  // namespace gossamer
