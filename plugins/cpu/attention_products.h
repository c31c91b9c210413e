// Products of attention: queries with a block of keys, and weights with the block's values, from caches as they lie.
//
// Included once for each instruction set, within its own namespace, behind `caches.h` and `transpose.h`.
//
// A score is one sum over a head's dims, in their order, and a weighed value one over slots. Few rows of queries meet
// keys that are turned in registers, and values that are widened there; for many rows a block's keys and values are made
// ready in memory once. Both add up the same products in the same order, so they agree bit by bit.
//
// While a block is computed, the next one is asked for, keys beside keys and values beside values: a processor that
// waits for its own reading in front of each block would compute half the time.

constexpr int64_t SLOTS = 64;  // slots of a block
constexpr int SCORED = ARRIERO_SET == 2 ? 6 : 3;  // rows that meet turned keys at once

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

    static Wide as_wide(WideInts values) { return __builtin_convertvector(values, Wide); }

    // Some dims of some slots, turned: a vector for each dim. What is beyond the block's slots is zero.
    void turned(int64_t first, int64_t d, Wide* to) const {
        ask(first, d);
        const uint8_t* at = keys + first * slot_size;
        if (first + WIDTH <= slots && d + WIDTH <= size) {
#if ARRIERO_SET == 2
            if constexpr (CACHE == Cached::float16) return turned_halves(at + 2 * d, slot_size, to);
            if constexpr (CACHE == Cached::int8) return turned_bytes(at + d, slot_size, to, as_wide);
            if constexpr (CACHE == Cached::groups8) {
                const Wide scales = column_of(at + padded + d / GROUP * 2, slot_size);
                return turned_bytes(at + d, slot_size, to, [&](WideInts values) { return as_wide(values) * scales; });
            }
            if constexpr (CACHE == Cached::groups4) {
                const uint8_t* const of_group = at + padded / 2 + d / GROUP * 4;
                const Wide scales = column_of(of_group, slot_size), bases = column_of(of_group + 2, slot_size);
                const int shift = d % GROUP < LANES ? 0 : 4;
                return turned_bytes(at + d / GROUP * LANES, slot_size, to,
                                    [&](WideInts both) { return as_wide(both >> shift & 15) * scales + bases; });
            }
#endif
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
