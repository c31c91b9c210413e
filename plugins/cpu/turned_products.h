// Products of many rows of float32 with a matrix of floats as checkpoints hold it: the sums of `plain_products.h`.
//
// Included once for each instruction set, within its own namespace, behind `plain_products.h`.
//
// A stretch of some outputs' weights is widened and turned on its way into the cache, and the rows have been turned
// before: a vector holds outputs, and what was a lane is a run of steps. A run's sum is a lane's sum, and runs are added
// up as lanes are folded, so that these products and those of single rows agree bit by bit.

#if defined(__aarch64__)
constexpr int64_t TALL = 6;
#else
constexpr int64_t TALL = ARRIERO_SET == 2 ? 12 : ARRIERO_SET ? 6 : 3;  // rows of a tile whose sums fit the registers
#endif
constexpr int64_t COLUMNS = 2 * WIDTH;  // outputs of a tile
constexpr int64_t RUNS[4] = {0, 2, 1, 3};  // each four lanes in the order in which they are folded

// Weights from one run to the next of so many steps: a line more than they are, since the cache holds few lines that lie
// a power of two apart.
constexpr int64_t run_size(int64_t steps) { return steps * COLUMNS + LANES; }

// A tile's rows [rows, K], stretch by stretch: for each run its steps' inputs, the rows' side by side.
inline void turn_rows(const float* x, int64_t rows, int64_t inputs, float* to) {
    for (int64_t k = 0; k < inputs; k += STRETCH, to += STRETCH * rows) {
        const int64_t count = std::min(STRETCH, inputs - k), steps = divided_up(count, WIDTH);
        for (int64_t run = 0; run < WIDTH; run++) {
            const int64_t lane = run / 4 * 4 + RUNS[run % 4];
            float* run_to = to + run * steps * rows;
            for (int64_t i = lane; i < steps * WIDTH; i += WIDTH)
                for (int64_t row = 0; row < rows; row++) *run_to++ = i < count ? x[row * inputs + k + i] : 0;
        }
    }
}

constexpr int64_t STEPS = 64 / sizeof(float) * 2 / WIDTH;  // that are turned together: a line of two-byte weights

// Weights of four outputs in one step, turned.
inline void turn_four(Wide a, Wide b, Wide c, Wide d, int64_t run, float* to) {
    const Wide lows[2] = {low(a, b), low(c, d)}, highs[2] = {high(a, b), high(c, d)};
    const Wide turned[4] = {first_pairs(lows[0], lows[1]), first_pairs(highs[0], highs[1]),
                            last_pairs(lows[0], lows[1]), last_pairs(highs[0], highs[1])};
    Four parts[4][WIDTH / 4];
    std::memcpy(parts, turned, sizeof parts);
#pragma GCC unroll 16
    for (int64_t i = 0; i < WIDTH; i++) store(to + i * run, parts[i % 4][i / 4]);
}

// Some steps' weights with four outputs at most.
template <typename Stored>
inline void turn_some(const uint8_t* weights, int64_t weight_row, int64_t outputs, int64_t inputs, int64_t run,
                      float* to) {
    constexpr int64_t SIZE = WIDTH * Stored::SIZE;
    if (outputs == 4 && inputs == STEPS * WIDTH) {
#pragma GCC unroll 4
        for (int64_t step = 0; step < STEPS; step++) {
            const uint8_t* const from = weights + step * SIZE;
            turn_four(Stored::widened(from), Stored::widened(from + weight_row), Stored::widened(from + 2 * weight_row),
                      Stored::widened(from + 3 * weight_row), run, to + step * COLUMNS);
        }
        return;
    }
    for (int64_t k = 0; k < inputs; k += WIDTH, weights += SIZE, to += COLUMNS) {
        Wide of[4] = {};
        for (int64_t i = 0; i < outputs; i++) {
            const uint8_t* const from = weights + i * weight_row;
            of[i] = k + WIDTH <= inputs ? Stored::widened(from) : widened_some<Stored>(from, inputs - k);
        }
        turn_four(of[0], of[1], of[2], of[3], run, to);
    }
}

// A stretch of some outputs' weights, tile by tile: for each run its steps' weights, COLUMNS outputs side by side. All
// outputs' weights of some steps are turned before the next steps', so that lines are filled while they are at hand.
template <typename Stored>
inline void turn_weights(const uint8_t* weights, int64_t weight_row, int64_t outputs, int64_t inputs, float* to) {
    const int64_t run = run_size(divided_up(inputs, WIDTH));
    for (int64_t tile = 0; tile < outputs; tile += COLUMNS, to += WIDTH * run)
        for (int64_t k = 0; k < inputs; k += STEPS * WIDTH)
            for (int64_t n = 0; n < std::min(COLUMNS, outputs - tile); n += 4)
                turn_some<Stored>(weights + (tile + n) * weight_row + k * Stored::SIZE, weight_row,
                                  std::min<int64_t>(4, outputs - tile - n), std::min(STEPS * WIDTH, inputs - k), run,
                                  to + k / WIDTH * COLUMNS + n);
}

