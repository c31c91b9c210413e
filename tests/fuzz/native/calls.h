// Calls of the library's ops, drawn from bytes: attributes and tensors that fit one another, before any is changed.

#pragma once

#include <unistd.h>

#include <cmath>
#include <random>

#include "runtime.h"

struct Drawn {
    const ort::CustomOp* op;
    ort::Info info;
    std::vector<std::pair<ort::Type, std::vector<int64_t>>> inputs;  // a type of `any` is an input that is not given
};

// Draws whole numbers: `Source::between(least, most)`.
template <typename Source>
struct Draw {
    Source& source;

    int64_t between(int64_t least, int64_t most) { return source.between(least, most); }
    bool coin() { return between(0, 1); }

    void matrix(Drawn& drawn, int64_t bits, int64_t group, int64_t experts, int64_t inputs, int64_t outputs) {
        const int64_t panels = (outputs + 31) / 32, padded = (inputs + 31) / 32 * 32;
        const std::vector<int64_t> none, held{experts};
        std::vector<int64_t> weight = experts ? held : none, scale = weight;
        for (const int64_t size : {panels, padded * 32 * bits / 8}) weight.push_back(size);
        for (const int64_t size : {panels, group ? inputs / group : 1, int64_t{32}}) scale.push_back(size);
        drawn.inputs.push_back({ort::Type::uint8, weight});
        drawn.inputs.push_back({bits >= 16 ? ort::Type::any
                                : coin()   ? ort::Type::bfloat16
                                           : ort::Type::float32,
                                scale});
    }

    Drawn linear(const ort::CustomOp* op) {
        Drawn drawn{op, {}, {}};
        const int64_t bits = int64_t{4} << between(0, 3), group = bits < 16 && coin() ? 8 * between(1, 9) : 0;
        const int64_t inputs = group ? group * between(1, 4) : between(1, 90), outputs = between(1, 70);
        drawn.info.integers = {{"bits", bits}, {"group", group}, {"outputs", outputs}};
        drawn.inputs = {{ort::Type::float32, {between(0, 9), inputs}}};
        if (coin()) drawn.inputs[0].second.insert(drawn.inputs[0].second.begin(), between(0, 3));
        matrix(drawn, bits, group, 0, inputs, outputs);
        drawn.inputs.push_back({bits < 16 && coin() ? ort::Type::float32 : ort::Type::any, {}});
        return drawn;
    }

    Drawn experts(const ort::CustomOp* op) {
        Drawn drawn{op, {}, {}};
        const int64_t bits = coin() ? 4 : 8, group = coin() ? 8 * between(1, 5) : 0, down = coin() ? 8 : 0;
        const int64_t size = group ? group * between(1, 3) : between(1, 70),
                      width = down ? 8 * between(1, 6) : between(1, 50);
        const int64_t routed = between(1, 9), held = between(1, routed), tokens = between(0, 12);
        drawn.info.integers = {{"bits", bits},
                               {"group", group},
                               {"down_group", down},
                               {"top_k", between(1, routed)},
                               {"first_expert", between(0, routed - held)},
                               {"experts", held},
                               {"width", width}};
        drawn.inputs = {{ort::Type::float32, {tokens, size}}, {ort::Type::float32, {tokens, routed}}};
        matrix(drawn, bits, group, held, size, 2 * width);
        matrix(drawn, bits, down, held, width, size);
        for (int i = 0; i < 2; i++) drawn.inputs.push_back({coin() ? ort::Type::float32 : ort::Type::any, {held}});
        return drawn;
    }

    Drawn attention(const ort::CustomOp* op) {
        Drawn drawn{op, {}, {}};
        const ort::Type cache = op->input_type(op, 3);
        const bool has_scales = cache == ort::Type::int8 || cache == ort::Type::e4m3, has_rope = coin();
        const int64_t kv_heads = between(1, 3), heads = kv_heads * between(1, 4), batch = between(0, 3);
        const int64_t dim = has_rope ? 2 * between(1, 40) : between(1, 80), length = between(0, 8);
        const int64_t bits = cache == ort::Type::uint8 ? (coin() ? 4 : 8) : 0, groups = (dim + 31) / 32;
        const int64_t slot = bits == 4 ? groups * 20 : bits == 8 ? groups * 34 : dim;
        const std::vector<int64_t> keys{batch, length, kv_heads * dim};
        const std::vector<int64_t> caches{batch, kv_heads, length + between(0, 140), slot}, scales{kv_heads, dim};
        drawn.info.integers = {
            {"heads", heads}, {"kv_heads", kv_heads}, {"chunk", coin() ? between(1, 64) : 0}, {"cache_bits", bits}};
        drawn.info.numbers = {{"scale", 1 / std::sqrt(static_cast<float>(dim))},
                              {"qk_norm_eps", coin() ? 1e-5f : 0},
                              {"temperature_scale", coin() ? 0.1f : 0},
                              {"temperature_floor", 4}};
        drawn.inputs = {{ort::Type::float32, {batch, length, heads * dim}},
                        {ort::Type::float32, keys},
                        {ort::Type::float32, keys},
                        {cache, caches},
                        {cache, caches},
                        {ort::Type::int32, {batch}},
                        {has_rope ? ort::Type::float32 : ort::Type::any, {dim / 2}},
                        {has_scales ? ort::Type::float32 : ort::Type::any, scales},
                        {has_scales ? ort::Type::float32 : ort::Type::any, scales}};
        return drawn;
    }

