// Products of rows of float32 with a matrix of floats as checkpoints hold it, an output's inputs side by side.
//
// Included once for each instruction set, within its own namespace, behind `vectors.h`.
//
// An output is a sum over stretches of its inputs. Within one, each lane adds up every so manieth product, and the lanes
// are folded in one way. That order knows nothing of other rows and other outputs, so a batch's rows, a prompt's pieces
// and single tokens agree bit by bit. Few rows meet the weights as they lie, a vector for some inputs of an output; for
// many rows `turned_products.h` does the same sums over weights that it has turned.

#if ARRIERO_SET == 2
using Wide = Floats;
using WideWords = Words;
using WideHalves = Halves;
#else
using Wide = float __attribute__((vector_size(32)));
using WideWords = uint32_t __attribute__((vector_size(32)));
using WideHalves = uint16_t __attribute__((vector_size(16)));
#endif
using WideInts = int32_t __attribute__((vector_size(sizeof(Wide))));
using WideBytes = int8_t __attribute__((vector_size(sizeof(Wide) / 4)));
using Four = float __attribute__((vector_size(16)));

constexpr int64_t WIDTH = sizeof(Wide) / sizeof(float);
constexpr int HIGH = ARRIERO_SET == 2 ? 8 : ARRIERO_SET ? 4 : 2;  // rows of a tile whose sums fit the registers
constexpr int64_t FEW = 8;  // rows for which weights are widened on the way, once a tile of rows

// Outputs of a tile of so many rows.
constexpr int across(int rows) {
    if (ARRIERO_SET == 0) return 2;
    return rows < (ARRIERO_SET == 2 ? 7 : 3) ? 4 : 3;
}

constexpr int64_t AHEAD_OF_ONE = 16384;  // bytes that are asked for ahead of what one row meets: four small pages
constexpr int64_t AHEAD_OF_TILE = 4096;  // and behind the outputs of the next tile
constexpr int64_t MOST_STRETCHES = 16;   // of an output's inputs, whose sums wait for those of the outputs beside it

// Sums of products of floats.
struct OfFloats {
    static Wide everywhere(float value) { return value - Wide{}; }
    static Wide added(Wide sums, Wide x, Wide weights) { return sums + x * weights; }
    using Sums = OfFloats;
    static constexpr int64_t BYTES = 32;  // of weights that one row meets at once, so that sums wait for no others
};

struct PlainFloat32 : OfFloats {
    static constexpr int64_t SIZE = 4;
    static Wide widened(const void* from) { return load<Wide>(from); }
};

struct PlainFloat16 : OfFloats {
    static constexpr int64_t SIZE = 2;
    static Wide widened(const void* from) {
#if ARRIERO_SET == 2
        return widen_half(load<Halves>(from));
#elif ARRIERO_SET == 1
        return reinterpret_cast<Wide>(_mm256_cvtph_ps(load<__m128i>(from)));
#else
        return half_values<Wide>(__builtin_convertvector(load<WideHalves>(from), WideWords));
#endif
    }
};

struct PlainBfloat16 : OfFloats {
    static constexpr int64_t SIZE = 2;
    static Wide widened(const void* from) {
#if ARRIERO_SET == 2
        return widen(static_cast<const uint16_t*>(from));
#elif ARRIERO_SET == 1
        return reinterpret_cast<Wide>(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load<__m128i>(from)), 16));
#else
        return reinterpret_cast<Wide>(__builtin_convertvector(load<WideHalves>(from), WideWords) << 16);
#endif
    }
};

// The first lanes, of as many values as there are.
template <typename Stored>
inline Wide widened_some(const uint8_t* from, int64_t count) {
    uint8_t values[WIDTH * Stored::SIZE] = {};
    std::memcpy(values, from, count * Stored::SIZE);
    return Stored::widened(values);
}

