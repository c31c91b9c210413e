// Rows of a matrix as its columns, in registers.
//
// Included once for each instruction set, within its own namespace, behind `plain_products.h`.

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

#if ARRIERO_SET == 2
// Sixteen rows of 16 values of fewer bits are turned before they are widened: as many shuffles, of half as much or less.
// A vector has values of a row, and behind them those of the row eight further on. Each stage puts together what two
// vectors hold, value by value, pair by pair and so on: the first halves of each 16 bytes in front, the last behind.
#define ARRIERO_STAGE(bits)                                                        \
    inline void stage_##bits(__m256i (&eight)[8]) {                                \
        __m256i made[8];                                                           \
        for (int i = 0; i < 4; i++) {                                              \
            made[i] = _mm256_unpacklo_epi##bits(eight[2 * i], eight[2 * i + 1]);   \
            made[i + 4] = _mm256_unpackhi_epi##bits(eight[2 * i], eight[2 * i + 1]); \
        }                                                                          \
        for (int i = 0; i < 8; i++) eight[i] = made[i];                            \
    }
ARRIERO_STAGE(8)
ARRIERO_STAGE(16)
ARRIERO_STAGE(32)
ARRIERO_STAGE(64)
#undef ARRIERO_STAGE

// The bits of a number up to 7 from back to front: where what the stages number so belongs.
constexpr int REVERSED[8] = {0, 4, 2, 6, 1, 5, 3, 7};

inline void load_pairs(const uint8_t* from, int64_t row, __m256i (&eight)[8]) {
    for (int64_t i = 0; i < 8; i++)
        eight[i] = _mm256_inserti128_si256(_mm256_castsi128_si256(load<__m128i>(from + i * row)),
                                           load<__m128i>(from + (i + 8) * row), 1);
}

// Sixteen values of float16 in each of 16 rows: a vector for each of the 16 columns.
inline void turned_halves(const uint8_t* from, int64_t row, Wide* to) {
    for (int64_t half = 0; half < 2; half++) {
        __m256i eight[8];
        load_pairs(from + 16 * half, row, eight);
        stage_16(eight), stage_32(eight), stage_64(eight);
        for (int i = 0; i < 8; i++) to[8 * half + REVERSED[i]] = reinterpret_cast<Wide>(_mm512_cvtph_ps(eight[i]));
    }
}

// The same of signed bytes, each vector as `widened` makes it of 32 bits.
template <typename Widened>
inline void turned_bytes(const uint8_t* from, int64_t row, Wide* to, const Widened& widened) {
    const auto put = [&](__m128i bytes, int64_t column) {
        to[column] = widened(reinterpret_cast<WideInts>(_mm512_cvtepi8_epi32(bytes)));
    };
    __m256i eight[8];
    load_pairs(from, row, eight);
    stage_8(eight), stage_16(eight), stage_32(eight);
    for (int i = 0; i < 8; i++) {
        const __m256i two = _mm256_permute4x64_epi64(eight[i], 0xD8);
        put(_mm256_castsi256_si128(two), 2 * REVERSED[i]);
        put(_mm256_extracti128_si256(two, 1), 2 * REVERSED[i] + 1);
    }
}

// The bfloat16 at one place of each of 16 rows.
inline Wide column_of(const uint8_t* from, int64_t row) {
    uint16_t column[16];
    for (int64_t i = 0; i < 16; i++) std::memcpy(&column[i], from + i * row, sizeof column[i]);
    return widen(column);
}
#endif
