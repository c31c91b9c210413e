// The op `GroupedQueryAttention`: the canonical op's inputs, attributes and outputs, in float32 but for its caches, and
// an attribute `cache_bits` for caches of groups.

#pragma once

#include "products.h"

constexpr int64_t TILE_ROWS = 192;  // queries that a thread takes through a head's cache together
constexpr int64_t ENOUGH_TILES = 16;  // that keep all threads busy

// One op for each type of cache: ONNX Runtime wants to know what an output's type is.
template <ort::Type CACHE>
struct GroupedQueryAttention {
    static constexpr const char* NAME = "GroupedQueryAttention";
    static constexpr size_t INPUTS = 9, NEEDED = 6, OUTPUTS = 3;
    static constexpr const char* INPUT_NAMES[INPUTS] = {
        "query", "key", "value", "key_cache", "value_cache", "past_lengths", "inv_freq", "key_scale", "value_scale"};
    static constexpr bool HAS_GROUPS = CACHE == ort::Type::uint8;
    static constexpr bool HAS_SCALES = CACHE == ort::Type::int8 || CACHE == ort::Type::e4m3;

    static ort::Type input_type(size_t index) {
        if (index == 3 || index == 4) return CACHE;
        return index == 5 ? ort::Type::int32 : ort::Type::float32;
    }
    static ort::Type output_type(size_t index) { return index ? CACHE : ort::Type::float32; }

    Attention settings{};

    explicit GroupedQueryAttention(const Settings& given) {
        settings.cache = cached(HAS_GROUPS ? given.one_of("cache_bits", {4, 8}) : given.one_of("cache_bits", {0}));
        settings.heads = given.integer("heads", 1);
        settings.kv_heads = given.integer("kv_heads", 1);
        if (settings.heads % settings.kv_heads)
            Settings::refuse("heads", std::to_string(settings.heads),
                             "a multiple of kv_heads, " + std::to_string(settings.kv_heads));
        settings.chunk = given.integer("chunk", 0, INT64_MAX);
        settings.scale = given.number("scale");
        settings.qk_norm_eps = given.number("qk_norm_eps", 0);
        settings.temperature_scale = given.number("temperature_scale");
        settings.temperature_floor = given.positive("temperature_floor");
    }

    void compute(const Call& call) const {
        const Tensor query = call.input(0), key_cache = call.input(3), value_cache = call.input(4);
        Attention own = checked(call, query, key_cache, value_cache);
        own.output = call.output(query.shape);
        own.key_cache = present(call, 1, key_cache, own), own.value_cache = present(call, 2, value_cache, own);
        if (product({own.batch, own.length}) == 0) return;
        own.queries = buffers().queries.take<float>(product({own.batch, own.length, query.shape[2]}));
        call.in_parallel(own.batch * own.length,
                         [&](int64_t token) { kernels().enter(own, token / own.length, token % own.length); });
        attend(call, own);
    }

   private:
    // All tiles, each on a thread of its own, or, where they are few and long, each of their spans.
    static void attend(const Call& call, const Attention& own) {
        const int64_t each = own.heads / own.kv_heads, at_once = std::max<int64_t>(1, TILE_ROWS / each);
        const int64_t tiles = divided_up(own.length, at_once), count = product({own.batch, own.kv_heads, tiles});
        const auto tile_of = [&](int64_t unit) {
            const int64_t first = unit % tiles * at_once;
            return Tile{unit / tiles / own.kv_heads, unit / tiles % own.kv_heads, first,
                        std::min(at_once, own.length - first)};
        };
        if (count >= ENOUGH_TILES || each > TILE_ROWS) return whole_tiles(call, own, count, tile_of);
        std::vector<std::pair<int64_t, int64_t>> spans;  // a tile and one of its spans
        for (int64_t unit = 0; unit < count; unit++)
            for (int64_t span = 0; span < tile_of(unit).spans(own); span++) spans.emplace_back(unit, span);
        const int64_t most = static_cast<int64_t>(spans.size()), size = tile_of(0).state_size(own);
        if (most == count) return whole_tiles(call, own, count, tile_of);
        float* const states = buffers().states.take<float>(product({most, size}));
        call.in_parallel(most, [&](int64_t index) {
            const auto [unit, span] = spans[index];
            kernels().attend_span(own, tile_of(unit), span, states + index * size, buffers().attention);
        });
        for (int64_t index = 0, first = 0; index < most; index++) {
            const auto [unit, span] = spans[index];
            if (span == 0)
                first = index;
            else
                kernels().join_span(own, tile_of(unit), span, states + first * size, states + index * size);
            if (index + 1 == most || spans[index + 1].second == 0)
                kernels().finish(own, tile_of(unit), states + first * size);
        }
    }

