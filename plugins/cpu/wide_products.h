// Products of rows rounded to int8 with a panel of integers, in vectors that hold half of the panel's words of four inputs.
//
// Included once for each instruction set that has such vectors, or no product of bytes that narrower ones could hold,
// within its own namespace, behind `vectors.h`.

constexpr int AT_ONCE = ARRIERO_SET == 2 ? 6 : 2;      // rows whose sums fit the registers
constexpr int IN_ONE_PASS = ARRIERO_SET == 2 ? 8 : 2;  // rows faster in one pass, some sums in memory, than in two
constexpr int VALUE_SIZE = 1;  // bytes of a rounded input that meets weights of 8 bits
inline void spread(const int8_t* values, int64_t count, int8_t* to) { std::memcpy(to, values, count); }

// Adds to each lane the products of its four unsigned bytes with four signed ones, the same in every lane.
inline Ints dot(Ints sums, Bytes weights, const int8_t* four) {
    int32_t packed;
    std::memcpy(&packed, four, sizeof packed);
#if ARRIERO_SET == 2
    return reinterpret_cast<Ints>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sums),
                                                      reinterpret_cast<__m512i>(weights), _mm512_set1_epi32(packed)));
#else
    const Words lanes = reinterpret_cast<Words>(weights);
    for (int byte = 0; byte < 4; byte++)
        sums += reinterpret_cast<Ints>((lanes >> (8 * byte)) & 0xFFu) * int32_t{four[byte]};
    return sums;
#endif
}

// One panel for `COUNT` rows from `first` on: sums [COUNT][2].
template <int BITS, int COUNT>
inline void integer_panel(const Matrix& matrix, const Rows& rows, int64_t first, int64_t panel, Floats (*total)[2]) {
    constexpr int STEP = BITS == 4 ? 8 : 4;
    const int64_t blocks = matrix.blocks(), groups = matrix.groups, padded = matrix.padded(), size = matrix.block;
    const uint8_t* weights = matrix.weights + panel * matrix.panel_size();
    const int8_t* input = rows.values + first * padded;
    const float* scales = rows.scales + first * blocks;
    const int32_t* sums = rows.sums + first * blocks;
    int64_t block = 0;
    for (int64_t group = 0; group < groups; group++) {
        Floats partial[COUNT][2] = {};
        for (const int64_t end = block + blocks / groups; block < end; block++) {
            Ints sum[COUNT][2];
            for (int row = 0; row < COUNT; row++) sum[row][0] = sum[row][1] = all(sums[row * blocks + block]);
            for (int64_t step = 0; step < size; step += STEP, weights += 128, input += STEP) {
                __builtin_prefetch(weights + AHEAD, 0, NEAR);
                __builtin_prefetch(weights + AHEAD + 64, 0, NEAR);
                for (int side = 0; side < 2; side++) {
                    const auto bytes = load<Bytes>(weights + 64 * side);
                    if (BITS == 4) {
                        const Bytes low = bytes & uint8_t{15};
                        const Bytes high = reinterpret_cast<Bytes>(reinterpret_cast<Words>(bytes) >> 4) & uint8_t{15};
                        for (int row = 0; row < COUNT; row++)
                            sum[row][side] = dot(sum[row][side], low, input + row * padded);
                        for (int row = 0; row < COUNT; row++)
                            sum[row][side] = dot(sum[row][side], high, input + row * padded + 4);
                    } else {
                        for (int row = 0; row < COUNT; row++)
                            sum[row][side] = dot(sum[row][side], bytes, input + row * padded);
                    }
                }
            }
            for (int row = 0; row < COUNT; row++)
                for (int side = 0; side < 2; side++)
                    partial[row][side] += as_floats(sum[row][side]) * scales[row * blocks + block];
        }
        const int64_t at = (panel * groups + group) * PANEL;
        for (int side = 0; side < 2; side++) {
            const int64_t place = at + side * LANES;
            const Floats scale = matrix.has_wide_scales ? load<Floats>(static_cast<const float*>(matrix.scales) + place)
                                                        : widen(static_cast<const uint16_t*>(matrix.scales) + place);
            for (int row = 0; row < COUNT; row++) total[row][side] += partial[row][side] * scale;
        }
    }
}
