// Products of rows with a matrix in panels; before them rows are rounded, behind them gates are applied.
//
// Included once for each instruction set, within its own namespace, behind `vectors.h`.
//
// Whatever a row's company, it is computed alike: its sums of integers are exact, and its sums of floats go over the
// same blocks in the same order. So a batch's rows, a prompt's pieces and single tokens agree bit by bit.

constexpr int AHEAD = 4096;  // bytes of weights that are asked for in advance

#if ARRIERO_SET == 1 || ARRIERO_SET == 3 || defined(__ARM_FEATURE_DOTPROD)
#include "narrow_products.h"
#else
#include "wide_products.h"
#endif

// Puts each eight inputs in the order in which four bytes hold them: the low halves', then the high ones'.
inline Small evens_before_odds(Small values) {
    return __builtin_shufflevector(values, values, 0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
}

constexpr int64_t BLOCK_PARTS = BLOCK / PART_LANES;  // vectors of a block's inputs

// A block's inputs times a factor; those that are missing are 0.
inline void load_block(const float* x, int64_t count, float factor, Part* parts) {
    float values[BLOCK] = {};
    if (count < BLOCK) std::memcpy(values, x, count * sizeof(float)), x = values;
    for (int64_t i = 0; i < BLOCK_PARTS; i++) parts[i] = load<Part>(x + i * PART_LANES) * factor;
}

// A block's integers as bytes, which they fit.
inline void narrow_block(const PartInts* values, int8_t* to) {
#if ARRIERO_SET == 1
    const auto part = [values](int i) { return reinterpret_cast<__m256i>(values[i]); };
    const __m256i fronts = _mm256_packs_epi32(part(0), part(1)), backs = _mm256_packs_epi32(part(2), part(3));
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);  // packing goes by halves of a register
    store(to, _mm256_permutevar8x32_epi32(_mm256_packs_epi16(fronts, backs), order));
#elif ARRIERO_SET == 2
    for (int64_t i = 0; i < BLOCK_PARTS; i++) store(to + i * PART_LANES, narrow(values[i]));
#elif defined(__aarch64__)
    for (int64_t i = 0; i < BLOCK_PARTS; i += 2) {
        const auto four = [values](int64_t at) { return vmovn_s32(reinterpret_cast<int32x4_t>(values[at])); };
        vst1_s8(to + i * PART_LANES, vmovn_s16(vcombine_s16(four(i), four(i + 1))));
    }
#else
    for (int64_t i = 0; i < BLOCK; i++) to[i] = static_cast<int8_t>(values[i / PART_LANES][i % PART_LANES]);
#endif
}

// Rounds a row to int8: each block of its inputs by a scale of its own, or all of them by one that is given.
inline void quantise(const float* x, const Matrix& matrix, float factor, float fixed, const Rows& rows, int64_t row) {
    const int64_t blocks = matrix.blocks(), value_size = matrix.bits == 8 ? VALUE_SIZE : 1;
    int8_t* to = rows.values + row * matrix.padded() * value_size;
    for (int64_t block = 0; block < blocks; block++, to += matrix.block * value_size) {
        const int64_t start = block * matrix.block;
        Part parts[BLOCK_PARTS];
        load_block(x + start, std::min(matrix.block, matrix.inputs - start), factor, parts);
        Part nothing{}, largest{};
        for (const Part part : parts) {
            nothing += part * 0.0f;  // but of an infinity or a NaN, which stays one
            const Part magnitude = part < 0.0f ? -part : part;
            largest = magnitude > largest ? magnitude : largest;
        }
        float scale = fixed == 0 ? largest_of(largest) / 127 : fixed;
        const float divisor = scale < 1e-30f ? 1.0f : scale;
        scale += sum_of(nothing);
        PartInts sum{};
        PartInts values[BLOCK_PARTS];
        for (int64_t i = 0; i < BLOCK_PARTS; i++) {
            Part value = parts[i] / divisor;
            value = value < -128.0f ? part_of(-128.0f) : value;
            value = value > 127.0f ? part_of(127.0f) : value;
            value = value == value ? value : Part{};
            values[i] = __builtin_convertvector(to_whole(value), PartInts);
            sum += values[i];
        }
        int8_t rounded[BLOCK];
        narrow_block(values, rounded);
        if (matrix.bits == 8) {
            spread(rounded, matrix.block, to);
        } else {
            for (int64_t i = 0; i < BLOCK; i += LANES)
                store(rounded + i, evens_before_odds(load<Small>(rounded + i)));
            std::memcpy(to, rounded, matrix.block);
        }
        rows.scales[row * blocks + block] = scale;
        rows.sums[row * blocks + block] = -matrix.middle() * sum_of(sum);
    }
}

