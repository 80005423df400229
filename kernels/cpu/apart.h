// Keeps the threads of a region off the processor of the thread that wakes them.
//
// In a virtual machine, Linux takes a processor that has slept for some time for one that the host has taken away, and
// wakes a thread on the processor of the thread that wakes it. There it runs only when that one stops: after a pause, two
// threads compute on one processor. So before a region that follows a pause, the first thread forbids its processor to
// the others, and each of them restores its set of processors when it arrives, which leaves it where it runs.

#pragma once

#ifdef __linux__

#include <atomic>
#include <chrono>
#include <memory>
#include <vector>

#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

class Apart {
  public:
    // Called by the first thread before a region of that many threads.
    void before(int threads) {
        const int here = sched_getcpu();
        if (here < 0 || here >= CPU_SETSIZE || threads > MOST || Clock::now() - ended < PAUSE) return;
        const pid_t process = getpid();  // after a fork the numbers are those of the parent's threads
        for (size_t i = 0; i < others.size() && (int)i < threads - 1; ++i) {
            Thread* other = others[i].get();
            if (!other || other->has_ended || other->process != process) continue;
            if (sched_getaffinity(other->number, sizeof other->allowed, &other->allowed)) continue;
            cpu_set_t rest = other->allowed;
            CPU_CLR(here, &rest);
            if (CPU_COUNT(&rest) > 0) other->is_kept_off = !sched_setaffinity(other->number, sizeof rest, &rest);
        }
        if ((int)others.size() < threads - 1) others.resize(threads - 1);
    }

    // Called by each other thread when it arrives. number: 1 for the first of them.
    void arrive(int number) {
        static thread_local Own own;
        if ((size_t)number > others.size()) return;
        if (others[number - 1] != own.thread) others[number - 1] = own.thread;
        restore(*own.thread);
    }

    // Called by the first thread after the region.
    void after() {
        for (auto& other : others)
            if (other && !other->has_ended) restore(*other);  // one that was not needed
        ended = Clock::now();
    }

  private:
    using Clock = std::chrono::steady_clock;
    static constexpr auto PAUSE = std::chrono::microseconds(100);
    static constexpr int MOST = 16;  // threads; each takes two calls of the system

    struct Thread {
        const pid_t process = getpid(), number = (pid_t)syscall(SYS_gettid);
        std::atomic<bool> has_ended{false};
        bool is_kept_off = false;
        cpu_set_t allowed;
    };
    struct Own {
        std::shared_ptr<Thread> thread = std::make_shared<Thread>();
        ~Own() { thread->has_ended = true; }
    };

    static void restore(Thread& thread) {
        if (thread.is_kept_off) sched_setaffinity(thread.number, sizeof thread.allowed, &thread.allowed);
        thread.is_kept_off = false;
    }

    std::vector<std::shared_ptr<Thread>> others;
    Clock::time_point ended{};
};

#else

struct Apart {
    void before(int) {}
    void arrive(int) {}
    void after() {}
};

#endif
