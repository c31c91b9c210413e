// Matrices of E4M3 as the graph gives them, rows rounded to E4M3 for them, and their products.

#pragma once

#include "products.h"

// The bound of a row's own scale as an attribute gives it; 0 is none.
inline float bound_of(const Settings& settings) { return settings.number("bound", 0); }

// A matrix [N, K], or those of some experts [E, N, K], with a scale for each output.
struct Fp8Matrix {
    PlainMatrix matrix;
    const float* scales;

    // Refuses what does not fit; `experts` is 0 where there is no dimension of them.
    Fp8Matrix(const Tensor& weight, const Tensor& scale, int64_t outputs, int64_t inputs, int64_t experts) {
        if (weight.type != ort::Type::e4m3)
            weight.refuse("is of " + name_of(weight.type) + ", and must be of " + name_of(ort::Type::e4m3));
        scales = scale.floats();
        if (experts) {
            weight.expect({experts, outputs, inputs});
            scale.expect({experts, outputs, 1});
        } else {
            weight.expect({outputs, inputs});
            scale.expect({outputs});
        }
        const bool in_pairs = kernels().pairs.multiply_plain && inputs % 2 == 0;
        matrix = {static_cast<const uint8_t*>(weight.data), in_pairs ? inputs / 2 : inputs, outputs,
                  in_pairs ? Plain::e4m3_pairs : Plain::e4m3};
    }

    // Floats that a row takes.
    int64_t row() const { return matrix.inputs; }

    // Rounds a row; returns its scale.
    float round(const float* x, float factor, const Fp8Scale& of, float* to) const {
        const bool in_pairs = matrix.type == Plain::e4m3_pairs;
        const auto round = in_pairs ? kernels().pairs.round_fp8 : kernels().round_fp8;
        return round(x, in_pairs ? 2 * matrix.inputs : matrix.inputs, factor, of, to);
    }

    PlainMatrix of_expert(int64_t index) const {
        PlainMatrix one = matrix;
        one.weights += index * matrix.size();
        return one;
    }
};

// A product's part, [., N], times the outputs' scales and the rows'.
inline void scale_part(float* to, int64_t stride, const float* row_scales, const float* scales, int64_t first_row,
                       int64_t last_row, int64_t first, int64_t last) {
    for (int64_t row = first_row; row < last_row; row++)
        for (int64_t n = first; n < last; n++) to[row * stride + n] = to[row * stride + n] * scales[n] * row_scales[row];
}
