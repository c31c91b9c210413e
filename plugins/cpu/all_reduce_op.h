// The op `AllReduce`: part [...], group [bytes] -> total [...], the sum of what all ranks of a group bring.
//
// `group` is memory that the ranks' processes share, laid out as `Segment` says. No other input of an op is written, so
// it must be memory that this process has joined as this rank, and no constant of the graph.
//
// Ranks take turns in step: in each turn every rank puts some of its part into a slot of its own, says that it has,
// waits for the others, and adds all slots up in the order of the ranks, so that each has the same bits whenever the
// others came. Two sets of slots in turn need no second wait: who has said of turn t + 1 that it has come has read all
// slots of turn t.
//
// A rank that waits looks for a moment and then sleeps (a futex). It wakes ten times a second to see whether the ones
// that it waits for are alive; those that are, but do not come, end the group after `patience` of these looks.

#pragma once

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <climits>
#include <csignal>
#include <cstring>
#include <ctime>

#include "call.h"
#include "matrix.h"

#ifdef __linux__
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#ifndef ARRIERO_LOOK
#define ARRIERO_LOOK 100'000'000
#endif
constexpr long LOOK = ARRIERO_LOOK;  // nanoseconds that a rank sleeps before it looks again: a tenth of a second

// A rank's line in the shared memory, which it alone writes but for `sleepers`.
struct alignas(128) RankLine {
    std::atomic<uint32_t> turn;      // the last turn that it has come to
    std::atomic<uint32_t> sleepers;  // ranks that sleep until it comes
    std::atomic<int32_t> process;
    uint32_t is_ready;  // for whoever has to wait before there are turns
    std::atomic<uint64_t> counts[2];  // values that it brings, of even and of odd turns
    uint32_t begun;  // steps of a rank on a GPU, which has no turns here: a turn that nobody waits in would break them
};

struct Segment {
    static constexpr uint64_t MAGIC = 0x31736b6e61526f41;  // "AoRanks1"
    static constexpr int64_t MOST_RANKS = 64, HEAD = 4096;

    uint64_t magic;
    uint32_t ranks;
    uint32_t spins;  // looks before a rank sleeps
    uint64_t capacity;  // values of a slot
    uint32_t patience;  // tenths of a second
    std::atomic<uint32_t> fault;  // 0, or a kind of `Fault` and the rank that it is about

    RankLine* lines() { return reinterpret_cast<RankLine*>(reinterpret_cast<uint8_t*>(this) + HEAD); }
    float* slot(uint32_t turn, int64_t rank) {
        auto* slots = reinterpret_cast<float*>(lines() + MOST_RANKS);
        return slots + ((turn & 1) * ranks + rank) * capacity;
    }
    static int64_t size(int64_t ranks, int64_t capacity) {
        return HEAD + MOST_RANKS * static_cast<int64_t>(sizeof(RankLine)) + 2 * ranks * capacity * 4;
    }
};

static_assert(sizeof(RankLine) == 128 && sizeof(Segment) <= Segment::HEAD);
static_assert(std::atomic<uint32_t>::is_always_lock_free && std::atomic<uint64_t>::is_always_lock_free);

enum Fault : uint32_t { ENDED = 1, SILENT = 2, OTHER_STEP = 3, FAILED = 4 };

struct AllReduce {
    static constexpr const char* NAME = "AllReduce";
    static constexpr size_t INPUTS = 2, NEEDED = 2, OUTPUTS = 1;
    static constexpr const char* INPUT_NAMES[INPUTS] = {"part", "group"};
    static constexpr int64_t SLICE = 1 << 14;  // values that a thread adds up in its turn

    static ort::Type input_type(size_t index) { return index ? ort::Type::uint8 : ort::Type::float32; }
    static ort::Type output_type(size_t) { return ort::Type::float32; }

    int64_t ranks, rank;

    explicit AllReduce(const Settings& settings)
        : ranks(settings.integer("ranks", 1, Segment::MOST_RANKS)), rank(settings.integer("rank", 0, ranks - 1)) {
#ifndef __linux__
        throw Refusal("ranks meet in shared memory, which is for Linux only");
#endif
        if (settings.is_constant(1))
            throw Refusal("group is a constant of the graph, and must be memory that ranks share");
    }

    void compute(const Call& call) const {
        const Tensor part = call.input(0), group = call.input(1);
        const float* from = part.floats();
        auto& segment = segment_of(group);
        int64_t count = 1;
        for (size_t i = 0; i < part.shape.rank; i++) count = product({count, part.shape[i]});
        float* to = call.output(part.shape);
        const auto capacity = static_cast<int64_t>(segment.capacity);
        for (int64_t first = 0; first < count; first += capacity)
            add_up(call, segment, from + first, to + first, std::min(capacity, count - first));
    }

