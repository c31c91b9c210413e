// Products of rows of float32 with a matrix of floats [K, N], an input's outputs side by side, as stacked experts lie.
//
// Included once for each instruction set, within its own namespace, behind `turned_products.h`.
//
// A vector holds outputs. An output is a sum over stretches of its inputs, and a stretch's sum one of an input after
// another, whatever stands beside it: so a batch's rows, a prompt's pieces and single tokens agree bit by bit.
//
// Few rows are bound by the memory, which is fastest where a thread reads on and on: a stretch's weights with all
// outputs, or with those that fill some pages, so that the stretches' sums wait for each other until all are there.

constexpr int INPUTS = 8;              // inputs whose weights meet few rows at once
constexpr int64_t BROAD = 4 * COLUMNS;  // and outputs

inline void store_lanes(float* to, Wide values, int64_t count) {
    if (count >= WIDTH) return store(to, values);
    if (count > 0) std::memcpy(to, &values, count * sizeof(float));
}

// Some inputs' products with their weights, for ACROSS vectors of outputs from `n` on, onto few rows' sums [rows, outputs].
template <typename Stored, int COUNT, int ACROSS>
inline void add_vectors_of(const uint8_t* weights, int64_t weight_row, int64_t outputs, const StackedInput& x, int64_t k,
                           bool is_first, float* sums, int64_t n) {
    const int64_t left = outputs - n;
    Wide of[COUNT][ACROSS];
    for (int i = 0; i < COUNT; i++) {
        const uint8_t* const from = weights + i * weight_row + n * Stored::SIZE;
        for (int64_t at = n * Stored::SIZE % LINE ? LINE : 0; at < ACROSS * WIDTH * Stored::SIZE; at += LINE)
            __builtin_prefetch(from + COUNT * weight_row + at, 0, NEAR);
        for (int part = 0; part < ACROSS; part++)
            of[i][part] = ACROSS > 1 || left >= WIDTH ? Stored::widened(from + part * WIDTH * Stored::SIZE)
                                                      : widened_some<Stored>(from, left);
    }
    for (int64_t row = 0; row < x.count; row++) {
        const float* const inputs = x.rows + row * x.stride + k;
        float* const place = sums + row * outputs + n;
        Wide sum[ACROSS] = {};
        if (!is_first)
            for (int part = 0; part < ACROSS; part++)
                sum[part] = ACROSS > 1 ? load<Wide>(place + part * WIDTH) : load_lanes(place, left);
        for (int i = 0; i < COUNT; i++)
            for (int part = 0; part < ACROSS; part++) sum[part] += (inputs[i] - Wide{}) * of[i][part];
        for (int part = 0; part < ACROSS; part++) store_lanes(place + part * WIDTH, sum[part], ACROSS > 1 ? WIDTH : left);
    }
}

// And for all outputs.
template <typename Stored, int COUNT>
inline void add_inputs(const uint8_t* weights, int64_t weight_row, int64_t outputs, const StackedInput& x, int64_t k,
                       bool is_first, float* sums) {
    constexpr int ACROSS = ARRIERO_SET == 2 ? 2 : 1;  // vectors of which as many inputs' weights fit the registers
    int64_t n = 0;
    for (; ACROSS > 1 && n + ACROSS * WIDTH <= outputs; n += ACROSS * WIDTH)
        add_vectors_of<Stored, COUNT, ACROSS>(weights, weight_row, outputs, x, k, is_first, sums, n);
    for (; n < outputs; n += WIDTH)
        add_vectors_of<Stored, COUNT, 1>(weights, weight_row, outputs, x, k, is_first, sums, n);
}

// Few rows' products with a stretch of their inputs, for the outputs from `first` to `last`: sums [rows, last - first].
template <typename Stored>
inline void add_stretch(const PlainMatrix& matrix, const StackedInput& x, int64_t stretch, int64_t first, int64_t last,
                        float* sums) {
    const int64_t start = stretch * DEEP, end = std::min(matrix.inputs, start + DEEP);
    const int64_t row_size = matrix.outputs * Stored::SIZE, outputs = last - first;
    const uint8_t* weights = matrix.weights + start * row_size + first * Stored::SIZE;
    int64_t k = start;
    for (; k + INPUTS <= end; k += INPUTS, weights += INPUTS * row_size)
        add_inputs<Stored, INPUTS>(weights, row_size, outputs, x, k, k == start, sums);
    for (; k < end; k++, weights += row_size)
        add_inputs<Stored, 1>(weights, row_size, outputs, x, k, k == start, sums);
}

inline void sum_stretch(const PlainMatrix& matrix, const StackedInput& x, int64_t stretch, int64_t first, int64_t last,
                        float* sums) {
    switch (matrix.type) {
        case Plain::float32: return add_stretch<PlainFloat32>(matrix, x, stretch, first, last, sums);
        case Plain::float16: return add_stretch<PlainFloat16>(matrix, x, stretch, first, last, sums);
        case Plain::bfloat16: return add_stretch<PlainBfloat16>(matrix, x, stretch, first, last, sums);
        default: return;  // no others lie so
    }
}

