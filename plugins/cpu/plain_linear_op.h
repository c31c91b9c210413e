// The op `PlainLinear`: x [..., K], weight [N, K] in float32, float16 or bfloat16 -> [..., N].

#pragma once

#include "products.h"

struct PlainLinear {
    static constexpr const char* NAME = "PlainLinear";
    static constexpr size_t INPUTS = 2, NEEDED = 2, OUTPUTS = 1;
    static constexpr const char* INPUT_NAMES[INPUTS] = {"x", "weight"};

    static ort::Type input_type(size_t index) { return index ? ort::Type::any : ort::Type::float32; }
    static ort::Type output_type(size_t) { return ort::Type::float32; }

    explicit PlainLinear(const Settings&) {}

    void compute(const Call& call) const {
        const Tensor x = call.input(0), weight = call.input(1);
        const LinearInput given(x);
        const PlainMatrix matrix = plain_matrix_of(weight, given.inputs);
        float* to = call.output(given.with(matrix.outputs));
        const int64_t count = given.count();
        if (count && matrix.outputs) multiply_plain(call, {{matrix, 0, count}}, given.from, to, [](auto&&...) {});
    }
};
