// Attention over caches of keys and values, in blocks of slots with a running softmax (Milakov and Gimelshein 2018,
// arXiv:1805.02867; Dao et al. 2022, arXiv:2205.14135).
//
// Included once for each instruction set, within its own namespace, behind `attention_products.h`.
//
// A query's blocks begin at the same slots whatever it is computed with, and so do its spans of many blocks, each of
// which is a softmax of its own, that are joined in their order; what it does not see adds zero. So a token gets the
// same bits alone, in a prompt's piece, and in a batch, and on however many threads, as long as all values are finite.

// Queries that meet keys and values as they lie, at most. Vectors of 16 bytes do better by way of memory.
constexpr int64_t FEW_ROWS = ARRIERO_SET == 1 || ARRIERO_SET == 2 ? 12 : 0;

// A head rotated by its position's angles, then normalised, then multiplied by a factor.
inline void turn(const Attention& call, const float* from, const float* angles, float factor, float* to) {
    const int64_t size = call.head_dim;
    if (angles) {
        for (int64_t d = 0; d < size; d += 2) {
            const float cos = angles[d], sin = angles[d + 1];
            to[d] = from[d] * cos - from[d + 1] * sin;
            to[d + 1] = from[d] * sin + from[d + 1] * cos;
        }
    } else {
        std::memcpy(to, from, size * sizeof(float));
    }
    if (call.qk_norm_eps != 0) {
        float sum = 0;
        for (int64_t d = 0; d < size; d++) sum += to[d] * to[d];
        factor /= std::sqrt(sum / static_cast<float>(size) + call.qk_norm_eps);
    }
    for (int64_t d = 0; d < size; d++) to[d] *= factor;
}

// Makes one token's queries ready, and writes its keys and values to their slots.
inline void enter(const Attention& call, int64_t row, int64_t step) {
    const int64_t size = call.head_dim, each = call.heads / call.kv_heads, token = row * call.length + step;
    const int64_t position = call.past[row] + step, slot = call.slot(row) + step;
    float temperature = 1;
    if (call.temperature_scale != 0) {
        const float steps = std::floor(static_cast<float>(position + 1) / call.temperature_floor);
        temperature += std::log(steps + 1) * call.temperature_scale;
    }
    float made[MOST_DIMS], angles[MOST_DIMS];
    if (call.inv_freq)
        for (int64_t pair = 0; pair < size / 2; pair++) {
            const float angle = static_cast<float>(position) * call.inv_freq[pair];
            angles[2 * pair] = std::cos(angle), angles[2 * pair + 1] = std::sin(angle);
        }
    const float* turned_by = call.inv_freq ? angles : nullptr;
    for (int64_t head = 0; head < call.kv_heads; head++) {
        const int64_t source = (token * call.kv_heads + head) * size;
        const int64_t place = ((row * call.kv_heads + head) * call.capacity + slot) * call.slot_size();
        turn(call, call.key + source, turned_by, 1, made);
        write_cached(call, call.key_cache + place, made, call.key_scale ? call.key_scale + head * size : nullptr);
        write_cached(call, call.value_cache + place, call.value + source,
                     call.value_scale ? call.value_scale + head * size : nullptr);
        for (int64_t query = 0; query < each; query++) {
            const float* from = call.query + (token * call.heads + head * each + query) * size;
            float* to = call.queries + (((row * call.kv_heads + head) * call.length + step) * each + query) * size;
            turn(call, from, turned_by, call.scale * temperature, to);
            if (call.key_scale)
                for (int64_t d = 0; d < size; d++) to[d] *= call.key_scale[head * size + d];
        }
    }
}

// A row's scores of a block become what its values are weighed with. Returns what is left of the sums before it.
inline float weigh(float* scores, int64_t seen, float& largest, float& total) {
    if (seen <= 0) {
        std::memset(scores, 0, SLOTS * sizeof(float));
        return 1;
    }
    Floats highest = all(largest);
    for (int64_t slot = 0; slot < SLOTS; slot += LANES) {
        Floats part = load<Floats>(scores + slot);
        for (int64_t lane = std::max<int64_t>(0, seen - slot); lane < LANES; lane++) part[lane] = LOWEST;
        store(scores + slot, part);
        highest = part > highest ? part : highest;
    }
    const float now = largest_of(highest);
    Floats sum = {};
    for (int64_t slot = 0; slot < SLOTS; slot += LANES) {
        const Floats part = load<Floats>(scores + slot);
        const Floats weights = part <= LOWEST ? Floats{} : exponential(part - now);  // a NaN stays one
        store(scores + slot, weights);
        sum += weights;
    }
    const float kept = largest > LOWEST ? exponential(all(largest - now))[0] : 0;
    largest = now;
    total = total * kept + sum_of(sum);
    return kept;
}

// Sums of values [rows, padded], each row's largest score, and the total of its weights.
struct Running {
    float *sums, *largest, *total;

