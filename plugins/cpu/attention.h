// Attention over caches of keys and values, in blocks of slots with a running softmax (Milakov and Gimelshein 2018,
// arXiv:1805.02867; Dao et al. 2022, arXiv:2205.14135).
//
// Included once for each instruction set, within its own namespace, behind `vectors.h` and `caches.h`.
//
// A query's blocks begin at the same slots whatever it is computed with, and what it does not see adds zero: so a token
// gets the same bits alone, in a prompt's piece, and in a batch, as long as all values are finite.

constexpr int64_t SLOTS = 64;  // slots of a block
constexpr int64_t LINE = 64;  // bytes of a cache line

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

#if ARRIERO_SET == 2
// Sixteen vectors' first lanes as columns: first each four by four, then these among one another.
inline void transpose(Floats* rows, int64_t count, float* columns) {
    for (Floats* four = rows; four < rows + LANES; four += 4) {
        const auto low = [](Floats a, Floats b) {
            return __builtin_shufflevector(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29);
        };
        const auto high = [](Floats a, Floats b) {
            return __builtin_shufflevector(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
        };
        const auto firsts = [](Floats a, Floats b) {
            return __builtin_shufflevector(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
        };
        const auto seconds = [](Floats a, Floats b) {
            return __builtin_shufflevector(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
        };
        const Floats a = low(four[0], four[1]), b = high(four[0], four[1]), c = low(four[2], four[3]),
                     d = high(four[2], four[3]);
        four[0] = firsts(a, c), four[1] = seconds(a, c), four[2] = firsts(b, d), four[3] = seconds(b, d);
    }
    Floats turned[LANES];
    for (int i = 0; i < 4; i++) {
        const auto front = [](Floats a, Floats b) {
            return __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
        };
        const auto back = [](Floats a, Floats b) {
            return __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
        };
        const auto even = [](Floats a, Floats b) {
            return __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
        };
        const auto odd = [](Floats a, Floats b) {
            return __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
        };
        const Floats a = front(rows[i], rows[4 + i]), b = back(rows[i], rows[4 + i]),
                     c = front(rows[8 + i], rows[12 + i]), d = back(rows[8 + i], rows[12 + i]);
        turned[i] = even(a, c), turned[4 + i] = odd(a, c), turned[8 + i] = even(b, d), turned[12 + i] = odd(b, d);
    }
    for (int64_t i = 0; i < count; i++) store(columns + i * SLOTS, turned[i]);
}
#else
// Eight rows of eight floats, which lie a number of floats apart, as columns.
inline void transpose_eight(const float* rows, int64_t apart, int64_t count, float* columns) {
    Wide turned[8];
    for (int half = 0; half < 2; half++) {
        const auto row = [&](int i) { return load<Wide>(rows + (4 * half + i) * apart); };
        const Wide lows[2] = {low(row(0), row(1)), low(row(2), row(3))};
        const Wide highs[2] = {high(row(0), row(1)), high(row(2), row(3))};
        turned[4 * half] = first_pairs(lows[0], lows[1]), turned[4 * half + 1] = last_pairs(lows[0], lows[1]);
        turned[4 * half + 2] = first_pairs(highs[0], highs[1]), turned[4 * half + 3] = last_pairs(highs[0], highs[1]);
    }
    Wide made[8];
    for (int i = 0; i < 4; i++) {
        made[i] = __builtin_shufflevector(turned[i], turned[4 + i], 0, 1, 2, 3, 8, 9, 10, 11);
        made[4 + i] = __builtin_shufflevector(turned[i], turned[4 + i], 4, 5, 6, 7, 12, 13, 14, 15);
    }
    for (int64_t i = 0; i < count; i++) store(columns + i * SLOTS, made[i]);
}

// Sixteen vectors' first lanes as columns.
inline void transpose(const Floats* rows, int64_t count, float* columns) {
    const float* from = reinterpret_cast<const float*>(rows);
    for (int64_t row = 0; row < LANES; row += WIDTH)
        for (int64_t lane = 0; lane < count; lane += WIDTH)
            transpose_eight(from + row * LANES + lane, LANES, std::min(WIDTH, count - lane),
                            columns + lane * SLOTS + row);
}
#endif

// A block's keys [slots, D] as columns, [D, SLOTS]; slots beyond `count` are zero. The block's values and the next
// block's keys, which are read next, are asked for on the way: a processor would see no stream in rows this far apart.
template <Cached CACHE>
inline void columns_of_keys(const Attention& call, int64_t place, int64_t count, float* columns) {
    const int64_t size = call.head_dim, slot_size = call.slot_size(), padded = divided_up(size, GROUP) * GROUP;
    const int64_t each = slot_size * LANES / size;  // bytes of sixteen dims, nearly
    for (int64_t first = 0; first < SLOTS; first += LANES)
        for (int64_t d = 0; d < size; d += LANES) {
            const int64_t width = std::min(LANES, size - d), on = d / LANES * each;
            Floats rows[LANES];
            for (int64_t i = 0; i < LANES; i++) {
                const int64_t at = place + (first + i) * slot_size;
                if (d == 0 || on / LINE != (on - each) / LINE) {
                    __builtin_prefetch(call.value_cache + at + on);
                    __builtin_prefetch(call.key_cache + at + on + SLOTS * slot_size);
                }
                rows[i] = first + i >= count ? Floats{}
                          : width == LANES   ? load_cached<CACHE>(call.key_cache + at, d, LANES, padded)
                                             : load_cached<CACHE>(call.key_cache + at, d, width, padded);
            }
            transpose(rows, width, columns + d * SLOTS + first);
        }
}

// Rows and floats beside one another whose sums fit the registers.
constexpr int MANY = ARRIERO_SET ? 6 : 2, SOME = ARRIERO_SET ? 3 : 2;
constexpr int64_t FOR_MANY = ARRIERO_SET == 2 ? 64 : 16, FOR_SOME = ARRIERO_SET == 2 ? 64 : ARRIERO_SET ? 32 : 16;

// COUNT rows of A [., K] times WIDTH vectors of B [K, .], onto what `kept` leaves of C, or as C.
template <int COUNT, int WIDTH>
inline void tile(const float* a, int64_t a_row, const float* b, int64_t b_row, int64_t inputs, float* c, int64_t c_row,
                 const float* kept) {
    Part sum[COUNT][WIDTH] = {};
    if (kept)
        for (int row = 0; row < COUNT; row++)
            for (int i = 0; i < WIDTH; i++) sum[row][i] = load<Part>(c + row * c_row + PART_LANES * i) * kept[row];
    for (int64_t k = 0; k < inputs; k++) {
        Part of_b[WIDTH];
        for (int i = 0; i < WIDTH; i++) of_b[i] = load<Part>(b + k * b_row + PART_LANES * i);
        for (int row = 0; row < COUNT; row++)
            for (int i = 0; i < WIDTH; i++) sum[row][i] += of_b[i] * a[row * a_row + k];
    }
    for (int row = 0; row < COUNT; row++)
        for (int i = 0; i < WIDTH; i++) store(c + row * c_row + PART_LANES * i, sum[row][i]);
}

// All rows times some floats beside one another of B, `MOST` rows at once.
template <int MOST, int64_t FLOATS>
inline void strip(int64_t rows, const float* a, int64_t a_row, const float* b, int64_t b_row, int64_t inputs, float* c,
                  int64_t c_row, const float* kept) {
    const auto some = [&](auto count, int64_t row) {
        tile<decltype(count)::value, FLOATS / PART_LANES>(a + row * a_row, a_row, b, b_row, inputs, c + row * c_row,
                                                          c_row, kept ? kept + row : nullptr);
    };
    int64_t row = 0;
    for (; row + MOST <= rows; row += MOST) some(std::integral_constant<int, MOST>(), row);
    for (; MOST > SOME && row + SOME <= rows; row += SOME) some(std::integral_constant<int, SOME>(), row);
    for (; row < rows; row++) some(std::integral_constant<int, 1>(), row);
}

// A [rows, K] times B [K, width], width a multiple of 16.
inline void multiply_floats(int64_t rows, const float* a, int64_t a_row, const float* b, int64_t b_row, int64_t inputs,
                            int64_t width, float* c, int64_t c_row, const float* kept) {
    int64_t at = 0;
    for (; rows >= MANY && at + FOR_MANY <= width; at += FOR_MANY)
        strip<MANY, FOR_MANY>(rows, a, a_row, b + at, b_row, inputs, c + at, c_row, kept);
    for (; at + FOR_SOME <= width; at += FOR_SOME)
        strip<SOME, FOR_SOME>(rows, a, a_row, b + at, b_row, inputs, c + at, c_row, kept);
    for (; at < width; at += LANES)
        strip<SOME, LANES>(rows, a, a_row, b + at, b_row, inputs, c + at, c_row, kept);
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

// A block's values [slots, D] in float32, [slots, padded].
template <Cached CACHE>
inline void widen_values(const Attention& call, int64_t place, int64_t count, int64_t width, float* widened) {
    const int64_t size = call.head_dim, padded = divided_up(size, GROUP) * GROUP;
    for (int64_t slot = 0; slot < count; slot++, place += call.slot_size())
        for (int64_t d = 0; d < width; d += LANES) {
            const int64_t some = std::min(LANES, size - d);
            const Floats values = some == LANES ? load_cached<CACHE>(call.value_cache + place, d, LANES, padded)
                                                : load_cached<CACHE>(call.value_cache + place, d, some, padded);
            store(widened + slot * width + d, values);
        }
}

// The queries of some tokens that share a key head, from `first` on.
template <Cached CACHE>
inline void attend_over(const Attention& call, int64_t row, int64_t head, int64_t first, int64_t count,
                        AttentionSpace& space) {
    const int64_t size = call.head_dim, padded = divided_up(size, LANES) * LANES, each = call.heads / call.kv_heads;
    const int64_t rows = count * each, slot = call.slot(row), filled = slot + first + count;
    const int64_t start = (row * call.kv_heads + head) * call.capacity * call.slot_size();
    const float* queries = call.queries + ((row * call.kv_heads + head) * call.length + first) * each * size;
    float* const columns = space.columns.take<float>(size * SLOTS);
    float* const widened = space.values.take<float>(SLOTS * padded);
    float* const scores = space.scores.take<float>(rows * SLOTS);
    float* const sums = space.sums.take<float>(rows * padded);
    float* const largest = space.rows.take<float>(3 * rows);
    float *const total = largest + rows, *const kept = total + rows;
    std::fill(sums, sums + rows * padded, 0.0f);
    std::fill(largest, largest + rows, LOWEST);
    std::fill(total, total + rows, 0.0f);
    for (int64_t block = 0; block < filled; block += SLOTS) {
        const int64_t slots = std::min(SLOTS, filled - block), place = start + block * call.slot_size();
        columns_of_keys<CACHE>(call, place, slots, columns);
        multiply_floats(rows, queries, size, columns, SLOTS, size, SLOTS, scores, SLOTS, nullptr);
        for (int64_t query = 0; query < rows; query++)
            kept[query] =
                weigh(scores + query * SLOTS, slot + first + query / each + 1 - block, largest[query], total[query]);
        const float* values = reinterpret_cast<const float*>(call.value_cache + place);
        if (CACHE != Cached::float32 || size != padded) {
            widen_values<CACHE>(call, place, slots, padded, widened);
            values = widened;
        }
        multiply_floats(rows, scores, SLOTS, values, padded, slots, padded, sums, padded, kept);
    }
    for (int64_t query = 0; query < rows; query++) {
        const int64_t token = row * call.length + first + query / each;
        float* to = call.output + (token * call.heads + head * each + query % each) * size;
        for (int64_t d = 0; d < size; d++) {
            to[d] = sums[query * padded + d] / total[query];
            if (call.value_scale) to[d] *= call.value_scale[head * size + d];
        }
    }
}

inline void attend(const Attention& call, int64_t row, int64_t head, int64_t first, int64_t count,
                   AttentionSpace& space) {
    switch (call.cache) {
        case Cached::float32: return attend_over<Cached::float32>(call, row, head, first, count, space);
        case Cached::float16: return attend_over<Cached::float16>(call, row, head, first, count, space);
        case Cached::groups8: return attend_over<Cached::groups8>(call, row, head, first, count, space);
        case Cached::groups4: return attend_over<Cached::groups4>(call, row, head, first, count, space);
        case Cached::int8: return attend_over<Cached::int8>(call, row, head, first, count, space);
        case Cached::e4m3: return attend_over<Cached::e4m3>(call, row, head, first, count, space);
    }
}
