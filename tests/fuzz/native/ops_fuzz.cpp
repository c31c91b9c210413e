// libFuzzer's entry for the library's ops: a call drawn from the bytes, some of it changed, run over `runtime.h`.
//
// It must be refused or computed; the sanitizers see to memory, and an output that was not written ends the process.
// With `--seeds=FOLDER` the program first writes the bytes of calls that fit, so that a corpus begins with every op's.

#include <cstdio>
#include <fstream>

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

// Whole numbers as bytes hold them, each in as few as its range needs; behind the last byte are zeros.
struct Bytes {
    const uint8_t *at, *end;

    int64_t between(int64_t least, int64_t most) {
        const auto range = static_cast<uint64_t>(most) - static_cast<uint64_t>(least);
        uint64_t drawn = 0;
        for (uint64_t left = range; left; left >>= 8) drawn = drawn << 8 | (at < end ? *at++ : 0);
        return static_cast<int64_t>(static_cast<uint64_t>(least) + (range == UINT64_MAX ? drawn : drawn % (range + 1)));
    }
    // Whether one of so many chances comes true.
    bool rarely(int64_t chances) { return between(0, chances - 1) == chances - 1; }
};

// Numbers of calls that fit, and the bytes that hold them.
struct Recorder {
    std::mt19937_64 numbers;
    std::string bytes;

    int64_t between(int64_t least, int64_t most) {
        const int64_t drawn = std::uniform_int_distribution<int64_t>(least, most)(numbers);
        const auto range = static_cast<uint64_t>(most) - static_cast<uint64_t>(least);
        int count = 0;
        for (uint64_t left = range; left; left >>= 8) count++;
        const auto above = static_cast<uint64_t>(drawn) - static_cast<uint64_t>(least);
        while (count--) bytes += static_cast<char>(above >> 8 * count);
        return drawn;
    }
    bool rarely(int64_t chances) {
        if (chances > 1) bytes += '\0';
        return false;
    }
};

template <typename Source>
void change_shape(Source& bytes, std::vector<int64_t>& dims) {
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

template <typename Source>
void change(Source& bytes, Drawn& drawn) {
    const auto set_one = [&](auto& map, auto value) {
        if (!map.empty()) std::next(map.begin(), bytes.between(0, map.size() - 1))->second = value;
    };
    auto& [type, dims] = drawn.inputs[bytes.between(0, drawn.inputs.size() - 1)];
    switch (bytes.between(0, 7)) {
        case 0: set_one(drawn.info.integers, WORDS[bytes.between(0, std::size(WORDS) - 1)]); break;
        case 1: set_one(drawn.info.integers, bytes.between(-5, 70)); break;
        case 2: set_one(drawn.info.numbers, NUMBERS[bytes.between(0, std::size(NUMBERS) - 1)]); break;
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

// Lengths of which most leave room behind them.
template <typename Source>
void fill_lengths(Source& bytes, const Drawn& drawn, ort::Context& context) {
    if (context.inputs.size() < 6 || !context.inputs[5] || context.inputs[5]->type != ort::Type::int32) return;
    const auto &query = drawn.inputs[0].second, &cache = drawn.inputs[3].second;
    const auto found = drawn.info.integers.find("chunk");
    const int64_t chunk = found == drawn.info.integers.end() ? 0 : std::clamp<int64_t>(found->second, 0, 512);
    const int64_t room = query.size() == 3 && cache.size() == 4 ? std::max<int64_t>(0, cache[2] - query[1]) : 140;
    auto* lengths = static_cast<int32_t*>(context.inputs[5]->data);
    for (size_t row = 0; row < context.inputs[5]->count(); row++) {
        const int64_t slot = bytes.between(0, chunk ? std::min(room, chunk - 1) : room);
        lengths[row] = static_cast<int32_t>(bytes.rarely(16) ? bytes.between(INT32_MIN, INT32_MAX)
                                                             : slot + chunk * bytes.between(0, 3));
    }
}

// Puts a word into the second input: of a sum into the head or a line of what ranks share.
template <typename Source>
void spoil(Source& bytes, ort::Context& context) {
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

// Draws a call with its tensors. Returns whether they fit this program's memory.
template <typename Source>
bool draw(Source& bytes, Drawn& drawn, ort::Context& context) {
    drawn = Draw<Source>{bytes}.call();
    for (int count = 0; count < 3 && bytes.rarely(2); count++)
        if (!drawn.inputs.empty()) change(bytes, drawn);
    std::mt19937_64 random(bytes.between(0, 255));
    const bool is_wild = bytes.rarely(8);
    context.output_byte = 0xC7;
    context.in_place = std::string(drawn.op->name(drawn.op)) == "GroupedQueryAttention" && bytes.between(0, 1);
    for (size_t i = 0; i < drawn.inputs.size(); i++) {
        const auto& [type, dims] = drawn.inputs[i];
        if (!fits(dims)) return false;
        const bool is_scale = i > 2;
        context.inputs.push_back(type == ort::Type::any ? nullptr : filled(type, dims, is_scale, is_wild, random));
    }
    fill_lengths(bytes, drawn, context);
    if (!bytes.rarely(8)) gather(drawn, context);
    if (bytes.rarely(8)) spoil(bytes, context);
    return true;
}

void write_seeds(const std::string& folder) {
    for (int number = 0; number < 400; number++) {
        Recorder recorder{std::mt19937_64(number), {}};
        Drawn drawn;
        ort::Context context;
        draw(recorder, drawn, context);
        ort::Kernel(drawn.op, drawn.info).compute(context);  // one that is refused ends the program
        std::ofstream(folder + "/seed" + std::to_string(number), std::ios::binary) << recorder.bytes;
    }
}

}  // namespace

extern "C" int LLVMFuzzerInitialize(int* count, char*** arguments) {
    const std::string name = "--seeds=";
    for (int i = 1; i < *count; i++)
        if (const std::string given = (*arguments)[i]; given.rfind(name, 0) == 0) write_seeds(given.substr(name.size()));
    return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    Bytes bytes{data, data + size};
    Drawn drawn;
    ort::Context context;
    if (!draw(bytes, drawn, context)) return -1;
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
