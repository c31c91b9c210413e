// Products of rows with matrices, over ONNX Runtime's threads, and the memory that calls share.

#pragma once

#include <algorithm>
#include <vector>

#include "call.h"
#include "instruction_sets.h"

constexpr int64_t SLICE = 1 << 16;  // bytes of weights that are worth a thread's while
constexpr int64_t SLICES = 64;  // slices of one product at most
constexpr int64_t ROWS_BYTES = 192 * 1024;  // bytes of rows that a thread takes through its panels: they stay in L2
constexpr float LEAST_SCALE = 1e-30f;  // below it a row counts as one of zeros

// What a linear takes in, [..., K]: rows of K numbers.
struct LinearInput {
    const float* from;
    Shape shape;
    int64_t inputs;

    // Refuses what is no float32, or has no inputs.
    explicit LinearInput(const Tensor& x) : from(x.floats()), shape(x.shape) {
        if (shape.rank == 0 || shape.back() == 0)
            x.refuse("has the shape " + written(shape.dims, shape.rank) + ", whose last dimension must not be 0");
        inputs = shape.back();
    }

    // The shape of what the linear makes, [..., N].
    Shape with(int64_t outputs) const {
        Shape made = shape;
        made.back() = outputs;
        return made;
    }

    int64_t count() const {
        int64_t rows = 1;
        for (size_t i = 0; i + 1 < shape.rank; i++) rows = product({rows, shape[i]});
        return rows;
    }
};

struct RowBuffers {
    Buffer values, scales, sums;

    Rows take(int64_t count, const Matrix& matrix) {
        const int64_t value_size = matrix.bits == 8 ? kernels().value_size : 1;
        return {values.take<int8_t>(count * matrix.padded() * value_size), scales.take<float>(count * matrix.blocks()),
                sums.take<int32_t>(count * matrix.blocks()), nullptr};
    }
};

struct Buffers {
    RowBuffers inputs, activated;
    Buffer activations, outputs, queries, states, turned, strip, rows, gates, sums;
    AttentionSpace attention;
};

Buffers& buffers() {
    thread_local Buffers own;
    return own;
}

// Does `work(row)` for all rows below `count`, a few in one thread's turn.
template <typename Work>
void for_rows(const Call& call, int64_t count, const Work& work) {
    call.in_parallel(divided_up(count, 4), [&](int64_t some) {
        for (int64_t row = 4 * some; row < std::min(count, 4 * some + 4); row++) work(row);
    });
}

// A matrix, and the rows that it is multiplied with.
struct Product {
    Matrix matrix;
    int64_t first, last;

    int64_t cost() const { return matrix.panel_size() * (last - first + 3) / 4; }
};

// Multiplies all products at once, so that many small ones keep all threads busy.
void multiply(const Call& call, const std::vector<Product>& products, const Rows& rows, const Target& target) {
    if (products.empty()) return;
    const int64_t panels = products[0].matrix.panels(), total = panels * static_cast<int64_t>(products.size());
    int64_t cost = 0;
    for (const Product& product : products) cost += product.cost() * panels;
    const int64_t slices = std::clamp<int64_t>(cost / SLICE, 1, std::min(SLICES, total));
    call.in_parallel(slices, [&](int64_t slice) {
        const int64_t end = total * (slice + 1) / slices;
        for (int64_t unit = total * slice / slices; unit < end;) {
            const Product& product = products[unit / panels];
            const int64_t from = unit % panels, to = std::min(panels, from + end - unit);
            const int64_t row_size = product.matrix.inputs * (product.matrix.bits < 16 ? 1 : 4);
            const int64_t rows_at_once = std::max<int64_t>(6, ROWS_BYTES / row_size / 6 * 6);
            for (int64_t row = product.first; row < product.last; row += rows_at_once)
                for (int64_t panel = from; panel < to; panel++)
                    kernels().multiply(product.matrix, rows, row, std::min(product.last, row + rows_at_once), panel,
                                       target);
            unit += to - from;
        }
    });
}

constexpr int64_t LEAST_UNITS = 16;  // strips, or parts of them, that keep threads evenly busy
constexpr int64_t LEAST_ROWS = 32;   // rows that are worth turning a strip for

// A matrix of floats as it lies, and the rows that it is multiplied with.
struct PlainProduct {
    PlainMatrix matrix;
    int64_t first, last;
};

