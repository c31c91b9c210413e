// libFuzzer's entry for the library's ops: a call drawn from the bytes, some of it changed, run over `runtime.h`.
//
// It must be refused or computed; the sanitizers see to memory, and an output that was not written ends the process.

#include <fuzzer/FuzzedDataProvider.h>

#include <cstdio>

#include "calls.h"

namespace {

constexpr int64_t WORDS[] = {INT64_MIN,
                             -(int64_t{1} << 32),
                             -8,
                             -1,
                             0,
                             1,
                             2,
                             3,
                             7,
                             12,
                             16,
                             17,
                             24,
                             40,
                             64,
                             512,
                             513,
                             int64_t{1} << 31,
                             (int64_t{1} << 32) + 4,
                             (int64_t{1} << 32) + 8,
                             int64_t{1} << 40,
                             int64_t{1} << 62,
                             INT64_MAX};
constexpr float NUMBERS[] = {NAN, INFINITY, -INFINITY, 0, -1, 1, 1e-45f, 1e-30f, 1e30f, 3e38f};
constexpr int64_t MOST_BYTES = 1 << 20;

struct Bytes {
    FuzzedDataProvider data;
    int64_t between(int64_t least, int64_t most) { return data.ConsumeIntegralInRange<int64_t>(least, most); }
};

void change_shape(Bytes& bytes, std::vector<int64_t>& dims) {
    const int64_t rank = static_cast<int64_t>(dims.size());
    switch (bytes.between(0, 4)) {
        case 0: dims.insert(dims.begin() + bytes.between(0, rank), bytes.between(0, 2)); break;
        case 1:
            if (rank) dims.erase(dims.begin() + bytes.between(0, rank - 1));
            break;
        case 2:
            if (rank) dims[bytes.between(0, rank - 1)] = bytes.between(0, 130);
            break;
        case 3:
            if (rank) dims[bytes.between(0, rank - 1)] += bytes.between(0, 1) ? 1 : -1;
            break;
        default:
            if (rank > 1) std::swap(dims[bytes.between(0, rank - 1)], dims[bytes.between(0, rank - 1)]);
    }
}

void change(Bytes& bytes, Drawn& drawn) {
    const auto any_of = [&](auto& map) { return std::next(map.begin(), bytes.between(0, map.size() - 1)); };
    auto& [type, dims] = drawn.inputs[bytes.between(0, drawn.inputs.size() - 1)];
    switch (bytes.between(0, 7)) {
        case 0: any_of(drawn.info.integers)->second = WORDS[bytes.between(0, std::size(WORDS) - 1)]; break;
        case 1: any_of(drawn.info.integers)->second = bytes.between(-5, 70); break;
        case 2:
            if (!drawn.info.numbers.empty())
                any_of(drawn.info.numbers)->second = NUMBERS[bytes.between(0, std::size(NUMBERS) - 1)];
            break;
        case 3: type = static_cast<ort::Type>(bytes.between(0, 22)); break;
        case 4: drawn.inputs.resize(bytes.between(0, drawn.inputs.size())); break;
        case 5: drawn.info.constants.insert(bytes.between(0, drawn.inputs.size() - 1)); break;
        default: change_shape(bytes, dims);
    }
}

bool fits(const std::vector<int64_t>& dims) {
    int64_t count = 1;
    for (const int64_t size : dims) {
        if (size < 0 || size > MOST_BYTES) return false;
        count *= std::max<int64_t>(size, 1);
        if (count > MOST_BYTES) return false;
    }
    return true;
}

// Lengths of which most, but not all, leave room behind them.
void fill_lengths(Bytes& bytes, ort::Context& context) {
    if (context.inputs.size() < 6 || !context.inputs[5] || context.inputs[5]->type != ort::Type::int32) return;
    auto* lengths = static_cast<int32_t*>(context.inputs[5]->data);
    for (size_t row = 0; row < context.inputs[5]->count(); row++)
        lengths[row] =
            static_cast<int32_t>(bytes.between(0, 15) ? bytes.between(0, 140) : bytes.between(INT32_MIN, INT32_MAX));
}

// Puts a word into the second input: of a sum into the head or a line of what ranks share.
void spoil(Bytes& bytes, ort::Context& context) {
    if (context.inputs.size() < 2 || !context.inputs[1] || context.inputs[1]->size() < 4) return;
    const int64_t word = WORDS[bytes.between(0, std::size(WORDS) - 1)];
    const int64_t places = std::min<int64_t>(static_cast<int64_t>(context.inputs[1]->size() / 4), 1100);
    auto* data = static_cast<uint8_t*>(context.inputs[1]->data);
    std::memcpy(data + 4 * bytes.between(0, places - 1), &word, 4);
    if (context.inputs[1]->size() < sizeof(Segment)) return;
    auto& segment = *reinterpret_cast<Segment*>(data);
    segment.spins = 0;  // how long it waits is for who made the memory to say
    segment.patience = 1;
}

void check_written(const ort::Value& output) {
    uint32_t untouched;
    std::memset(&untouched, 0xC7, sizeof untouched);
    for (size_t i = 0; i < output.count(); i++) {
        uint32_t word;
        std::memcpy(&word, static_cast<const uint8_t*>(output.data) + 4 * i, 4);
        if (word != untouched) continue;
        std::fprintf(stderr, "output element %zu was not written\n", i);
        std::abort();
    }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    Bytes bytes{{data, size}};
    Drawn drawn = Draw<Bytes>{bytes}.call();
    for (int64_t count = bytes.between(0, 3); count; count--)
        if (!drawn.inputs.empty()) change(bytes, drawn);
    std::mt19937_64 random(bytes.between(0, 255));
    const bool is_wild = bytes.between(0, 7) == 0;
    ort::Context context;
    context.output_byte = 0xC7;
    context.in_place = std::string(drawn.op->name(drawn.op)) == "GroupedQueryAttention" && bytes.between(0, 1);
    for (size_t i = 0; i < drawn.inputs.size(); i++) {
        const auto& [type, dims] = drawn.inputs[i];
        if (!fits(dims)) return -1;
        const bool is_scale = i > 2;
        context.inputs.push_back(type == ort::Type::any ? nullptr : filled(type, dims, is_scale, is_wild, random));
    }
    fill_lengths(bytes, context);
    if (bytes.between(0, 7)) gather(drawn, context);
    if (bytes.between(0, 7) == 0) spoil(bytes, context);
    try {
        const ort::Kernel kernel(drawn.op, drawn.info);
        kernel.compute(context);
    } catch (const std::runtime_error& refusal) {
        const std::string message = refusal.what();
        if (message.rfind("arriero.cpu ", 0) != 0 || message.size() > 300 || message.find('\n') != std::string::npos) {
            std::fprintf(stderr, "not one line: %s\n", refusal.what());
            std::abort();
        }
        return 0;
    }
    check_written(*context.outputs[0]);
    return 0;
}
