// Arguments of the kernels of all instruction sets: matrices in panels of 32 outputs, rows rounded to int8, attention.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

constexpr int64_t PANEL = 32;  // outputs of a panel
constexpr int64_t BLOCK = 32;  // inputs that a row rounds by one scale, at most
constexpr int64_t LINE = 64;  // bytes of a cache line

inline int64_t divided_up(int64_t count, int64_t by) { return (count + by - 1) / by; }

// A matrix [K, N] of which a panel of 32 outputs lies in one piece: for each four bytes of inputs 32 words, an output
// each. A word is four inputs of 8 bits, values about 128; eight of 4 bits, about 8, the first of each two in the low
// half of a byte; two bfloat16; or a float32. Missing outputs are zero, and so are inputs up to a multiple of 32.
//
// Scales are float32 or bfloat16, [N / 32, groups, 32]: each serves an output's inputs of one group.
struct Matrix {
    const uint8_t* weights;
    const void* scales;
    int64_t inputs, outputs;
    int bits;
    int64_t groups;
    int64_t block;  // inputs that a row rounds by one scale; a group has a whole number of blocks
    bool has_wide_scales;

    int64_t blocks() const { return divided_up(inputs, block); }
    int64_t padded() const { return divided_up(inputs, BLOCK) * BLOCK; }
    int64_t panels() const { return divided_up(outputs, PANEL); }
    int64_t panel_size() const { return PANEL * padded() * bits / 8; }
    int middle() const { return bits == 4 ? 8 : 128; }

    Matrix of_expert(int64_t index) const {
        Matrix one = *this;
        one.weights += index * panels() * panel_size();
        const int64_t scale_size = has_wide_scales ? 4 : 2;
        one.scales = static_cast<const uint8_t*>(scales) + index * panels() * groups * PANEL * scale_size;
        return one;
    }
};

// Types of floats that checkpoints hold matrices in. Of E4M3 two inputs may count as one, a pair.
enum class Plain { float32, float16, bfloat16, e4m3, e4m3_pairs };

// A matrix of floats as checkpoints hold it, [N, K], at any address.
struct PlainMatrix {
    const uint8_t* weights;
    int64_t inputs, outputs;
    Plain type;

    int64_t size() const { return inputs * outputs * (type == Plain::float32 ? 4 : type == Plain::e4m3 ? 1 : 2); }
};

constexpr int64_t STRIP = 64;  // outputs of such a matrix that many rows are multiplied with at once
constexpr int64_t STRETCH = 1024;  // inputs that are added up before others

// Rows of float32 [count, K] for such a matrix: one as it lies, few laid side by side, and many turned, in tiles of about
// as many rows, of which some are taken.
struct PlainInput {
    const float* rows;
    float* turned;  // or laid side by side; null of one
    int64_t count, tiles, first, last;

    // The row that a tile begins with.
    int64_t tile(int64_t index) const { return count * index / tiles; }
};

// Activations that are rounded to E4M3 by a static scale, or, where `fixed` is 0, a row by its own largest magnitude, or
// by the bound if that is smaller; a bound of 0 is none.
struct Fp8Scale {
    float fixed, bound;
};

// Rows of float32 for a matrix of floats that lies as [K, N], and the rows that their products are; without places each
// its own number.
struct StackedInput {
    const float* rows;
    int64_t stride, count;
    const int64_t* places;

    int64_t place(int64_t row) const { return places ? places[row] : row; }
    StackedInput part(int64_t first, int64_t last) const {
        return {rows + first * stride, stride, last - first, places ? places + first : nullptr};
    }
};

constexpr int64_t DEEP = 256;  // inputs of such a matrix that are added up before others
constexpr int64_t OUTPUTS_AT_ONCE = 512;  // that many rows meet in a thread's turn
constexpr int64_t OUTPUTS_READ = 4096;  // that one row meets in a thread's turn: of two bytes they fill two small pages
constexpr int64_t SUMS_NEAR = 8192;  // sums of few rows at once, which the second cache holds easily
constexpr int64_t BLOCK_FLOATS = 1 << 15;  // widened weights that are on their way at once

// Rows of activations: int8 [rows, K], or in 16 bits where an instruction set asks for it, with a scale a block and,
// about the matrix's middle, what its offset adds up to; or float32 [rows, K] for a matrix of floats.
struct Rows {
    int8_t* values;
    float* scales;
    int32_t* sums;
    const float* floats;
};

// Where products go: row r's to row `places[r]` (r itself without) of a float32 matrix [., stride].
struct Target {
    float* to;
    int64_t stride;
    const int64_t* places;
    bool is_gated;  // each panel is sixteen gates and as many ups, and what goes out is SiLU(gate) * up
};

