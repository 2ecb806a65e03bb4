// Parallel loops. Threads divide outputs, never sums, so the number of threads does not change any bit.
//
// Each thread gets an equal share of the indices, then steals from the others, so a thread that the system suspends
// delays only the piece it holds. Waiting threads spin for some microseconds, since most waits are shorter, then sleep.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace {

constexpr auto SPIN = std::chrono::microseconds(20);
constexpr int64_t MIN_PARALLEL = 16384; // numbers; a smaller loop is done before a second thread wakes up

inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Lets one thread wait for a condition that another thread changes.
class Waiter {
  public:
    template <class Ready> void wait(Ready ready) {
        std::chrono::steady_clock::time_point start{};
        for (;;) {
            for (int i = 0; i < 64; i++, pause())
                if (ready()) return;
            auto now = std::chrono::steady_clock::now();
            if (start.time_since_epoch().count() == 0) start = now;
            if (now - start > SPIN) break;
        }
        std::unique_lock<std::mutex> lock(mutex);
        asleep.store(true, std::memory_order_relaxed);
        std::atomic_thread_fence(std::memory_order_seq_cst);
        changed.wait(lock, ready);
        asleep.store(false, std::memory_order_relaxed);
    }

    // Call after the change and a full fence: then either the waiter sees the change, or this sees that it sleeps.
    void wake() {
        if (!asleep.load(std::memory_order_relaxed)) return;
        std::lock_guard<std::mutex> lock(mutex);
        changed.notify_one();
    }

  private:
    std::atomic<bool> asleep{false};
    std::mutex mutex;
    std::condition_variable changed;
};

// `count` threads, of which the caller of `each` is one. One loop at a time.
class Threads {
  public:
    explicit Threads(int count) : asked(count) {
        shares.reserve(count);
        for (int i = 0; i < count; i++) shares.push_back(std::make_unique<Share>());
        try {
            for (int i = 1; i < count; i++) workers.emplace_back([this, i] { serve(i); });
        } catch (const std::system_error &) { // continue with fewer threads
        }
    }
    ~Threads() {
        stopping = true;
        std::atomic_thread_fence(std::memory_order_seq_cst);
        for (auto &share : shares) share->waiter.wake();
        for (auto &worker : workers) worker.join();
    }

    const int asked;

    // Calls f(i) for each i below `count`, in any order. cost: roughly how many numbers one call handles.
    template <class F> void each(int count, int64_t cost, const F &f) {
        int64_t parts = std::min<int64_t>(count, 1 + count * cost / MIN_PARALLEL);
        parts = std::min<int64_t>(parts, 1 + workers.size());
        if (parts <= 1) return run<F>(&f, 0, count);
        pending.store(count, std::memory_order_relaxed);
        shared.store(int(parts), std::memory_order_relaxed);
        for (int64_t i = parts - 1; i >= 0; i--) {
            Share &share = *shares[i];
            share.body = run<F>, share.f = &f;
            share.left.store(uint64_t(count * i / parts) << 32 | uint64_t(count * (i + 1) / parts),
                             std::memory_order_release);
        }
        std::atomic_thread_fence(std::memory_order_seq_cst);
        for (int64_t i = 1; i < parts; i++) shares[i]->waiter.wake();
        work(0);
        shares[0]->waiter.wait([&] { return pending.load(std::memory_order_acquire) == 0; });
    }

  private:
    struct alignas(64) Share {
        std::atomic<uint64_t> left{0}; // indices not taken yet: begin in the high 32 bits, end in the low ones
        void (*body)(const void *f, int begin, int end) = nullptr; // read only after taking indices
        const void *f = nullptr;
        Waiter waiter;
    };

    template <class F> static void run(const void *f, int begin, int end) {
        for (int i = begin; i < end; i++) (*static_cast<const F *>(f))(i);
    }

    // Runs half of the remaining indices of a share; returns how many.
    static int take(Share &share) {
        uint64_t left = share.left.load(std::memory_order_relaxed);
        for (;;) {
            uint32_t begin = uint32_t(left >> 32), end = uint32_t(left);
            if (begin >= end) return 0;
            uint32_t taken = (end - begin + 1) / 2;
            if (!share.left.compare_exchange_weak(left, uint64_t(begin + taken) << 32 | end, std::memory_order_acquire,
                                                  std::memory_order_relaxed))
                continue;
            share.body(share.f, int(begin), int(begin + taken));
            return int(taken);
        }
    }

    // Runs the thread's own share, then steals from the others.
    void work(int own) {
        int done = 0, parts = shared.load(std::memory_order_relaxed);
        for (int i = 0; i < parts; i++)
            while (int taken = take(*shares[(own + i) % parts])) done += taken;
        if (done && pending.fetch_sub(done, std::memory_order_seq_cst) == done) shares[0]->waiter.wake();
    }

    void serve(int own) {
        Share &share = *shares[own];
        auto called = [&] {
            uint64_t left = share.left.load(std::memory_order_relaxed);
            return uint32_t(left >> 32) < uint32_t(left) || stopping.load(std::memory_order_relaxed);
        };
        while (share.waiter.wait(called), !stopping) work(own);
    }

    std::vector<std::unique_ptr<Share>> shares; // the first belongs to the caller
    std::vector<std::thread> workers;
    std::atomic<int> shared{0}; // number of shares in this loop
    std::atomic<bool> stopping{false};
    alignas(64) std::atomic<int> pending{0}; // indices not finished
};

} // namespace
