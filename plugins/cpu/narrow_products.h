// Products of rows rounded to int8 with a panel of integers, for sets whose vectors are narrower than a panel's words of
// four inputs: a vector for a part of the panel's outputs, and as many parts and rows at once as the registers hold.
//
// Included once for each such instruction set, within its own namespace, behind `vectors.h`.

#if ARRIERO_SET == 1
using Counts = __m256i;
inline Counts all_counts(int32_t value) { return _mm256_set1_epi32(value); }
inline Part as_part(Counts counts) { return reinterpret_cast<Part>(_mm256_cvtepi32_ps(counts)); }

// Four bytes of a row, or two numbers of 16 bits, in every lane.
inline __m256i everywhere(const int8_t* four) {
    int32_t packed;
    std::memcpy(&packed, four, sizeof packed);
    return _mm256_set1_epi32(packed);
}

// One block of inputs of 8 bits for some parts and rows. Products of bytes do not fit 16 bits in pairs, so that a row is
// numbers of 16 bits (`spread`), and even and odd bytes of the weights go apart.
template <int COUNT, int PARTS>
inline void add_block(std::integral_constant<int, 8>, const uint8_t* weights, const int8_t* input, int64_t row_size,
                      int64_t inputs, Counts (*sums)[PARTS]) {
    const __m256i low = _mm256_set1_epi16(0x00FF);
    for (int64_t step = 0; step < inputs; step += 4, weights += 128, input += 8) {
        __m256i evens[PARTS], odds[PARTS];
        for (int part = 0; part < PARTS; part++) {
            if (part % 2 == 0) __builtin_prefetch(weights + AHEAD + 32 * part, 0, NEAR);
            const auto bytes = load<__m256i>(weights + 32 * part);
            evens[part] = _mm256_and_si256(bytes, low), odds[part] = _mm256_srli_epi16(bytes, 8);
        }
        for (int row = 0; row < COUNT; row++) {
            const __m256i even = everywhere(input + row * row_size), odd = everywhere(input + row * row_size + 4);
            for (int part = 0; part < PARTS; part++) {
                const __m256i both = _mm256_add_epi32(_mm256_madd_epi16(evens[part], even),
                                                      _mm256_madd_epi16(odds[part], odd));
                sums[row][part] = _mm256_add_epi32(sums[row][part], both);
            }
        }
    }
}

// And of 4 bits: a block's sixteen products, of 15 * 128 at most, add up in 16 bits.
template <int COUNT, int PARTS>
inline void add_block(std::integral_constant<int, 4>, const uint8_t* weights, const int8_t* input, int64_t row_size,
                      int64_t inputs, Counts (*sums)[PARTS]) {
    static_assert(BLOCK / 2 * 15 * 128 <= 32767, "a block's sums fit 16 bits");
    const __m256i low = _mm256_set1_epi8(15);
    __m256i short_sums[COUNT][PARTS];
    for (int row = 0; row < COUNT; row++)
        for (int part = 0; part < PARTS; part++) short_sums[row][part] = _mm256_setzero_si256();
    for (int64_t step = 0; step < inputs; step += 8, weights += 128, input += 8) {
        __m256i firsts[PARTS], seconds[PARTS];
        for (int part = 0; part < PARTS; part++) {
            if (part % 2 == 0) __builtin_prefetch(weights + AHEAD + 32 * part, 0, NEAR);
            const auto bytes = load<__m256i>(weights + 32 * part);
            firsts[part] = _mm256_and_si256(bytes, low);
            seconds[part] = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), low);
        }
        for (int row = 0; row < COUNT; row++) {
            const __m256i first = everywhere(input + row * row_size), second = everywhere(input + row * row_size + 4);
            for (int part = 0; part < PARTS; part++) {
                const __m256i both = _mm256_add_epi16(_mm256_maddubs_epi16(firsts[part], first),
                                                      _mm256_maddubs_epi16(seconds[part], second));
                short_sums[row][part] = _mm256_add_epi16(short_sums[row][part], both);
            }
        }
    }
    const __m256i ones = _mm256_set1_epi16(1);
    for (int row = 0; row < COUNT; row++)
        for (int part = 0; part < PARTS; part++)
            sums[row][part] = _mm256_add_epi32(sums[row][part], _mm256_madd_epi16(short_sums[row][part], ones));
}