    // A matrix of floats as checkpoints hold it; rows, inputs and outputs on both sides of what is taken at once.
    Drawn plain_linear(const ort::CustomOp* op) {
        Drawn drawn{op, {}, {}};
        constexpr ort::Type TYPES[] = {ort::Type::float32, ort::Type::float16, ort::Type::bfloat16};
        const int64_t inputs = between(0, 3) ? between(1, 90) : between(500, 1100), outputs = between(0, 110);
        const int64_t rows = between(0, 3) ? between(0, 9) : between(10, 80);
        drawn.inputs = {{ort::Type::float32, {rows, inputs}}, {TYPES[between(0, 2)], {outputs, inputs}}};
        if (coin()) drawn.inputs[0].second.insert(drawn.inputs[0].second.begin(), between(0, 3));
        return drawn;
    }

    // Experts of floats as stacked checkpoints hold them; sizes on both sides of what is taken at once.
    Drawn plain_experts(const ort::CustomOp* op) {
        Drawn drawn{op, {}, {}};
        constexpr ort::Type TYPES[] = {ort::Type::float32, ort::Type::float16, ort::Type::bfloat16};
        const int64_t size = between(0, 3) ? between(1, 70) : between(250, 600), width = between(1, 50);
        const int64_t routed = between(1, 9), held = between(1, routed), tokens = between(0, 60);
        drawn.info.integers = {{"top_k", between(1, routed)}, {"first_expert", between(0, routed - held)}};
        drawn.inputs = {{ort::Type::float32, {tokens, size}},
                        {ort::Type::float32, {tokens, routed}},
                        {TYPES[between(0, 2)], {held, size, 2 * width}},
                        {TYPES[between(0, 2)], {held, width, size}}};
        return drawn;
    }

    // A matrix of E4M3 as checkpoints hold it; rows, inputs and outputs on both sides of what is taken at once.
    Drawn fp8_linear(const ort::CustomOp* op) {
        Drawn drawn{op, {}, {}};
        const int64_t inputs = between(0, 3) ? between(1, 90) : between(500, 2200), outputs = between(0, 110);
        const int64_t rows = between(0, 3) ? between(0, 9) : between(10, 80);
        drawn.info.numbers = {{"bound", coin() ? 1.5f : 0}};
        drawn.inputs = {{ort::Type::float32, {rows, inputs}},
                        {ort::Type::e4m3, {outputs, inputs}},
                        {ort::Type::float32, {outputs}},
                        {coin() ? ort::Type::float32 : ort::Type::any, {}}};
        if (coin()) drawn.inputs[0].second.insert(drawn.inputs[0].second.begin(), between(0, 3));
        return drawn;
    }

    // Experts of E4M3 as stacked checkpoints hold them.
    Drawn fp8_experts(const ort::CustomOp* op) {
        Drawn drawn{op, {}, {}};
        const int64_t size = between(0, 3) ? between(1, 70) : between(250, 600), width = between(1, 50);
        const int64_t routed = between(1, 9), held = between(1, routed), tokens = between(0, 60);
        drawn.info.integers = {{"top_k", between(1, routed)}, {"first_expert", between(0, routed - held)}};
        drawn.info.numbers = {{"bound", coin() ? 1.5f : 0}};
        drawn.inputs = {{ort::Type::float32, {tokens, size}},        {ort::Type::float32, {tokens, routed}},
                        {ort::Type::e4m3, {held, 2 * width, size}},  {ort::Type::float32, {held, 2 * width, 1}},
                        {ort::Type::e4m3, {held, size, width}},      {ort::Type::float32, {held, size, 1}}};
        for (int i = 0; i < 2; i++) drawn.inputs.push_back({coin() ? ort::Type::float32 : ort::Type::any, {held}});
        return drawn;
    }

    Drawn sum(const ort::CustomOp* op) {
        Drawn drawn{op, {}, {}};
        const int64_t ranks = between(1, 4), capacity = between(1, 600), turns = between(1, 3);
        const int64_t count = turns == 1 ? between(0, capacity) : turns * capacity;
        drawn.info.integers = {{"ranks", ranks}, {"rank", between(0, ranks - 1)}};
        drawn.inputs = {{ort::Type::float32, {count}}, {ort::Type::uint8, {Segment::size(ranks, capacity)}}};
        if (coin()) drawn.inputs[0].second.push_back(1);
        return drawn;
    }