// A tile's products with some inputs, widened: for each COLUMNS outputs side by side.
template <int64_t ROWS>
__attribute__((noinline)) void stacked_tile(const StackedInput& x, int64_t k, int64_t count, const float* weights,
                                            int64_t outputs, float* to, int64_t to_row) {
    const float* const rows = x.rows + k;
    const int64_t stride = x.stride;
    Wide sums[ROWS][2];
    for (int64_t row = 0; row < ROWS; row++) sums[row][0] = sums[row][1] = Wide{};
    for (int64_t i = 0; i < count; i++, weights += COLUMNS) {
        const Wide sides[2] = {load<Wide>(weights), load<Wide>(weights + WIDTH)};
        for (int64_t row = 0; row < ROWS; row++)
            for (int side = 0; side < 2; side++) sums[row][side] += (rows[row * stride + i] - Wide{}) * sides[side];
    }
    for (int64_t row = 0; row < ROWS; row++)
        for (int side = 0; side < 2; side++) {
            float* const place = to + x.place(row) * to_row + side * WIDTH;
            const int64_t left = outputs - side * WIDTH;
            store_lanes(place, k ? load_lanes(place, left) + sums[row][side] : sums[row][side], left);
        }
}

// One tile of so many rows, TALL at most.
template <int64_t ROWS = TALL>
inline void stacked_tile_of(const StackedInput& x, int64_t k, int64_t count, const float* weights, int64_t outputs,
                            float* to, int64_t to_row) {
    if (x.count == ROWS) return stacked_tile<ROWS>(x, k, count, weights, outputs, to, to_row);
    if constexpr (ROWS > 1) stacked_tile_of<ROWS - 1>(x, k, count, weights, outputs, to, to_row);
}

// Some inputs' weights with some outputs in float32, COLUMNS by COLUMNS.
template <typename Stored>
inline void widen_block(const uint8_t* weights, int64_t weight_row, int64_t outputs, int64_t inputs, float* to) {
    for (int64_t k = 0; k < inputs; k++, weights += weight_row, to += COLUMNS)
        for (int64_t n = 0; n < outputs; n += WIDTH) {
            const uint8_t* const from = weights + n * Stored::SIZE;
            const int64_t left = outputs - n;
            store(to + n / COLUMNS * COLUMNS * inputs + n % COLUMNS,
                  left >= WIDTH ? Stored::widened(from) : widened_some<Stored>(from, left));
        }
}

template <typename Stored>
inline void multiply_stack(const PlainMatrix& matrix, const StackedInput& x, int64_t first, int64_t last, float* to,
                           float* space) {
    const int64_t inputs = matrix.inputs, to_row = matrix.outputs, row = to_row * Stored::SIZE;
    const int64_t tiles = divided_up(x.count, TALL);
    for (int64_t n = first; n < last; n += BROAD)
        for (int64_t k = 0; k < inputs; k += DEEP) {
            const int64_t count = std::min(DEEP, inputs - k), outputs = std::min(BROAD, last - n);
            widen_block<Stored>(matrix.weights + k * row + n * Stored::SIZE, row, outputs, count, space);
            for (int64_t tile = 0; tile < tiles; tile++) {
                const StackedInput some = x.part(x.count * tile / tiles, x.count * (tile + 1) / tiles);
                float* const place = x.places ? to + n : to + n + x.count * tile / tiles * to_row;
                for (int64_t i = 0; i < outputs; i += COLUMNS)
                    stacked_tile_of(some, k, count, space + i * count, outputs - i, place + i, to_row);
            }
        }
}

// Many rows times the outputs from `first` to `last`. `space` is for BLOCK_FLOATS floats.
inline void multiply_stacked(const PlainMatrix& matrix, const StackedInput& x, int64_t first, int64_t last, float* to,
                             float* space) {
    switch (matrix.type) {
        case Plain::float32: return multiply_stack<PlainFloat32>(matrix, x, first, last, to, space);
        case Plain::float16: return multiply_stack<PlainFloat16>(matrix, x, first, last, to, space);
        case Plain::bfloat16: return multiply_stack<PlainBfloat16>(matrix, x, first, last, to, space);
        default: return;  // no others lie so
    }
}
static_assert(DEEP * BROAD <= BLOCK_FLOATS, "what is on its way has its room");

// A row of gates and then as many ups, as SiLU(gate) * up.
inline void activate(const float* from, int64_t width, float* to) {
    for (int64_t i = 0; i < width; i += LANES) {
        const int64_t count = std::min(LANES, width - i);
        float gates[LANES] = {}, ups[LANES] = {};
        std::memcpy(gates, from + i, count * sizeof(float));
        std::memcpy(ups, from + width + i, count * sizeof(float));
        const Floats gate = load<Floats>(gates);
        store(gates, load<Floats>(ups) * gate / (all(1.0f) + exponential(-gate)));
        std::memcpy(to + i, gates, count * sizeof(float));
    }
}