constexpr int VALUE_SIZE = 2;  // bytes of a rounded input that meets weights of 8 bits
constexpr bool TAKES_MIDDLE = true;

// Rounded inputs as numbers of 16 bits, of each four the first and third before the others.
inline void spread(const int8_t* values, int64_t count, int8_t* to) {
    const __m128i order = _mm_setr_epi8(0, 2, 1, 3, 4, 6, 5, 7, 8, 8, 8, 8, 8, 8, 8, 8);
    for (int64_t i = 0; i < count; i += 8, to += 16) {
        const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(values + i));
        store(to, _mm_cvtepi8_epi16(_mm_shuffle_epi8(eight, order)));
    }
}
#else
using Counts = int32x4_t;
inline Counts all_counts(int32_t value) { return vdupq_n_s32(value); }
inline Part as_part(Counts counts) { return reinterpret_cast<Part>(vcvtq_f32_s32(counts)); }

// One block of inputs of 8 bits for some parts and rows. The instruction takes signed bytes, so that the middle is off.
template <int COUNT, int PARTS>
inline void add_block(std::integral_constant<int, 8>, const uint8_t* weights, const int8_t* input, int64_t row_size,
                      int64_t inputs, Counts (*sums)[PARTS]) {
    for (int64_t step = 0; step < inputs; step += 8, weights += 256, input += 8) {
        int8x8_t values[COUNT];
        for (int row = 0; row < COUNT; row++) values[row] = vld1_s8(input + row * row_size);
        for (int part = 0; part < PARTS; part++) {
            if (part % 4 == 0) __builtin_prefetch(weights + AHEAD + 16 * part, 0, NEAR);
            if (part % 4 == 0) __builtin_prefetch(weights + AHEAD + 128 + 16 * part, 0, NEAR);
            const uint8x16_t turn = vdupq_n_u8(0x80);
            const int8x16_t first = vreinterpretq_s8_u8(veorq_u8(vld1q_u8(weights + 16 * part), turn));
            const int8x16_t second = vreinterpretq_s8_u8(veorq_u8(vld1q_u8(weights + 128 + 16 * part), turn));
            for (int row = 0; row < COUNT; row++) {
                sums[row][part] = vdotq_lane_s32(sums[row][part], first, values[row], 0);
                sums[row][part] = vdotq_lane_s32(sums[row][part], second, values[row], 1);
            }
        }
    }
}

// And of 4 bits.
template <int COUNT, int PARTS>
inline void add_block(std::integral_constant<int, 4>, const uint8_t* weights, const int8_t* input, int64_t row_size,
                      int64_t inputs, Counts (*sums)[PARTS]) {
    for (int64_t step = 0; step < inputs; step += 8, weights += 128, input += 8) {
        int8x8_t values[COUNT];
        for (int row = 0; row < COUNT; row++) values[row] = vld1_s8(input + row * row_size);
        for (int part = 0; part < PARTS; part++) {
            if (part % 4 == 0) __builtin_prefetch(weights + AHEAD + 16 * part, 0, NEAR);
            const uint8x16_t bytes = vld1q_u8(weights + 16 * part);
            const int8x16_t first = vreinterpretq_s8_u8(vandq_u8(bytes, vdupq_n_u8(15)));
            const int8x16_t second = vreinterpretq_s8_u8(vshrq_n_u8(bytes, 4));
            for (int row = 0; row < COUNT; row++) {
                sums[row][part] = vdotq_lane_s32(sums[row][part], first, values[row], 0);
                sums[row][part] = vdotq_lane_s32(sums[row][part], second, values[row], 1);
            }
        }
    }
}

constexpr int VALUE_SIZE = 1;
constexpr bool TAKES_MIDDLE = false;
inline void spread(const int8_t* values, int64_t count, int8_t* to) { std::memcpy(to, values, count); }
#endif

constexpr int AT_ONCE = 4;  // rows of which some parts' sums fit the registers
constexpr int IN_ONE_PASS = 4;