// One panel of a matrix of floats for `COUNT` rows of float32 from `first` on: sums [COUNT][2].
template <int BITS, int COUNT>
inline void float_panel(const Matrix& matrix, const Rows& rows, int64_t first, int64_t panel, Floats (*total)[2]) {
    const int64_t inputs = matrix.inputs;
    const uint8_t* weights = matrix.weights + panel * matrix.panel_size();
    const float* input = rows.floats + first * inputs;
    for (int64_t i = 0; i < inputs; i += 32 / BITS, weights += 128) {
        __builtin_prefetch(weights + AHEAD, 0, NEAR);
        __builtin_prefetch(weights + AHEAD + 64, 0, NEAR);
        const bool has_second = i + 1 < inputs;
        for (int side = 0; side < 2; side++) {
            if (BITS == 32) {
                const auto only = load<Floats>(weights + 64 * side);
                for (int row = 0; row < COUNT; row++) total[row][side] += only * input[row * inputs + i];
                continue;
            }
            const auto both = load<Words>(weights + 64 * side);
            const Floats even = bits_as_floats(both << 16), odd = bits_as_floats(both & 0xFFFF0000u);
            for (int row = 0; row < COUNT; row++) total[row][side] += even * input[row * inputs + i];
            if (has_second)
                for (int row = 0; row < COUNT; row++) total[row][side] += odd * input[row * inputs + i + 1];
        }
    }
}

inline void write(const Matrix& matrix, int64_t row, int64_t panel, const Floats* sums, const Target& target) {
    float* to = target.to + (target.places ? target.places[row] : row) * target.stride;
    constexpr int64_t PARTS = PANEL / PART_LANES;
    Part out[PARTS];
    for (int64_t i = 0; i < PARTS; i++) out[i] = load<Part>(reinterpret_cast<const float*>(sums) + i * PART_LANES);
    int64_t width = PANEL, outputs = matrix.outputs;
    if (target.is_gated) {
        for (int64_t i = 0; i < PARTS / 2; i++)
            out[i] = out[PARTS / 2 + i] * out[i] / (part_of(1.0f) + exponential(-out[i]));
        width /= 2, outputs /= 2;
    }
    const int64_t left = outputs - panel * width;
    std::memcpy(to + panel * width, out, (left < width ? left : width) * sizeof(float));
}

template <int COUNT>
inline void rows_of_panel(const Matrix& matrix, const Rows& rows, int64_t first, int64_t panel, const Target& target) {
    Floats sums[COUNT][2] = {};
    switch (matrix.bits) {
        case 4: integer_panel<4, COUNT>(matrix, rows, first, panel, sums); break;
        case 8: integer_panel<8, COUNT>(matrix, rows, first, panel, sums); break;
        case 16: float_panel<16, COUNT>(matrix, rows, first, panel, sums); break;
        default: float_panel<32, COUNT>(matrix, rows, first, panel, sums);
    }
    for (int row = 0; row < COUNT; row++) write(matrix, first + row, panel, sums[row], target);
}

// Up to `COUNT` rows in one pass over a panel.
template <int COUNT>
inline void some_rows(int64_t count, const Matrix& matrix, const Rows& rows, int64_t first, int64_t panel,
                      const Target& target) {
    if (count == COUNT) return rows_of_panel<COUNT>(matrix, rows, first, panel, target);
    if constexpr (COUNT > 1) some_rows<COUNT - 1>(count, matrix, rows, first, panel, target);
}

inline void multiply(const Matrix& matrix, const Rows& rows, int64_t first, int64_t last, int64_t panel,
                     const Target& target) {
    for (; last - first > IN_ONE_PASS; first += AT_ONCE) rows_of_panel<AT_ONCE>(matrix, rows, first, panel, target);
    some_rows<IN_ONE_PASS>(last - first, matrix, rows, first, panel, target);
}
