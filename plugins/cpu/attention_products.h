// Products of attention: queries with a block of keys, and weights with the block's values, from caches as they lie.
//
// Included once for each instruction set, within its own namespace, behind `plain_products.h` and `caches.h`.
//
// A score is one sum over a head's dims, in their order, and a weighed value one over slots. Few rows of queries meet
// keys that are turned in registers, and values that are widened there; for many rows a block's keys and values are made
// ready in memory once. Both add up the same products in the same order, so they agree bit by bit.
//
// While a block is computed, the next one is asked for, keys beside keys and values beside values: a processor that
// waits for its own reading in front of each block would compute half the time.

constexpr int64_t SLOTS = 64;  // slots of a block
constexpr int SCORED = ARRIERO_SET == 2 ? 6 : 3;  // rows that meet turned keys at once

// As many vectors as each has lanes, as columns.
inline void transpose(Wide* rows) {
#if ARRIERO_SET == 2
    for (Wide* four = rows; four < rows + WIDTH; four += 4) {
        const Wide a = low(four[0], four[1]), b = high(four[0], four[1]), c = low(four[2], four[3]),
                   d = high(four[2], four[3]);
        four[0] = first_pairs(a, c), four[1] = last_pairs(a, c);
        four[2] = first_pairs(b, d), four[3] = last_pairs(b, d);
    }
    Wide turned[WIDTH];
    for (int i = 0; i < 4; i++) {
        const auto front = [](Wide a, Wide b) {
            return __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
        };
        const auto back = [](Wide a, Wide b) {
            return __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
        };
        const auto even = [](Wide a, Wide b) {
            return __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
        };
        const auto odd = [](Wide a, Wide b) {
            return __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
        };
        const Wide a = front(rows[i], rows[4 + i]), b = back(rows[i], rows[4 + i]),
                   c = front(rows[8 + i], rows[12 + i]), d = back(rows[8 + i], rows[12 + i]);
        turned[i] = even(a, c), turned[4 + i] = odd(a, c), turned[8 + i] = even(b, d), turned[12 + i] = odd(b, d);
    }
    for (int i = 0; i < WIDTH; i++) rows[i] = turned[i];
#elif ARRIERO_SET == 1
    Wide turned[WIDTH];
    for (int half = 0; half < 2; half++) {
        Wide *const four = rows + 4 * half, *const to = turned + 4 * half;
        const Wide a = low(four[0], four[1]), b = high(four[0], four[1]), c = low(four[2], four[3]),
                   d = high(four[2], four[3]);
        to[0] = first_pairs(a, c), to[1] = last_pairs(a, c), to[2] = first_pairs(b, d), to[3] = last_pairs(b, d);
    }
    for (int i = 0; i < 4; i++) {
        rows[i] = __builtin_shufflevector(turned[i], turned[4 + i], 0, 1, 2, 3, 8, 9, 10, 11);
        rows[4 + i] = __builtin_shufflevector(turned[i], turned[4 + i], 4, 5, 6, 7, 12, 13, 14, 15);
    }
#else
    Four from[WIDTH][2], to[WIDTH][2];
    std::memcpy(from, rows, sizeof from);
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++)
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++) {
            const Four a = from[4 * i][j], b = from[4 * i + 1][j], c = from[4 * i + 2][j], d = from[4 * i + 3][j];
            const Four lows[2] = {__builtin_shufflevector(a, b, 0, 4, 1, 5), __builtin_shufflevector(c, d, 0, 4, 1, 5)};
            const Four highs[2] = {__builtin_shufflevector(a, b, 2, 6, 3, 7),
                                   __builtin_shufflevector(c, d, 2, 6, 3, 7)};
            to[4 * j][i] = __builtin_shufflevector(lows[0], lows[1], 0, 1, 4, 5);
            to[4 * j + 1][i] = __builtin_shufflevector(lows[0], lows[1], 2, 3, 6, 7);
            to[4 * j + 2][i] = __builtin_shufflevector(highs[0], highs[1], 0, 1, 4, 5);
            to[4 * j + 3][i] = __builtin_shufflevector(highs[0], highs[1], 2, 3, 6, 7);
        }
    std::memcpy(rows, to, sizeof to);
