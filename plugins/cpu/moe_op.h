// The op `MoeDispatch`: hidden [T, H], router_logits [T, E], gate_up, gate_up_scale, down, down_scale, hidden_scale?,
// activated_scale? -> [T, H]. Of the router's E experts some are held, from `first_expert` on.

#pragma once

#include "products.h"
#include "routing.h"

struct MoeDispatch {
    static constexpr const char* NAME = "MoeDispatch";
    static constexpr size_t INPUTS = 8, NEEDED = 6, OUTPUTS = 1;
    static constexpr const char* INPUT_NAMES[INPUTS] = {"hidden", "router_logits", "gate_up",      "gate_up_scale",
                                                        "down",   "down_scale",    "hidden_scale", "activated_scale"};

    static ort::Type input_type(size_t index) { return index < 2 ? ort::Type::float32 : ort::Type::any; }
    static ort::Type output_type(size_t) { return ort::Type::float32; }

    int64_t bits, group, down_group;
    Routing routing;
    int64_t width;

    explicit MoeDispatch(const Settings& settings)
        : bits(settings.one_of("bits", {4, 8})),
          group(settings.group("group")),
          down_group(settings.group("down_group")),
          routing{settings.integer("top_k", 1), settings.integer("first_expert", 0), settings.integer("experts", 1)},
          width(settings.integer("width", 1)) {}

    void compute(const Call& call) const {
        const Tensor hidden = call.input(0), logits = call.input(1), gate_up = call.input(2),
                     gate_up_scale = call.input(3), down = call.input(4), down_scale = call.input(5),
                     hidden_scale = call.input(6), activated_scale = call.input(7);
        Layer layer{};
        layer.hidden = hidden.floats(), layer.logits = logits.floats();
        Routing::check(hidden);
        const int64_t tokens = hidden.shape[0], size = hidden.shape[1];
        layer.routed = routing.checked(logits, tokens);
        const int64_t experts = routing.experts;
        layer.into = matrix_of({gate_up, gate_up_scale, bits, group}, size, 2 * width, experts);
        layer.back = matrix_of({down, down_scale, bits, down_group}, width, size, experts);
        for (const Tensor* scale : {&hidden_scale, &activated_scale})
            if (scale->is_given) scale->expect({experts});
        layer.hidden_scales = static_scales(hidden_scale, experts);
        layer.activated_scales = static_scales(activated_scale, experts);
        layer.output = call.output({tokens, size});
        routing.in_pieces(tokens, 9 * size + 5 * width,
                          [&](int64_t first, int64_t count) { dispatch(call, layer, first, count); });
    }

   private:
    // What one call computes on; all of it is known to fit.
    struct Layer {
        const float *hidden, *logits;
        Matrix into, back;
        const float *hidden_scales, *activated_scales;
        float* output;
        int64_t routed;  // experts that the router knows
    };

    void dispatch(const Call& call, const Layer& layer, int64_t start, int64_t tokens) const {
        const Matrix &into = layer.into, &back = layer.back;
        const int64_t size = into.inputs;
        const float* hidden = layer.hidden + start * size;
        float* to = layer.output + start * size;
        const std::vector<Choice> choices = routing.route(layer.logits + start * layer.routed, tokens, layer.routed);
        const auto count = static_cast<int64_t>(choices.size());
        const bool is_direct = routing.is_direct(layer.routed);
        if (!is_direct) std::fill(to, to + tokens * size, 0.0f);
        if (count == 0) return;

        std::vector<Product> first, second;
        std::vector<int64_t> places;
        for (int64_t row = 0; row < count; row++) {
            const int64_t expert = choices[row].expert;
            places.push_back(choices[row].place);
            if (row == 0 || expert != choices[row - 1].expert) {
                first.push_back({into.of_expert(expert), row, row});
                second.push_back({back.of_expert(expert), row, row});
            }
            first.back().last = second.back().last = row + 1;
        }

        Buffers& own = buffers();
        const Rows rows = own.inputs.take(count, into);
        for_rows(call, count, [&](int64_t row) {
            const Choice& choice = choices[row];
            const float fixed = layer.hidden_scales ? layer.hidden_scales[choice.expert] : 0;
            kernels().quantise(hidden + choice.token * size, into, choice.score, fixed, rows, row);
        });
        float* activated = own.activations.take<float>(product({count, width}));
        multiply(call, first, rows, {activated, width, nullptr, true});
        const Rows middle = own.activated.take(count, back);
        for_rows(call, count, [&](int64_t row) {
            const float fixed = layer.activated_scales ? layer.activated_scales[choices[row].expert] : 0;
            kernels().quantise(activated + row * width, back, 1, fixed, middle, row);
        });
        float* out = is_direct ? to : own.outputs.take<float>(product({tokens, routing.most(), size}));
        multiply(call, second, middle, {out, size, places.data(), false});
        if (!is_direct) routing.add_up(choices, out, tokens, size, to);
    }
};