   private:
    Segment& segment_of(const Tensor& group) const {
        auto* segment = reinterpret_cast<Segment*>(const_cast<uint8_t*>(group.bytes()));
        if (group.shape.rank != 1 || group.shape[0] < Segment::HEAD || reinterpret_cast<uintptr_t>(segment) % 128)
            group.refuse("is no memory that ranks share");
        if (segment->magic != Segment::MAGIC) group.refuse("is no memory that ranks share");
        if (segment->ranks != ranks)
            group.refuse("is of " + std::to_string(segment->ranks) + " ranks, and the graph of " +
                         std::to_string(ranks));
        const auto capacity = static_cast<int64_t>(std::min<uint64_t>(segment->capacity, MOST));
        if (capacity < 1 || Segment::size(ranks, std::min<int64_t>(capacity, MOST / 1024)) != group.shape[0])
            group.refuse("has not the size that it claims");
        if (segment->lines()[rank].process.load() != own_process())
            group.refuse("is memory that this process has not joined as rank " + std::to_string(rank));
        return *segment;
    }

    void add_up(const Call& call, Segment& segment, const float* from, float* to, int64_t count) const {
        RankLine& own = segment.lines()[rank];
        const uint32_t turn = own.turn.load(std::memory_order_relaxed) + 1;
        std::memcpy(segment.slot(turn, rank), from, count * sizeof(float));
        own.counts[turn & 1].store(count, std::memory_order_relaxed);
        own.turn.store(turn);
        if (own.sleepers.load()) wake(own.turn);
        for (int64_t other = 0; other < ranks; other++) {
            if (other == rank) continue;
            RankLine& line = segment.lines()[other];
            if (!has_come(line, turn)) wait(segment, line, other, turn);
            if (line.counts[turn & 1].load(std::memory_order_relaxed) != static_cast<uint64_t>(count))
                fail(segment, OTHER_STEP, other);
        }
        call.in_parallel(divided_up(count, SLICE), [&](int64_t slice) {
            const int64_t start = slice * SLICE, end = std::min(count, start + SLICE);
            const float* first = segment.slot(turn, 0);
            if (ranks == 1) return static_cast<void>(std::copy(first + start, first + end, to + start));
            const float* second = segment.slot(turn, 1);
            for (int64_t i = start; i < end; i++) to[i] = first[i] + second[i];
            for (int64_t other = 2; other < ranks; other++) {
                const float* more = segment.slot(turn, other);
                for (int64_t i = start; i < end; i++) to[i] += more[i];
            }
        });
    }

    // Turns are counted without end, so that they are compared by their difference.
    static bool has_come(const RankLine& line, uint32_t turn) {
        return static_cast<int32_t>(line.turn.load(std::memory_order_acquire) - turn) >= 0;
    }

    void wait(Segment& segment, RankLine& line, int64_t other, uint32_t turn) const {
        for (uint32_t look = 0; look < segment.spins; look++) {
            if (has_come(line, turn)) return;
            pause();
        }
        line.sleepers.fetch_add(1);
        uint32_t looks = 0;
        while (!has_come(line, turn)) {
            if (const uint32_t fault = segment.fault.load()) {
                line.sleepers.fetch_sub(1);
                say(fault);
            }
            const uint32_t seen = line.turn.load();
            if (static_cast<int32_t>(seen - turn) >= 0 || !sleep(line.turn, seen)) continue;
            Fault fault{};
            if (is_gone(line.process.load())) fault = ENDED;
            else if (++looks >= segment.patience) fault = SILENT;
            else continue;
            line.sleepers.fetch_sub(1);
            fail(segment, fault, other);
        }
        line.sleepers.fetch_sub(1);
    }

    [[noreturn]] static void fail(Segment& segment, Fault fault, int64_t about) {
        uint32_t none = 0;
        const uint32_t found = fault << 16 | static_cast<uint32_t>(about);
        segment.fault.compare_exchange_strong(none, found);
        say(segment.fault.load());
    }

    [[noreturn]] static void say(uint32_t fault) {
        const std::string named = "rank " + std::to_string(fault & 0xffff);
        switch (fault >> 16) {
            case ENDED: throw Refusal(named + " has ended");
            case SILENT: throw Refusal(named + " does not answer");
            case OTHER_STEP: throw Refusal(named + " computes another step");
            default: throw Refusal(named + " has failed");
        }
    }

    static void pause() {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#elif defined(__aarch64__)
        asm volatile("yield");
#endif
    }

#ifdef __linux__
    static void wake(std::atomic<uint32_t>& word) {
        syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
    }
    // Sleeps until the next look while the word is as it was seen. Returns whether the time has passed.
    static bool sleep(std::atomic<uint32_t>& word, uint32_t seen) {
        const timespec time{0, LOOK};
        return syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAIT, seen, &time, nullptr, 0) == -1 &&
               errno == ETIMEDOUT;
    }
    static int32_t own_process() { return getpid(); }
    static bool is_gone(int32_t process) { return process > 0 && kill(process, 0) == -1 && errno == ESRCH; }
#else
    static void wake(std::atomic<uint32_t>&) {}
    static bool sleep(std::atomic<uint32_t>&, uint32_t) { return true; }
    static int32_t own_process() { return 0; }
    static bool is_gone(int32_t) { return true; }
#endif
};