#endif
}

// A block's slots in a cache: where they begin, and how many there are.
struct Block {
    int64_t place, slots;
};

// Keys on their way: a head's in a cache, and bytes from a slot to the next.
template <Cached CACHE>
struct Keys {
    const uint8_t* keys;
    int64_t slot_size, size, padded, slots;

    Keys(const Attention& call, const Block& block)
        : keys(call.key_cache + block.place), slot_size(call.slot_size()), size(call.head_dim),
          padded(divided_up(size, GROUP) * GROUP), slots(block.slots) {}

    // Asks for a part of the next block's keys, in the order in which they lie. A compiler takes a function that does
    // nothing else for one that does nothing.
    __attribute__((always_inline)) void ask(int64_t first, int64_t d) const {
        const int64_t part = divided_up(slot_size * WIDTH * WIDTH, size);
        const uint8_t* const from = keys + SLOTS * slot_size + (d / WIDTH * (SLOTS / WIDTH) + first / WIDTH) * part;
        for (int64_t at = 0; at < part; at += LINE) __builtin_prefetch(from + at, 0, NEAR);
    }

    // Some dims of some slots, turned: a vector for each dim. What is beyond the block's slots is zero.
    void turned(int64_t first, int64_t d, Wide* to) const {
        ask(first, d);
        const uint8_t* at = keys + first * slot_size;
        if (first + WIDTH <= slots && d + WIDTH <= size) {
#pragma GCC unroll 16
            for (int64_t i = 0; i < WIDTH; i++, at += slot_size) to[i] = load_cached<CACHE>(at, d, WIDTH, padded);
        } else {
            for (int64_t i = 0; i < WIDTH; i++, at += slot_size)
                to[i] = first + i < slots ? load_cached<CACHE>(at, d, std::min(WIDTH, size - d), padded) : Wide{};
        }
        transpose(to);
    }
};

// A block's keys [slots, D] as columns, [D, SLOTS].
template <Cached CACHE>
inline void columns_of_keys(const Attention& call, const Block& block, float* columns) {
    const Keys<CACHE> keys(call, block);
    for (int64_t first = 0; first < SLOTS; first += WIDTH)
        for (int64_t d = 0; d < keys.size; d += WIDTH) {
            Wide of[WIDTH];
            keys.turned(first, d, of);
            for (int64_t i = 0; i < std::min(WIDTH, keys.size - d); i++)
                store(columns + (d + i) * SLOTS + first, of[i]);
        }
}

// COUNT rows' products with some dims of some slots, onto their scores before.
template <int COUNT>
inline void add_dims(const Wide* keys, int64_t dims, const float* queries, int64_t size, bool is_first, float* scores) {
    Wide sum[COUNT];
    for (int row = 0; row < COUNT; row++) sum[row] = is_first ? Wide{} : load<Wide>(scores + row * SLOTS);
    const auto add = [&](int64_t i) {
        for (int row = 0; row < COUNT; row++) sum[row] += keys[i] * queries[row * size + i];
    };
    if (dims == WIDTH) {
#pragma GCC unroll 16
        for (int64_t i = 0; i < WIDTH; i++) add(i);
    } else {
        for (int64_t i = 0; i < dims; i++) add(i);
    }
    for (int row = 0; row < COUNT; row++) store(scores + row * SLOTS, sum[row]);
}

// All rows' products, `COUNT` rows at once.
template <int COUNT>
inline void add_rows(const Wide* keys, int64_t dims, const float* queries, int64_t size, bool is_first, int64_t rows,
                     float* scores) {
    for (; rows >= COUNT; rows -= COUNT, queries += COUNT * size, scores += COUNT * SLOTS)
        add_dims<COUNT>(keys, dims, queries, size, is_first, scores);
    if constexpr (COUNT > 1) add_rows<COUNT - 1>(keys, dims, queries, size, is_first, rows, scores);
}