// A stretch of inputs: onto the sums of those before it, or as the first of them.
struct Stretch {
    int64_t inputs;
    bool is_first;
};

// One run's sums.
template <typename Sums, int64_t ROWS>
inline void turned_run(const float* x, const float* weights, int64_t steps, Wide (*made)[2]) {
    Wide sums[ROWS][2];
    for (int64_t row = 0; row < ROWS; row++) sums[row][0] = sums[row][1] = Wide{};
    for (int64_t step = 0; step < steps; step++, x += ROWS, weights += COLUMNS) {
        const Wide sides[2] = {load<Wide>(weights), load<Wide>(weights + WIDTH)};
        for (int64_t row = 0; row < ROWS; row++)
            for (int side = 0; side < 2; side++)
                sums[row][side] = Sums::added(sums[row][side], Sums::everywhere(x[row]), sides[side]);
    }
    for (int64_t row = 0; row < ROWS; row++)
        for (int side = 0; side < 2; side++) store(&made[row][side], sums[row][side]);
}

// One tile of products.
template <typename Sums, int64_t ROWS>
__attribute__((noinline)) void turned_tile(const float* x, const float* weights, const Stretch& stretch,
                                           int64_t outputs, float* to, int64_t to_row) {
    const int64_t steps = divided_up(stretch.inputs, WIDTH);
    Wide of[4][ROWS][2], all[ROWS][2];
    for (int64_t quarter = 0; quarter < WIDTH / 4; quarter++) {
        for (Wide(*const run)[2] : {of[0], of[1], of[2], of[3]}) {
            turned_run<Sums, ROWS>(x, weights, steps, run);
            x += steps * ROWS, weights += run_size(steps);
        }
#pragma GCC unroll 2
        for (int64_t row = 0; row < ROWS; row++)
            for (int side = 0; side < 2; side++) {
                const Wide sum = (of[0][row][side] + of[1][row][side]) + (of[2][row][side] + of[3][row][side]);
                all[row][side] = quarter ? all[row][side] + sum : sum;
            }
    }
    for (int64_t row = 0; row < ROWS; row++, to += to_row) {
        float made[COLUMNS];
        std::memcpy(made, all[row], sizeof made);
        for (int64_t n = 0; n < outputs; n++) to[n] = stretch.is_first ? made[n] : to[n] + made[n];
    }
}

// One tile of so many rows, TALL at most.
template <typename Sums, int64_t ROWS = TALL>
inline void turned_tile_of(int64_t rows, const float* x, const float* weights, const Stretch& stretch, int64_t outputs,
                           float* to, int64_t to_row) {
    if (rows == ROWS) return turned_tile<Sums, ROWS>(x, weights, stretch, outputs, to, to_row);
    if constexpr (ROWS > 1) turned_tile_of<Sums, ROWS - 1>(rows, x, weights, stretch, outputs, to, to_row);
}

// Rows that have been turned times the outputs from `first` to `last`. `space` is for STRIP * (STRETCH + LANES) floats.
template <typename Stored>
inline void multiply_turned(const PlainMatrix& matrix, const PlainInput& x, int64_t first, int64_t last, float* to,
                            float* space) {
    const int64_t inputs = matrix.inputs, row = inputs * Stored::SIZE;
    for (; first < last; first += STRIP)
        for (int64_t k = 0; k < inputs; k += STRETCH) {
            const Stretch stretch{std::min(STRETCH, inputs - k), k == 0};
            const int64_t outputs = std::min(STRIP, last - first),
                          tile = WIDTH * run_size(divided_up(stretch.inputs, WIDTH));
            turn_weights<Stored>(matrix.weights + first * row + k * Stored::SIZE, row, outputs, stretch.inputs, space);
            for (int64_t i = x.first; i < x.last; i++) {
                const int64_t from = x.tile(i), rows = x.tile(i + 1) - from;
                const float* turned = x.turned + from * turned_inputs(inputs) + k * rows;
                float* const place = to + from * matrix.outputs + first;
                for (int64_t n = 0; n < outputs; n += COLUMNS)
                    turned_tile_of<typename Stored::Sums>(rows, turned, space + n / COLUMNS * tile, stretch,
                                                          std::min(COLUMNS, outputs - n), place + n, matrix.outputs);
            }
        }
}

template <typename Stored>
inline void multiply_stored(const PlainMatrix& matrix, const PlainInput& x, int64_t first, int64_t last, float* to,
                            float* space) {
    if (x.count > FEW) return multiply_turned<Stored>(matrix, x, first, last, to, space);
    multiply_few<Stored>(matrix, x.turned ? x.turned : x.rows, x.count, first, last, to);
}
