// The op `Fp8MoeDispatch`: hidden [T, H], router_logits [T, E], gate_up [held, 2I, H] in E4M3, gate_up_scale [held, 2I, 1],
// down [held, H, I] in E4M3, down_scale [held, H, 1], hidden_scale? [held], activated_scale? [held] -> [T, H]. Of the router's
// E experts some are held, from `first_expert` on; those that no token chose are not read.

#pragma once

#include "fp8_rows.h"
#include "routing.h"

struct Fp8MoeDispatch {
    static constexpr const char* NAME = "Fp8MoeDispatch";
    static constexpr size_t INPUTS = 8, NEEDED = 6, OUTPUTS = 1;
    static constexpr const char* INPUT_NAMES[INPUTS] = {"hidden", "router_logits", "gate_up",      "gate_up_scale",
                                                        "down",   "down_scale",    "hidden_scale", "activated_scale"};

    static ort::Type input_type(size_t index) { return index < 2 ? ort::Type::float32 : ort::Type::any; }
    static ort::Type output_type(size_t) { return ort::Type::float32; }

    int64_t top_k, first_expert;
    float bound;

    explicit Fp8MoeDispatch(const Settings& settings)
        : top_k(settings.integer("top_k", 1)), first_expert(settings.integer("first_expert", 0)),
          bound(bound_of(settings)) {}

    void compute(const Call& call) const {
        const Tensor hidden = call.input(0), logits = call.input(1), gate_up = call.input(2),
                     gate_up_scale = call.input(3), down = call.input(4), down_scale = call.input(5),
                     hidden_scale = call.input(6), activated_scale = call.input(7);
        const float *from = hidden.floats(), *of_router = logits.floats();
        Routing::check(hidden);
        const int64_t tokens = hidden.shape[0], size = hidden.shape[1];
        down.expect({-1, size, -1});
        const int64_t experts = down.shape[0], width = down.shape[2];
        Routing::check_held(down);
        const Routing routing{top_k, first_expert, experts};
        const int64_t routed = routing.checked(logits, tokens);
        for (const Tensor* scale : {&hidden_scale, &activated_scale})
            if (scale->is_given) scale->expect({experts});
        const Layer layer{from,
                          of_router,
                          {gate_up, gate_up_scale, product({2, width}), size, experts},
                          {down, down_scale, size, width, experts},
                          static_scales(hidden_scale, experts),
                          static_scales(activated_scale, experts),
                          call.output({tokens, size}),
                          routing,
                          routed,
                          size,
                          width};
        routing.in_pieces(tokens, 8 * size + 12 * width + 128,
                          [&](int64_t first, int64_t count) { dispatch(call, layer, first, count); });
    }

   private:
    // What one call computes on; all of it is known to fit.
    struct Layer {
        const float *hidden, *logits;
        Fp8Matrix into, back;
        const float *hidden_scales, *activated_scales;
        float* output;
        Routing routing;
        int64_t routed, size, width;  // `routed` experts the router knows
    };

    void dispatch(const Call& call, const Layer& layer, int64_t start, int64_t tokens) const {
        const Routing& routing = layer.routing;
        const int64_t size = layer.size, width = layer.width;
        float* const to = layer.output + start * size;
        const std::vector<Choice> choices = routing.route(layer.logits + start * layer.routed, tokens, layer.routed);
        const auto count = static_cast<int64_t>(choices.size());
        const bool is_direct = routing.is_direct(layer.routed);
        if (!is_direct) std::fill(to, to + tokens * size, 0.0f);
        if (count == 0) return;

        std::vector<PlainProduct> first, second;
        for (int64_t row = 0; row < count; row++) {
            const int64_t expert = choices[row].expert;
            if (row == 0 || expert != choices[row - 1].expert) {
                first.push_back({layer.into.of_expert(expert), row, row});
                second.push_back({layer.back.of_expert(expert), row, row});
            }
            first.back().last = second.back().last = row + 1;
        }

        Buffers& own = buffers();
        const int64_t row_size = std::max(layer.into.row(), layer.back.row());
        float* const rows = own.rows.take<float>(product({count, row_size}));
        float* const gates = own.gates.take<float>(product({count, std::max(2 * width, size)}));
        float* const activated = own.activations.take<float>(product({count, width}));
        float* const out = is_direct ? to : own.outputs.take<float>(product({tokens, routing.most(), size}));
        std::vector<float> scales(count);

        for_rows(call, count, [&](int64_t index) {
            const Choice& of = choices[index];
            const Fp8Scale scale{layer.hidden_scales ? layer.hidden_scales[of.expert] : 0, bound};
            const float* const from = layer.hidden + (start + of.token) * size;
            scales[index] = layer.into.round(from, of.score, scale, rows + index * layer.into.row());
        });
        multiply(call, first, layer.into, choices, rows, gates, scales.data(), nullptr);
        for_rows(call, count, [&](int64_t index) {
            const Choice& of = choices[index];
            const Fp8Scale scale{layer.activated_scales ? layer.activated_scales[of.expert] : 0, bound};
            kernels().activate(gates + index * 2 * width, width, activated + index * width);
            scales[index] = layer.back.round(activated + index * width, 1, scale, rows + index * layer.back.row());
        });
        multiply(call, second, layer.back, choices, rows, gates, scales.data(), out);
        if (!is_direct) routing.add_up(choices, out, tokens, size, to);
    }

    // Multiplies all rows with their experts' matrices, and moves what they make to its places where `out` is given.
    static void multiply(const Call& call, const std::vector<PlainProduct>& products, const Fp8Matrix& of,
                         const std::vector<Choice>& choices, const float* rows, float* made, const float* scales,
                         float* out) {
        const int64_t outputs = of.matrix.outputs;
        const auto finish = [&](const PlainProduct& one, int64_t first_row, int64_t last_row, int64_t first,
                                int64_t last) {
            const float* const own = of.scales + choices[one.first].expert * outputs;
            scale_part(made, outputs, scales, own, first_row, last_row, first, last);
            for (int64_t row = first_row; out && row < last_row; row++)
                std::copy(made + row * outputs + first, made + row * outputs + last,
                          out + choices[row].place * outputs + first);
        };
        multiply_plain(call, products, rows, made, finish);
    }
};