// Few rows' scores [rows, SLOTS] with a block's keys. Those beyond its slots are not written.
template <Cached CACHE>
inline void score_few(const Attention& call, const Block& block, const float* queries, int64_t rows, float* scores) {
    const Keys<CACHE> keys(call, block);
    const int64_t size = keys.size;
    for (int64_t d = 0; d < size; d += WIDTH)
        for (int64_t first = 0; first < block.slots; first += WIDTH) {
            Wide of[WIDTH];
            keys.turned(first, d, of);
            const int64_t dims = std::min(WIDTH, size - d);
            add_rows<SCORED>(of, dims, queries + d, size, d == 0, rows, scores + first);
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

// A block's values [slots, D] in float32, [slots, width].
template <Cached CACHE>
inline void widen_values(const Attention& call, const Block& block, int64_t width, float* widened) {
    const int64_t size = call.head_dim, padded = divided_up(size, GROUP) * GROUP;
    for (int64_t slot = 0; slot < block.slots; slot++) {
        const uint8_t* const from = call.value_cache + block.place + slot * call.slot_size();
        for (int64_t d = 0; d < width; d += WIDTH)
            store(widened + slot * width + d, d + WIDTH <= size ? load_cached<CACHE>(from, d, WIDTH, padded)
                                              : d < size        ? load_cached<CACHE>(from, d, size - d, padded)
                                                                : Wide{});
    }
}

// COUNT rows' weights [., SLOTS] times ACROSS vectors of a block's values, onto what `kept` leaves of sums [., width].
template <Cached CACHE, int COUNT, int ACROSS>
inline void add_vectors(const Attention& call, const Block& block, int64_t d, const float* weights, const float* kept,
                        float* sums, int64_t width) {
    const int64_t slot_size = call.slot_size(), padded = divided_up(call.head_dim, GROUP) * GROUP;
    const uint8_t* from = call.value_cache + block.place;
    Wide sum[COUNT][ACROSS];
    for (int row = 0; row < COUNT; row++)
        for (int i = 0; i < ACROSS; i++) sum[row][i] = load<Wide>(sums + row * width + d + i * WIDTH) * kept[row];
    for (int64_t slot = 0; slot < block.slots; slot++, from += slot_size) {
        if (d == 0)
            for (int64_t at = 0; at < slot_size; at += LINE) __builtin_prefetch(from + SLOTS * slot_size + at, 0, NEAR);
        Wide values[ACROSS];
        for (int i = 0; i < ACROSS; i++) values[i] = load_cached<CACHE>(from, d + i * WIDTH, WIDTH, padded);
        for (int row = 0; row < COUNT; row++)
            for (int i = 0; i < ACROSS; i++) sum[row][i] += values[i] * weights[row * SLOTS + slot];
    }
    for (int row = 0; row < COUNT; row++)
        for (int i = 0; i < ACROSS; i++) store(sums + row * width + d + i * WIDTH, sum[row][i]);
}

// Few rows' weights [rows, SLOTS] times a block's values, for heads of a whole number of vectors.
template <Cached CACHE, int COUNT = 3>
inline void add_few(const Attention& call, const Block& block, int64_t rows, const float* weights, const float* kept,
                    float* sums, int64_t width) {
    constexpr int ACROSS = ARRIERO_SET == 2 ? 8 : ARRIERO_SET ? 4 : 2;
    for (; rows >= COUNT; rows -= COUNT, weights += COUNT * SLOTS, kept += COUNT, sums += COUNT * width) {
        int64_t d = 0;
        for (; d + ACROSS * WIDTH <= width; d += ACROSS * WIDTH)
            add_vectors<CACHE, COUNT, ACROSS>(call, block, d, weights, kept, sums, width);
        for (; d < width; d += WIDTH) add_vectors<CACHE, COUNT, 1>(call, block, d, weights, kept, sums, width);
    }
    if constexpr (COUNT > 1) add_few<CACHE, COUNT - 1>(call, block, rows, weights, kept, sums, width);
}