    Running(const Attention& call, const Tile& tile, float* state)
        : sums(state), largest(sums + tile.rows(call) * call.padded_dims()), total(largest + tile.rows(call)) {}
};

// A tile's queries over the slots of one span.
template <Cached CACHE>
inline void attend_over(const Attention& call, const Tile& tile, int64_t span, float* state, AttentionSpace& space) {
    const int64_t size = call.head_dim, padded = call.padded_dims(), each = call.heads / call.kv_heads;
    const int64_t rows = tile.rows(call), slot = call.slot(tile.row), end = tile.filled(call);
    const int64_t start = (tile.row * call.kv_heads + tile.head) * call.capacity * call.slot_size();
    const float* queries =
        call.queries + ((tile.row * call.kv_heads + tile.head) * call.length + tile.first) * each * size;
    const bool is_few = rows <= FEW_ROWS;
    float* const columns = is_few ? nullptr : space.columns.take<float>(size * SLOTS);
    float* const widened = space.values.take<float>(SLOTS * padded);
    float* const scores = space.scores.take<float>(rows * SLOTS);
    float* const kept = space.rows.take<float>(rows);
    const Running running(call, tile, state);
    std::fill(running.sums, running.sums + rows * padded, 0.0f);
    std::fill(running.largest, running.largest + rows, LOWEST);
    std::fill(running.total, running.total + rows, 0.0f);
    for (int64_t at = span * SPAN; at < std::min(end, (span + 1) * SPAN); at += SLOTS) {
        const Block block{start + at * call.slot_size(), std::min(SLOTS, end - at)};
        if (is_few) {
            score_few<CACHE>(call, block, queries, rows, scores);
        } else {
            columns_of_keys<CACHE>(call, block, columns);
            multiply_floats(rows, queries, size, columns, SLOTS, size, SLOTS, scores, SLOTS, nullptr);
        }
        for (int64_t query = 0; query < rows; query++)
            kept[query] = weigh(scores + query * SLOTS, slot + tile.first + query / each + 1 - at,
                                running.largest[query], running.total[query]);
        if (is_few && size == padded) {
            add_few<CACHE>(call, block, rows, scores, kept, running.sums, padded);
            continue;
        }
        const float* values = reinterpret_cast<const float*>(call.value_cache + block.place);
        if (CACHE != Cached::float32 || size != padded) {
            widen_values<CACHE>(call, block, padded, widened);
            values = widened;
        }
        multiply_floats(rows, scores, SLOTS, values, padded, block.slots, padded, running.sums, padded, kept);
    }
}

inline void attend_span(const Attention& call, const Tile& tile, int64_t span, float* state, AttentionSpace& space) {
    switch (call.cache) {
        case Cached::float32: return attend_over<Cached::float32>(call, tile, span, state, space);
        case Cached::float16: return attend_over<Cached::float16>(call, tile, span, state, space);
        case Cached::groups8: return attend_over<Cached::groups8>(call, tile, span, state, space);
        case Cached::groups4: return attend_over<Cached::groups4>(call, tile, span, state, space);
        case Cached::int8: return attend_over<Cached::int8>(call, tile, span, state, space);
        case Cached::e4m3: return attend_over<Cached::e4m3>(call, tile, span, state, space);
    }
}

// Adds a later span to those before it, for the queries that see any of it.
inline void join_span(const Attention& call, const Tile& tile, int64_t span, float* state, float* later) {
    const int64_t padded = call.padded_dims(), each = call.heads / call.kv_heads;
    const Running own(call, tile, state), other(call, tile, later);
    for (int64_t query = 0; query < tile.rows(call); query++) {
        if (call.slot(tile.row) + tile.first + query / each < span * SPAN) continue;
        const float most = std::max(own.largest[query], other.largest[query]);
        const float kept = exponential(all(own.largest[query] - most))[0],
                    added = exponential(all(other.largest[query] - most))[0];
        float *const to = own.sums + query * padded, *const from = other.sums + query * padded;
        for (int64_t d = 0; d < padded; d += LANES)
            store(to + d, load<Floats>(to + d) * kept + load<Floats>(from + d) * added);
        own.total[query] = own.total[query] * kept + other.total[query] * added;
        own.largest[query] = most;
    }
}

// Writes a tile's outputs, behind its last span.
inline void finish(const Attention& call, const Tile& tile, float* state) {
    const int64_t size = call.head_dim, padded = call.padded_dims(), each = call.heads / call.kv_heads;
    const Running running(call, tile, state);
    for (int64_t query = 0; query < tile.rows(call); query++) {
        const int64_t token = tile.row * call.length + tile.first + query / each;
        float* to = call.output + (token * call.heads + tile.head * each + query % each) * size;
        for (int64_t d = 0; d < size; d++) {
            to[d] = running.sums[query * padded + d] / running.total[query];
            if (call.value_scale) to[d] *= call.value_scale[tile.head * size + d];
        }
    }
}