// Forms in which caches hold keys and values: as floats; rounded by static scales, int8 or E4M3; or in groups of 32
// dims of a token, each rounded by its own scale, to integers of 8 bits, or of 4 above its own least value. A slot of
// groups is the values, in 4 bits the first sixteen of a group in the low halves of bytes, and then the groups' scales
// in bfloat16, in 4 bits each with its least value.
enum class Cached { float32, float16, int8, e4m3, groups8, groups4 };

constexpr int64_t GROUP = 32;

constexpr int64_t MOST_DIMS = 512;  // dims of a head at most
constexpr float LOWEST = -3e38f;  // below every score

// One call of grouped-query attention, the canonical op's.
struct Attention {
    const float *query, *key, *value;
    uint8_t *key_cache, *value_cache;
    const int32_t* past;
    const float *inv_freq, *key_scale, *value_scale;
    float *queries, *output;  // `queries`, made ready: [B, kv heads, S, heads of a kv head, D]
    Cached cache;
    int64_t batch, length, capacity, head_dim, heads, kv_heads, chunk;
    float scale, qk_norm_eps, temperature_scale, temperature_floor;

    int64_t slot(int64_t row) const { return chunk ? past[row] % chunk : past[row]; }
    int64_t padded_dims() const { return divided_up(head_dim, 16) * 16; }

    // Bytes of a head's key or value.
    int64_t slot_size() const {
        const int64_t groups = divided_up(head_dim, GROUP);
        switch (cache) {
            case Cached::float32: return 4 * head_dim;
            case Cached::float16: return 2 * head_dim;
            case Cached::groups8: return groups * (GROUP + 2);
            case Cached::groups4: return groups * (GROUP / 2 + 4);
            default: return head_dim;
        }
    }
};

constexpr int64_t SPAN = 1024;  // slots that a thread may attend to apart from others, a whole number of blocks

// Queries of some tokens that share a key head, of one row.
struct Tile {
    int64_t row, head, first, count;

    int64_t rows(const Attention& call) const { return count * (call.heads / call.kv_heads); }
    // Slots that the last of them sees.
    int64_t filled(const Attention& call) const { return call.slot(row) + first + count; }
    int64_t spans(const Attention& call) const { return divided_up(filled(call), SPAN); }
    // Floats of the sums over some slots, with each row's largest score and total.
    int64_t state_size(const Attention& call) const { return rows(call) * (call.padded_dims() + 2); }
};

// Memory that a thread's calls share, as large as the largest has needed. It begins with a line of the cache, so that
// no vector lies in two.
struct Buffer {
    std::vector<uint8_t> bytes;

    template <typename Value>
    Value* take(int64_t count) {
        bytes.resize(std::max<size_t>(bytes.size(), count * sizeof(Value) + LINE));
        return reinterpret_cast<Value*>((reinterpret_cast<uintptr_t>(bytes.data()) + LINE - 1) / LINE * LINE);
    }
};

struct AttentionSpace {
    Buffer columns, values, scores, rows, state;
};

// Kernels for pairs of E4M3, for an even number of inputs; null where there are none.
struct PairKernels {
    float (*round_fp8)(const float* x, int64_t inputs, float factor, const Fp8Scale&, float* to);
    void (*multiply_plain)(const PlainMatrix&, const PlainInput&, int64_t first, int64_t last, float* to, float* space);
};

// The kernels that an instruction set has.
struct Kernels {
    int64_t value_size;  // bytes of a rounded input that meets weights of 8 bits
    int64_t few, tall;  // rows of float32 that are not turned, at most; and in a tile of turned ones
    int64_t (*turned_inputs)(int64_t inputs);
    void (*quantise)(const float* x, const Matrix&, float factor, float fixed_scale, const Rows&, int64_t row);
    void (*multiply)(const Matrix&, const Rows&, int64_t first, int64_t last, int64_t panel, const Target&);
    void (*turn_rows)(const float* x, int64_t rows, int64_t inputs, float* to);
    void (*lay_rows)(const float* x, int64_t rows, int64_t inputs, float* to);
    void (*multiply_plain)(const PlainMatrix&, const PlainInput&, int64_t first, int64_t last, float* to, float* space);
    void (*multiply_stacked)(const PlainMatrix&, const StackedInput&, int64_t first, int64_t last, float* to,
                             float* space);
    void (*sum_stretch)(const PlainMatrix&, const StackedInput&, int64_t stretch, int64_t first, int64_t last,
                        float* sums);
    void (*activate)(const float* from, int64_t width, float* to);
    float (*round_fp8)(const float* x, int64_t inputs, float factor, const Fp8Scale&, float* to);
    PairKernels pairs;
    void (*enter)(const Attention&, int64_t row, int64_t step);
    void (*attend_span)(const Attention&, const Tile&, int64_t span, float* state, AttentionSpace&);
    void (*join_span)(const Attention&, const Tile&, int64_t span, float* state, float* later);
    void (*finish)(const Attention&, const Tile&, float* state);
};
