// The op `Fp8Linear`: x [..., K], weight [N, K] in E4M3, scale [N], x_scale? -> [..., N]: activations are rounded to E4M3, by
// the static scale or a token by its own.

#pragma once

#include "fp8_rows.h"

struct Fp8Linear {
    static constexpr const char* NAME = "Fp8Linear";
    static constexpr size_t INPUTS = 4, NEEDED = 3, OUTPUTS = 1;
    static constexpr const char* INPUT_NAMES[INPUTS] = {"x", "weight", "scale", "x_scale"};

    static ort::Type input_type(size_t index) { return index ? ort::Type::any : ort::Type::float32; }
    static ort::Type output_type(size_t) { return ort::Type::float32; }

    float bound;

    explicit Fp8Linear(const Settings& settings) : bound(bound_of(settings)) {}

    void compute(const Call& call) const {
        const Tensor x = call.input(0), weight = call.input(1), scale = call.input(2), x_scale = call.input(3);
        const LinearInput given(x);
        const int64_t inputs = given.inputs;
        weight.expect({-1, inputs});
        const int64_t outputs = weight.shape[0];
        const Fp8Matrix matrix(weight, scale, outputs, inputs, 0);
        if (x_scale.is_given && x_scale.shape.rank) x_scale.expect({1});
        const float* fixed = static_scales(x_scale, 1);
        float* to = call.output(given.with(outputs));
        const int64_t count = given.count();
        if (count == 0 || outputs == 0) return;
        float* const rows = buffers().rows.take<float>(product({count, matrix.row()}));
        float* const scales = buffers().gates.take<float>(count);
        for_rows(call, count, [&](int64_t row) {
            scales[row] = matrix.round(given.from + row * inputs, 1, {fixed ? *fixed : 0, bound}, rows + row * matrix.row());
        });
        multiply_plain(call, {{matrix.matrix, 0, count}}, rows, to,
                       [&](const PlainProduct&, int64_t first_row, int64_t last_row, int64_t first, int64_t last) {
                           scale_part(to, outputs, scales, matrix.scales, first_row, last_row, first, last);
                       });
    }
};
