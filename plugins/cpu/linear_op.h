// The op `Linear`: x [..., K], weight, scale?, x_scale? -> [..., N]. Weights of 16 and 32 bits, floats without scales, are
// in bundles that were built before floats were multiplied as they lie; none is made any more.

#pragma once

#include "products.h"

struct Linear {
    static constexpr const char* NAME = "Linear";
    static constexpr size_t INPUTS = 4, NEEDED = 2, OUTPUTS = 1;
    static constexpr const char* INPUT_NAMES[INPUTS] = {"x", "weight", "scale", "x_scale"};

    static ort::Type input_type(size_t index) { return index ? ort::Type::any : ort::Type::float32; }
    static ort::Type output_type(size_t) { return ort::Type::float32; }

    int64_t bits, group, outputs;

    explicit Linear(const Settings& settings)
        : bits(settings.one_of("bits", {4, 8, 16, 32})),
          group(settings.group("group")),
          outputs(settings.integer("outputs", 1)) {
        if (group && bits >= 16) Settings::refuse("group", std::to_string(group), "0 where weights are floats");
    }

    void compute(const Call& call) const {
        const Tensor x = call.input(0), weight = call.input(1), scale = call.input(2), x_scale = call.input(3);
        const LinearInput given(x);
        const int64_t inputs = given.inputs;
        const Matrix matrix = matrix_of({weight, scale, bits, group}, inputs, outputs);
        if (bits >= 16)
            for (const Tensor* tensor : {&scale, &x_scale})
                if (tensor->is_given) tensor->refuse("is given, and weights that are floats have none");
        if (x_scale.is_given && x_scale.shape.rank) x_scale.expect({1});
        const float* fixed = static_scales(x_scale, 1);
        float* to = call.output(given.with(outputs));
        const int64_t count = given.count();
        if (count == 0) return;
        Rows rows{nullptr, nullptr, nullptr, given.from};
        if (bits < 16) {
            rows = buffers().inputs.take(count, matrix);
            for_rows(call, count, [&](int64_t row) {
                kernels().quantise(given.from + row * inputs, matrix, 1, fixed ? *fixed : 0, rows, row);
            });
        }
        multiply(call, {{matrix, 0, count}}, rows, {to, outputs, nullptr, false});
    }
};
