// The threads of training: torch's own.
//
// An OpenMP thread that has done its part of a torch operator spins for milliseconds before it sleeps. A pool
// of our own would share the cores with it: on two cores, a 15 ms product took 20% longer. So tasks run on
// the OpenMP threads that torch brought into the process (its libgomp has a name of its own, which nothing
// can link to: hence dlsym), and on a ThreadPool where there are none.
#pragma once

#include <dlfcn.h>

#include <memory>
#include <type_traits>

#include "base/threads.hpp"

namespace gossamer {

class Team {
  public:
    explicit Team(int size) : size_(size) {
        parallel_ = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
        thread_ = reinterpret_cast<Number>(dlsym(RTLD_DEFAULT, "omp_get_thread_num"));
        count_ = reinterpret_cast<Number>(dlsym(RTLD_DEFAULT, "omp_get_num_threads"));
        if (!parallel_ || !thread_ || !count_) pool_ = std::make_unique<ThreadPool>(size);
    }

    int size() const { return size_; }

    // Calls task(part) for the parts 0 .. size() - 1, side by side, and returns when all have ended. It must
    // not throw.
    template <class Task>
    void run(Task&& task) {
        if (pool_) return pool_->run(task);
        struct Call {
            const Team* team;
            std::remove_reference_t<Task>* task;
        } call{this, &task};
        parallel_(
            [](void* data) {
                const auto& [team, work] = *static_cast<Call*>(data);
                // OpenMP may grant fewer threads than it was asked for.
                for (int part = team->thread_(); part < team->size_; part += team->count_()) (*work)(part);
            },
            &call, unsigned(size_), 0);
    }

  private:
    using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
    using Number = int (*)();

    int size_;
    Parallel parallel_;
    Number thread_, count_;
    std::unique_ptr<ThreadPool> pool_;
};

}  // namespace gossamer
