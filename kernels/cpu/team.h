// Shares the chunks of a step among the threads of an OpenMP region, without waiting for threads that are late.
//
// A loop of OpenMP ends when all of its threads have arrived, also those that the system has not run yet. Where other
// work shares the processors, or a thread is woken on the processor of the thread that waits for it, each loop takes as
// long as the slowest thread. Here a call of many steps is one region, and its first thread goes through the steps. Each
// thread has a queue of neighbouring chunks of a step, as with schedule(static); when it is empty, the thread takes from
// other queues. A step ends with its last chunk, whichever thread computed it.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

#include <immintrin.h>
#include <omp.h>
#include <sched.h>

#include "apart.h"

class Team {
  public:
    // Calls run(), whose calls of `share` then use one region of all threads.
    template <class Run>
    static void in_one_region(const Run& run) {
        if (!may_open()) return run();
        Team team(omp_get_max_threads());
        static thread_local Apart own;
        Apart& apart = own;
        apart.before(omp_get_max_threads());
#pragma omp parallel
        if (omp_get_thread_num() > 0) {
            apart.arrive(omp_get_thread_num());
            team.arrived.fetch_add(1, std::memory_order_relaxed);
            team.help(omp_get_thread_num() % team.count);
        } else {
            current = &team;
            run();
            current = nullptr;
            team.over.store(true, std::memory_order_release);
            // A thread that was woken on this processor runs if this one yields; at the end of the region this one would
            // spin until the system takes the processor away.
            const int others = omp_get_num_threads() - 1;
            for (int i = 0; i < YIELDS && team.arrived.load(std::memory_order_relaxed) < others; ++i) sched_yield();
        }
        apart.after();
    }

    // Calls chunk(i) once for each i below `chunks`, on any thread, and returns after the last one. A chunk must not call
    // `share` itself.
    template <class Chunk>
    static void share(int chunks, const Chunk& chunk) {
        if (chunks > 1 && current)
            current->step(chunks, [](const void* of, int i) { (*(const Chunk*)of)(i); }, &chunk);
        else if (chunks > 1 && may_open())
            in_one_region([&] { share(chunks, chunk); });
        else
            for (int i = 0; i < chunks; ++i) chunk(i);
    }

    // Calls part(from, to) for ranges of at least `least` that cover 0 to n. Of its share, a thread takes half, then a
    // quarter, and so on, so that little is left to wait for when another thread has finished.
    template <class Part>
    static void share_range(int64_t n, int64_t least, const Part& part) {
        const int64_t threads = std::clamp<int64_t>(n / least, 1, omp_get_max_threads());
        int parts = 1;
        while (parts < PARTS && (n / threads >> parts) >= least) ++parts;
        share((int)threads * parts, [&](int i) {
            const int64_t first = n * (i / parts) / threads, end = n * (i / parts + 1) / threads;
            const auto rest = [=](int after) { return after == parts ? 0 : (end - first) >> after; };
            part(end - rest(i % parts), end - rest(i % parts + 1));
        });
    }

  private:
    static constexpr int QUEUES = 64, PARTS = 5, YIELDS = 2;
    // Pauses before a thread yields: 2,000 take about 30 us. The first thread has the caller's time, so it yields late.
    static constexpr int SPINS_OF_FIRST = 50000, SPINS = 2000;

    // Number of the step and of the chunks left, in one integer: a thread that is late takes nothing of another step.
    struct alignas(64) Queue {
        std::atomic<uint64_t> state{0};
        std::atomic<int> end{0};
    };

    explicit Team(int threads) : count(std::min(threads, QUEUES)) {}

    static bool may_open() { return !current && omp_get_max_threads() > 1 && !omp_in_parallel(); }
    static int left_of(uint64_t state) { return (int)(uint32_t)state; }
    static void rest(int spins, int most) {
        if (spins < most) _mm_pause();
        else sched_yield();
    }

    void step(int chunks, void (*run)(const void*, int), const void* of) {
        call.store(run, std::memory_order_relaxed);
        argument.store(of, std::memory_order_relaxed);
        unfinished.store(chunks, std::memory_order_relaxed);
        ++number;
        for (int i = 0; i < count; ++i) {
            const int first = (int)((int64_t)chunks * i / count), end = (int)((int64_t)chunks * (i + 1) / count);
            queues[i].end.store(end, std::memory_order_relaxed);
            queues[i].state.store(number << 32 | (uint32_t)(end - first), std::memory_order_release);
        }
        take_all(0);
        for (int spins = 0; unfinished.load(std::memory_order_acquire) > 0; ++spins) rest(spins, SPINS_OF_FIRST);
    }

    // Computes chunks until all queues are empty; whether there was one.
    bool take_all(int own) {
        bool any = false;
        for (int i = 0; i < count; ++i) {
            Queue& queue = queues[(own + i) % count];
            for (uint64_t state = queue.state.load(std::memory_order_acquire); left_of(state) > 0;) {
                // Read before the chunk is taken: while it is not, the step cannot end, and these do not change.
                const auto run = call.load(std::memory_order_relaxed);
                const void* of = argument.load(std::memory_order_relaxed);
                const int chunk = queue.end.load(std::memory_order_relaxed) - left_of(state);
                if (!queue.state.compare_exchange_weak(state, state - 1, std::memory_order_acq_rel)) continue;
                run(of, chunk);
                any = true;
                unfinished.fetch_sub(1, std::memory_order_acq_rel);
                state = queue.state.load(std::memory_order_acquire);
            }
        }
        return any;
    }

    void help(int own) {
        for (int spins = 0; !over.load(std::memory_order_acquire); ++spins) {
            if (take_all(own)) spins = 0;
            rest(spins, SPINS);
        }
    }

    static inline thread_local Team* current = nullptr;

    const int count;  // of queues
    uint64_t number = 0;
    std::atomic<void (*)(const void*, int)> call{nullptr};
    std::atomic<const void*> argument{nullptr};
    Queue queues[QUEUES];
    alignas(64) std::atomic<int> unfinished{0};
    alignas(64) std::atomic<int> arrived{0};
    std::atomic<bool> over{false};
};
