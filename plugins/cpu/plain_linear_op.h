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
        const float* from = x.floats();
        if (x.shape.rank == 0 || x.shape.back() == 0)
            x.refuse("has the shape " + written(x.shape.dims, x.shape.rank) + ", whose last dimension must not be 0");
        const PlainMatrix matrix = plain_matrix_of(weight, x.shape.back());
        Shape shape = x.shape;
        shape.back() = matrix.outputs;
        float* to = call.output(shape);
        int64_t count = 1;
        for (size_t i = 0; i + 1 < x.shape.rank; i++) count = product({count, x.shape[i]});
        if (count && matrix.outputs) multiply_plain(call, {{matrix, 0, count}}, from, to, [](auto&&...) {});
    }
};