    template <typename TileOf>
    static void whole_tiles(const Call& call, const Attention& own, int64_t count, const TileOf& tile_of) {
        call.in_parallel(count, [&](int64_t unit) {
            const Tile tile = tile_of(unit);
            AttentionSpace& space = buffers().attention;
            const int64_t size = tile.state_size(own);
            float* const state = space.state.take<float>(2 * size);
            kernels().attend_span(own, tile, 0, state, space);
            for (int64_t span = 1; span < tile.spans(own); span++) {
                kernels().attend_span(own, tile, span, state + size, space);
                kernels().join_span(own, tile, span, state, state + size);
            }
            kernels().finish(own, tile, state);
        });
    }

    // The call's inputs, all of which are known to fit: each that is given, and its shape, type and lengths.
    Attention checked(const Call& call, const Tensor& query, const Tensor& key_cache, const Tensor& value_cache) const {
        const Tensor key = call.input(1), value = call.input(2), past = call.input(5), inv_freq = call.input(6),
                     key_scale = call.input(7), value_scale = call.input(8);
        Attention own = settings;
        own.query = query.floats(), own.key = key.floats(), own.value = value.floats();
        query.expect({-1, -1, -1});
        own.batch = query.shape[0], own.length = query.shape[1], own.head_dim = query.shape[2] / own.heads;
        if (own.head_dim < 1 || own.head_dim > MOST_DIMS || query.shape[2] % own.heads)
            query.refuse("has the shape " + written(query.shape.dims, 3) + ", and " + std::to_string(own.heads) +
                         " heads of 1 to " + std::to_string(MOST_DIMS) + " dimensions each are needed");
        for (const Tensor* each : {&key, &value}) each->expect({own.batch, own.length, own.kv_heads * own.head_dim});
        own.capacity = key_cache.shape.rank == 4 ? key_cache.shape[2] : -1;
        for (const Tensor* each : {&key_cache, &value_cache}) {
            each->expect({own.batch, own.kv_heads, own.capacity, HAS_GROUPS ? own.slot_size() : own.head_dim});
            if (each->type != CACHE) each->refuse("is of " + name_of(each->type) + ", not of " + name_of(CACHE));
        }
        own.past = past.integers();
        past.expect({own.batch});
        for (int64_t row = 0; own.length && row < own.batch; row++)
            if (own.past[row] < 0 || own.slot(row) + own.length > own.capacity)
                past.refuse("holds " + std::to_string(own.past[row]) + ", behind which " + std::to_string(own.length) +
                            " tokens do not fit the " + std::to_string(own.capacity) + " slots of a cache");
        own.inv_freq = inv_freq.floats();
        if (inv_freq.is_given) {
            if (own.head_dim % 2)
                inv_freq.refuse("is given, and heads of " + std::to_string(own.head_dim) + " dimensions have no pairs");
            inv_freq.expect({own.head_dim / 2});
        }
        own.key_scale = scales(key_scale, own), own.value_scale = scales(value_scale, own);
        return own;
    }

    static const float* scales(const Tensor& tensor, const Attention& own) {
        if (tensor.is_given != HAS_SCALES)
            tensor.refuse(HAS_SCALES ? "is not given, and caches of " + name_of(CACHE) + " need it"
                                     : "is given, and caches of " + name_of(CACHE) + " have none");
        if (HAS_SCALES) tensor.expect({own.kv_heads, own.head_dim});
        return tensor.floats();
    }

    // A cache as the op leaves it: its past, which it usually is already.
    static uint8_t* present(const Call& call, size_t index, const Tensor& past, const Attention& own) {
        auto* present = call.output<uint8_t>(past.shape, index);
        const int64_t size = product({own.batch, own.kv_heads, own.capacity, own.slot_size()});
        if (size && present != past.data) std::memcpy(present, past.data, size);
        return present;
    }

    static Cached cached(int64_t bits) {
        switch (CACHE) {
            case ort::Type::float32: return Cached::float32;
            case ort::Type::float16: return Cached::float16;
            case ort::Type::int8: return Cached::int8;
            case ort::Type::e4m3: return Cached::e4m3;
            default: return bits == 4 ? Cached::groups4 : Cached::groups8;
        }
    }
};