    Drawn call() {
        const auto& all = ort::ops();
        return of(all[between(0, static_cast<int64_t>(all.size()) - 1)]);
    }

    Drawn of(const ort::CustomOp* op) {
        const std::string name = op->name(op);
        if (name == "AllReduce") return sum(op);
        if (name == "Linear") return linear(op);
        if (name == "MoeDispatch") return experts(op);
        if (name == "PlainLinear") return plain_linear(op);
        if (name == "PlainMoeDispatch") return plain_experts(op);
        if (name == "Fp8Linear") return fp8_linear(op);
        if (name == "Fp8MoeDispatch") return fp8_experts(op);
        if (name == "GroupedQueryAttention") return attention(op);
        throw std::logic_error("no calls of the op " + name + " are drawn");
    }
};

// Values of a type, ready to be copied: floats about zero, scales small and positive; or bytes of any kind.
struct Pool {
    static constexpr size_t BYTES = 1 << 16;
    std::vector<uint8_t> bytes;

    Pool(ort::Type type, bool is_scale, bool is_wild, std::mt19937_64& random) : bytes(BYTES) {
        for (size_t i = 0; i < BYTES; i += 8) {
            const uint64_t word = random();
            std::memcpy(&bytes[i], &word, 8);
        }
        if (is_wild) return;
        std::normal_distribution<float> normal;
        const size_t size = type == ort::Type::float32 ? 4 : type == ort::Type::bfloat16 ? 2 : BYTES;
        for (size_t i = 0; size < BYTES && i < BYTES; i += size) {
            const float drawn = normal(random), number = is_scale ? 0.01f + std::fabs(drawn) / 100 : drawn;
            uint8_t of_number[4];
            std::memcpy(of_number, &number, 4);
            std::memcpy(&bytes[i], of_number + 4 - size, size);
        }
        for (size_t i = 0; i < BYTES; i++)  // no exponent of theirs is the largest
            if (type == ort::Type::e4m3 || (type == ort::Type::float16 && i % 2)) bytes[i] &= 0xBF;
    }

    static const Pool& of(ort::Type type, bool is_scale, bool is_wild) {
        static const std::vector<Pool> all = [] {
            std::vector<Pool> made;
            std::mt19937_64 random(1);
            for (int each = 0; each < 4 * MOST_TYPES; each++)
                made.emplace_back(static_cast<ort::Type>(each / 4), each & 1, each & 2, random);
            return made;
        }();
        return all.at(static_cast<size_t>(type) * 4 + is_scale + 2 * is_wild);
    }

    static constexpr int MOST_TYPES = 32;
};

// A tensor of plausible values: floats about zero or all bits at random, scales small, lengths few.
inline std::unique_ptr<ort::Value> filled(ort::Type type, const std::vector<int64_t>& dims, bool is_scale, bool is_wild,
                                          std::mt19937_64& random) {
    auto made = std::make_unique<ort::Value>(type, dims);
    auto* bytes = static_cast<uint8_t*>(made->data);
    const Pool& pool = Pool::of(type, is_scale, is_wild);
    for (size_t at = 0; at < made->size();) {
        const size_t from = random() % (Pool::BYTES / 16) * 16;
        const size_t count = std::min(made->size() - at, Pool::BYTES - from);
        std::memcpy(bytes + at, &pool.bytes[from], count);
        at += count;
    }
    return made;
}

// Makes of a sum's `group`, full of any bytes, what its ranks share where all but this one have come to each turn.
inline void gather(const Drawn& drawn, ort::Context& context) {
    if (std::string(drawn.op->name(drawn.op)) != "AllReduce" || context.inputs.size() < 2) return;
    const auto &part = context.inputs[0], &group = context.inputs[1];
    const auto ranks = drawn.info.integers.find("ranks"), rank = drawn.info.integers.find("rank");
    if (!part || !group || ranks == drawn.info.integers.end() || rank == drawn.info.integers.end()) return;
    const uint64_t count = ranks->second, own = rank->second;
    const size_t head = Segment::size(0, 0);
    if (count < 1 || count > Segment::MOST_RANKS || own >= count || group->size() < head + 8 * count) return;
    const uint64_t capacity = (group->size() - head) / 8 / count, brought = std::min<uint64_t>(part->count(), capacity);
    std::memset(group->data, 0, head);
    auto& segment = *static_cast<Segment*>(group->data);
    segment.magic = Segment::MAGIC;
    segment.ranks = static_cast<uint32_t>(count);
    segment.capacity = capacity;
    segment.patience = 1;
    for (uint64_t other = 0; other < count; other++) {
        RankLine& line = segment.lines()[other];
        line.process = getpid();
        if (other == own) continue;
        line.turn = 1 << 20;
        for (auto& each : line.counts) each = brought;
    }
}
