// The library's ops called from threads of this program's own, over kernels that all of them share, each call itself in
// parallel: for the thread sanitizer. Every thread must compute, bit by bit, what one alone does.

#include <cstdio>

#include "calls.h"

namespace {

struct Random {
    std::mt19937_64 numbers;
    int64_t between(int64_t least, int64_t most) {
        return std::uniform_int_distribution<int64_t>(least, most)(numbers);
    }
};

struct Work {
    Drawn drawn;
    std::unique_ptr<ort::Kernel> kernel;
    std::vector<uint8_t> expected;

    // The bytes of all outputs of a call whose inputs are drawn from the seed.
    std::vector<uint8_t> run(uint64_t seed, size_t threads) const {
        std::mt19937_64 random(seed);
        ort::Context context;
        context.threads = threads;
        for (size_t i = 0; i < drawn.inputs.size(); i++) {
            const auto& [type, dims] = drawn.inputs[i];
            context.inputs.push_back(type == ort::Type::any ? nullptr : filled(type, dims, i > 2, false, random));
        }
        if (drawn.inputs.size() == 9) {  // attention: every length that leaves room
            auto* lengths = static_cast<int32_t*>(context.inputs[5]->data);
            const int64_t room = drawn.inputs[3].second[2] - drawn.inputs[0].second[1];
            const int64_t chunk = drawn.info.integers.at("chunk"), most = chunk ? std::min(room, chunk - 1) : room;
            for (size_t row = 0; row < context.inputs[5]->count(); row++)
                lengths[row] = static_cast<int32_t>(random() % static_cast<uint64_t>(most + 1));
        }
        gather(drawn, context);
        kernel->compute(context);
        std::vector<uint8_t> bytes;
        for (const auto& output : context.outputs) {
            const auto* from = static_cast<const uint8_t*>(output->data);
            bytes.insert(bytes.end(), from, from + output->size());
        }
        return bytes;
    }
};

}  // namespace

int main(int count, char** arguments) {
    const int calls = count > 1 ? std::atoi(arguments[1]) : 60;
    Random random{std::mt19937_64(1)};
    std::vector<Work> all(calls);
    for (int i = 0; i < calls; i++) {
        Work& work = all[i];
        work.drawn = Draw<Random>{random}.call();
        work.kernel = std::make_unique<ort::Kernel>(work.drawn.op, work.drawn.info);
        work.expected = work.run(i, 1);
    }
    std::atomic<int> wrong{0}, next{0};
    std::vector<std::thread> threads;
    for (int thread = 0; thread < 4; thread++)
        threads.emplace_back([&] {
            for (int unit; (unit = next++) < 4 * calls;)
                if (all[unit % calls].run(unit % calls, 3) != all[unit % calls].expected) wrong++;
        });
    for (std::thread& thread : threads) thread.join();
    std::printf("%d calls of %d kernels over 4 threads, %d of them wrong\n", 4 * calls, calls, wrong.load());
    return wrong != 0;
}