// Of each four lanes of two vectors: the first two in turns, or the last two; or the first pairs, or the last ones.
#if ARRIERO_SET == 2
inline Wide low(Wide x, Wide y) {
    return __builtin_shufflevector(x, y, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29);
}
inline Wide high(Wide x, Wide y) {
    return __builtin_shufflevector(x, y, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
}
inline Wide first_pairs(Wide x, Wide y) {
    return __builtin_shufflevector(x, y, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
}
inline Wide last_pairs(Wide x, Wide y) {
    return __builtin_shufflevector(x, y, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
}
#else
inline Wide low(Wide x, Wide y) { return __builtin_shufflevector(x, y, 0, 8, 1, 9, 4, 12, 5, 13); }
inline Wide high(Wide x, Wide y) { return __builtin_shufflevector(x, y, 2, 10, 3, 11, 6, 14, 7, 15); }
inline Wide first_pairs(Wide x, Wide y) { return __builtin_shufflevector(x, y, 0, 1, 8, 9, 4, 5, 12, 13); }
inline Wide last_pairs(Wide x, Wide y) { return __builtin_shufflevector(x, y, 2, 3, 10, 11, 6, 7, 14, 15); }
#endif

// Four vectors, each folded to one lane: of each four lanes those two apart, then the two sums, and then the quarters.
inline Four folded_four(Wide a, Wide b, Wide c, Wide d) {
    const Wide pairs = low(a, b) + high(a, b), others = low(c, d) + high(c, d);
    const Wide quarters = first_pairs(pairs, others) + last_pairs(pairs, others);
    Four parts[WIDTH / 4];
    std::memcpy(parts, &quarters, sizeof parts);
    Four sum = parts[0];
    for (int64_t part = 1; part < WIDTH / 4; part++) sum += parts[part];
    return sum;
}

inline int64_t turned_inputs(int64_t inputs) { return divided_up(inputs, WIDTH) * WIDTH; }

// The first lanes of a vector, as many as there are; the others are 0.
inline Wide load_lanes(const float* from, int64_t count) {
    if (count >= WIDTH) return load<Wide>(from);
    Wide made{};
    if (count > 0) std::memcpy(&made, from, count * sizeof(float));
    return made;
}

// Weights of some outputs, a row for each, and how far behind each row's bytes lie those that are read next.
struct PlainRows {
    const uint8_t* weights;
    int64_t row, ahead;
};

// Keeps in a register what several products take: compilers load it for each, and a processor may load one a cycle.
inline void hold([[maybe_unused]] Wide& value) {
#if ARRIERO_SET == 2
    asm("" : "+v"(value));
#endif
}

// One step of a tile: as many inputs as a vector holds. A tile's rows lie side by side, a vector of each.
template <typename Stored, int ROWS, int ACROSS>
inline void plain_step(const PlainRows& of, int64_t k, const float* x, Wide (*sums)[ACROSS]) {
    Wide weights[ACROSS];
    for (int n = 0; n < ACROSS; n++) weights[n] = Stored::widened(of.weights + n * of.row + k * Stored::SIZE);
    for (int row = 0; row < ROWS; row++) {
        Wide of_x = load<Wide>(x + k * ROWS + row * WIDTH);
        hold(of_x);
        for (int n = 0; n < ACROSS; n++) sums[row][n] = Stored::added(sums[row][n], of_x, weights[n]);
    }
}

// The sums of a stretch, lane by lane.
template <typename Stored, int ROWS, int ACROSS>
inline void plain_sums(const PlainRows& of, const float* x, int64_t inputs, Wide (*sums)[ACROSS]) {
    constexpr int64_t LINE_INPUTS = 64 / Stored::SIZE;
    for (int row = 0; row < ROWS; row++)
        for (int n = 0; n < ACROSS; n++) sums[row][n] = Wide{};
    int64_t k = 0;
    for (; k + LINE_INPUTS <= inputs; k += LINE_INPUTS) {
        for (int n = 0; n < ACROSS; n++) __builtin_prefetch(of.weights + n * of.row + k * Stored::SIZE + of.ahead, 0, NEAR);
#pragma GCC unroll 4
        for (int64_t i = 0; i < LINE_INPUTS; i += WIDTH) plain_step<Stored, ROWS, ACROSS>(of, k + i, x, sums);
    }
    for (; k + WIDTH <= inputs; k += WIDTH) plain_step<Stored, ROWS, ACROSS>(of, k, x, sums);
    if (const int64_t left = inputs - k)
        for (int n = 0; n < ACROSS; n++) {
            const Wide some = widened_some<Stored>(of.weights + n * of.row + k * Stored::SIZE, left);
            for (int row = 0; row < ROWS; row++) {
                const auto* const from = reinterpret_cast<const uint8_t*>(x + k * ROWS + row * WIDTH);
                sums[row][n] = Stored::added(sums[row][n], widened_some<PlainFloat32>(from, left), some);
            }
        }
}

// One tile of products, stretch by stretch: memory is faster where rows of weights are read to their ends.
template <typename Stored, int ROWS, int ACROSS>
__attribute__((noinline)) void plain_tile(const PlainRows& of, const float* x, int64_t inputs, float* to, int64_t to_row) {
    for (int64_t k = 0; k < inputs; k += STRETCH) {
        Wide sums[ROWS][ACROSS];
        const PlainRows some{of.weights + k * Stored::SIZE, of.row, of.ahead};
        plain_sums<Stored, ROWS, ACROSS>(some, x + k * ROWS, std::min(STRETCH, inputs - k), sums);
        for (int row = 0; row < ROWS; row++) {
            const auto sum = [&](int n) { return sums[row][n < ACROSS ? n : 0]; };
            const Four folded = folded_four(sum(0), sum(1), sum(2), sum(3));
            float* const place = to + row * to_row;
            for (int n = 0; n < ACROSS; n++) place[n] = k ? place[n] + folded[n] : folded[n];
        }
    }
}

// A tile's rows with some outputs.
template <typename Stored, int ROWS>
inline void plain_tiles(const PlainRows& of, int64_t outputs, const float* x, int64_t inputs, float* to, int64_t to_row) {
    constexpr int ACROSS = across(ROWS);
    int64_t n = 0;
    for (; n + ACROSS <= outputs; n += ACROSS) {
        const PlainRows some{of.weights + n * of.row, of.row, of.row * ACROSS + AHEAD_OF_TILE};
        plain_tile<Stored, ROWS, ACROSS>(some, x, inputs, to + n, to_row);
    }
    for (; n < outputs; n++)
        plain_tile<Stored, ROWS, 1>({of.weights + n * of.row, of.row, of.row}, x, inputs, to + n, to_row);
}

// Rows that have been laid side by side with some outputs.
template <typename Stored, int ROWS = HIGH>
inline void plain_rows(int64_t rows, const PlainRows& of, int64_t outputs, const float* x, int64_t inputs, float* to,
                       int64_t to_row) {
    for (; rows >= ROWS; rows -= ROWS, x += ROWS * turned_inputs(inputs), to += ROWS * to_row)
        plain_tiles<Stored, ROWS>(of, outputs, x, inputs, to, to_row);
    if constexpr (ROWS > 1) plain_rows<Stored, ROWS - 1>(rows, of, outputs, x, inputs, to, to_row);
}

// One row times four outputs, whose weights are read one output's behind the other's: memory is fastest so.
template <typename Stored>
__attribute__((noinline)) void plain_four(const uint8_t* weights, int64_t inputs, const float* x, float* to) {
    constexpr int BESIDE = std::max<int64_t>(1, Stored::BYTES / (WIDTH * Stored::SIZE));
    const int64_t row = inputs * Stored::SIZE;
    Wide sums[MOST_STRETCHES][4];
    for (int64_t start = 0; start < inputs; start += MOST_STRETCHES * STRETCH) {
        const int64_t left = std::min(inputs - start, MOST_STRETCHES * STRETCH), stretches = divided_up(left, STRETCH);
        for (int n = 0; n < 4; n += BESIDE)
            for (int64_t i = 0; i < stretches; i++) {
                const int64_t k = start + i * STRETCH;
                const PlainRows of{weights + n * row + k * Stored::SIZE, row, AHEAD_OF_ONE};
                Wide made[1][BESIDE];
                plain_sums<Stored, 1, BESIDE>(of, x + k, std::min(STRETCH, inputs - k), made);
                for (int side = 0; side < BESIDE; side++) sums[i][n + side] = made[0][side];
            }
        Four all = start ? load<Four>(to) : Four{};
        for (int64_t i = 0; i < stretches; i++) {
            const Four sum = folded_four(sums[i][0], sums[i][1], sums[i][2], sums[i][3]);
            all = start + i ? all + sum : sum;
        }
        store(to, all);
    }
}

// Lays few rows [rows, K] side by side, tile by tile: of each step's inputs a vector of each row. Single ones stay.
inline void lay_rows(const float* x, int64_t rows, int64_t inputs, float* to) {
    for (int64_t tile; rows; rows -= tile, x += tile * inputs, to += tile * turned_inputs(inputs)) {
        tile = std::min<int64_t>(rows, HIGH);
        for (int64_t row = 0; row < tile; row++)
            for (int64_t k = 0; k < inputs; k += WIDTH)
                store(to + k * tile + row * WIDTH, load_lanes(x + row * inputs + k, inputs - k));
    }
}

// Few rows, laid side by side, times the outputs from `first` to `last`.
template <typename Stored>
inline void multiply_few(const PlainMatrix& matrix, const float* x, int64_t rows, int64_t first, int64_t last,
                         float* to) {
    const int64_t inputs = matrix.inputs, row = inputs * Stored::SIZE;
    if (rows == 1)
        for (; first + 4 <= last; first += 4) plain_four<Stored>(matrix.weights + first * row, inputs, x, to + first);
    const int64_t strip = across(1) * across(HIGH);
    for (; first < last; first += strip)
        plain_rows<Stored>(rows, {matrix.weights + first * row, row, 0}, std::min(strip, last - first), x, inputs,
                           to + first, matrix.outputs);
}