// Multiplies rows [., K] with matrices of one shape, all at once; each row has one, and what it makes is a row of `to`.
// Behind a part of a product, `finish(product, first row, last row, first output, last output)` is called.
template <typename Finish>
void multiply_plain(const Call& call, const std::vector<PlainProduct>& products, const float* rows, float* to,
                    const Finish& finish) {
    const PlainMatrix& shape = products[0].matrix;
    const int64_t inputs = shape.inputs, turned = kernels().turned_inputs(inputs);
    const auto multiply = shape.type == Plain::e4m3_pairs ? kernels().pairs.multiply_plain : kernels().multiply_plain;
    struct Part {
        int64_t product, first, last;  // outputs
        PlainInput x;
    };
    struct Turn {
        int64_t product, tile;
    };
    std::vector<PlainInput> x;
    std::vector<Turn> turns;
    std::vector<Part> parts;
    float* space = nullptr;
    for (const PlainProduct& of : products)
        if (of.last - of.first > 1 && !space)
            space = buffers().turned.take<float>(product({products.back().last, turned}));
    const int64_t strips = divided_up(shape.outputs, STRIP);
    for (const PlainProduct& of : products) {
        const auto index = static_cast<int64_t>(x.size());
        const int64_t count = of.last - of.first;
        x.push_back({rows + of.first * inputs, nullptr, count, 1, 0, 1});
        PlainInput& own = x.back();
        const bool is_many = count > kernels().few;
        if (is_many) own.tiles = divided_up(count, kernels().tall);
        if (count > 1) {
            own.turned = space + of.first * turned;
            for (int64_t tile = 0; tile < own.tiles; tile++) turns.push_back({index, tile});
        }
        const int64_t most = is_many ? divided_up(count, LEAST_ROWS) : 1;
        const int64_t beside = std::clamp<int64_t>(LEAST_UNITS / strips, 1, std::min(most, own.tiles));
        const int64_t cost = shape.size() / beside * ((count + 3) / 4);
        const int64_t slices = std::clamp<int64_t>(cost / SLICE, 1, std::min(SLICES, strips));
        for (int64_t part = 0; part < beside; part++)
            for (int64_t slice = 0; slice < slices; slice++) {
                PlainInput some = own;
                some.first = own.tiles * part / beside, some.last = own.tiles * (part + 1) / beside;
                const int64_t last = strips * (slice + 1) / slices * STRIP;
                parts.push_back({index, strips * slice / slices * STRIP, std::min(last, shape.outputs), some});
            }
    }
    const auto turn = [&](int64_t unit) {
        const PlainInput& own = x[turns[unit].product];
        const int64_t row = own.tile(turns[unit].tile), last = own.tile(turns[unit].tile + 1);
        const auto prepare = own.count > kernels().few ? kernels().turn_rows : kernels().lay_rows;
        prepare(own.rows + row * inputs, last - row, inputs, own.turned + row * turned);
    };
    if (!turns.empty()) call.in_parallel(static_cast<int64_t>(turns.size()), turn);
    call.in_parallel(static_cast<int64_t>(parts.size()), [&](int64_t unit) {
        const auto& [index, first, last, some] = parts[unit];
        const PlainProduct& of = products[index];
        float* const strip = some.count > kernels().few ? buffers().strip.take<float>(STRIP * (STRETCH + 16)) : nullptr;
        multiply(of.matrix, some, first, last, to + of.first * shape.outputs, strip);
        finish(of, of.first + some.tile(some.first), of.first + some.tile(some.last), first, last);
    });
}

// The type of a matrix of floats; any other is refused.
inline Plain plain_type_of(const Tensor& weight) {
    switch (weight.type) {
        case ort::Type::float32: return Plain::float32;
        case ort::Type::float16: return Plain::float16;
        case ort::Type::bfloat16: return Plain::bfloat16;
        default: weight.refuse("is of " + name_of(weight.type) + ", and must be of float32, float16 or bfloat16");
    }
}

// A matrix [N, K] of floats as the graph gives it; what does not fit is refused.
inline PlainMatrix plain_matrix_of(const Tensor& weight, int64_t inputs) {
    weight.expect({-1, inputs});
    return {static_cast<const uint8_t*>(weight.data), inputs, weight.shape[0], plain_type_of(weight)};
}

// A matrix's weights and scales as the graph gives them, and the attributes that say how they lie.
struct Stored {
    const Tensor &weight, &scale;
    int64_t bits, group;
};

// A matrix, or those of some experts (0 is one without a dimension of experts); what does not fit is refused.
inline Matrix matrix_of(const Stored& stored, int64_t inputs, int64_t outputs, int64_t experts = 0) {
    const auto& [weight, scale, bits, group] = stored;
    Matrix made{};
    made.inputs = inputs, made.outputs = outputs, made.bits = static_cast<int>(bits);
    made.block = BLOCK;
    if (group) {
        if (inputs % group)
            weight.refuse("has " + std::to_string(inputs) + " inputs, which groups of " + std::to_string(group) +
                          " do not divide");
        while (group % made.block) made.block /= 2;
    }
    made.groups = group ? inputs / group : 1;
    const int64_t bytes = product({PANEL * bits / 8, made.padded()});
    const auto expect = [experts](const Tensor& tensor, std::initializer_list<int64_t> one, auto... sizes) {
        if (experts) return tensor.expect({experts, sizes...});
        tensor.expect(one);
    };
    made.weights = weight.bytes();
    expect(weight, {made.panels(), bytes}, made.panels(), bytes);
    if (bits < 16) {
        if (!scale.is_given) scale.refuse("is not given, and weights of " + std::to_string(bits) + " bits need it");
        made.has_wide_scales = scale.type == ort::Type::float32;
        if (!made.has_wide_scales && scale.type != ort::Type::bfloat16)
            scale.refuse("is of " + name_of(scale.type) + ", and must be of float32 or bfloat16");
        expect(scale, {made.panels(), made.groups, PANEL}, made.panels(), made.groups, PANEL);
        made.scales = scale.data;
    }
    return made;
}

// Static scales, `count` of them, each one that a value may be divided by; null where none are given.
inline const float* static_scales(const Tensor& tensor, int64_t count) {
    const float* scales = tensor.floats();
    for (int64_t i = 0; scales && i < count; i++)
        if (!std::isfinite(scales[i]) || scales[i] < LEAST_SCALE)
            tensor.refuse("holds " + written(scales[i]) + ", and a scale is at least " + written(LEAST_SCALE));
    return scales;
}