// A panel's scales of one group, `at` of all.
inline Part scales_at(const Matrix& matrix, int64_t at) {
    if (matrix.has_wide_scales) return load<Part>(static_cast<const float*>(matrix.scales) + at);
    using Stored = uint16_t __attribute__((vector_size(sizeof(Part) / 2)));
    using Wider = uint32_t __attribute__((vector_size(sizeof(Part))));
    const auto stored = load<Stored>(static_cast<const uint16_t*>(matrix.scales) + at);
    return reinterpret_cast<Part>(__builtin_convertvector(stored, Wider) << 16);
}

// A panel's parts for some rows: where it stands.
struct Walk {
    const uint8_t* weights;
    const int8_t* input;
    const float* scales;  // of rows, a block's after another's
    const int32_t* middles;
};

// One block's products, onto the group's or as its first.
template <int BITS, int COUNT, int PARTS, bool IS_FIRST>
inline void walk_block(Walk& at, int64_t row_size, int64_t blocks, int64_t size, Part (*group)[PARTS]) {
    Counts sums[COUNT][PARTS];
    for (int row = 0; row < COUNT; row++)
        for (int part = 0; part < PARTS; part++)
            sums[row][part] = all_counts(BITS == 8 && !TAKES_MIDDLE ? 0 : at.middles[row * blocks]);
    add_block<COUNT, PARTS>(std::integral_constant<int, BITS>(), at.weights, at.input, row_size, size, sums);
    for (int row = 0; row < COUNT; row++)
        for (int part = 0; part < PARTS; part++) {
            const Part product = as_part(sums[row][part]);
            group[row][part] = IS_FIRST ? product * at.scales[row * blocks]
                                        : group[row][part] + product * at.scales[row * blocks];
        }
    at.weights += PANEL * size * BITS / 8, at.input += size * (BITS == 8 ? VALUE_SIZE : 1);
    at.scales++, at.middles++;
}

// Some parts of a panel, from output `side` on, for `COUNT` rows from `first` on: totals [COUNT][PANEL].
template <int BITS, int COUNT, int PARTS, bool IS_WHOLE>
inline void panel_parts(const Matrix& matrix, const Rows& rows, int64_t first, int64_t panel, int64_t side,
                        Floats (*sums)[2]) {
    const int64_t blocks = matrix.blocks(), groups = matrix.groups, size = IS_WHOLE ? BLOCK : matrix.block;
    const int64_t row_size = matrix.padded() * (BITS == 8 ? VALUE_SIZE : 1), each = blocks / groups;
    Walk at{matrix.weights + panel * matrix.panel_size() + 4 * side, rows.values + first * row_size,
            rows.scales + first * blocks, rows.sums + first * blocks};
    Part total[COUNT][PARTS] = {};
    for (int64_t index = 0; index < groups; index++) {
        Part group[COUNT][PARTS];
        walk_block<BITS, COUNT, PARTS, true>(at, row_size, blocks, size, group);
        for (int64_t block = 1; block < each; block++)
            walk_block<BITS, COUNT, PARTS, false>(at, row_size, blocks, size, group);
        for (int part = 0; part < PARTS; part++) {
            const Part scale = scales_at(matrix, (panel * groups + index) * PANEL + side + part * PART_LANES);
            for (int row = 0; row < COUNT; row++) total[row][part] += group[row][part] * scale;
        }
    }
    for (int row = 0; row < COUNT; row++)
        for (int part = 0; part < PARTS; part++)
            store(reinterpret_cast<float*>(sums[row]) + side + part * PART_LANES, total[row][part]);
}

// One panel for `COUNT` rows from `first` on: sums [COUNT][2].
template <int BITS, int COUNT>
inline void integer_panel(const Matrix& matrix, const Rows& rows, int64_t first, int64_t panel, Floats (*sums)[2]) {
    constexpr int AT_HAND = PANEL / PART_LANES / (COUNT > 2 ? 2 : 1);
    for (int64_t side = 0; side < PANEL; side += AT_HAND * PART_LANES)
        if (matrix.block == BLOCK)
            panel_parts<BITS, COUNT, AT_HAND, true>(matrix, rows, first, panel, side, sums);
        else
            panel_parts<BITS, COUNT, AT_HAND, false>(matrix, rows, first, panel, side, sums);
}
