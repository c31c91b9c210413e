// The op `PlainMoeDispatch`: hidden [T, H], router_logits [T, E], gate_up [held, H, 2I], down [held, I, H] -> [T, H]: experts
// in float32, float16 or bfloat16 as stacked checkpoints hold them. Of the router's E experts some are held, from
// `first_expert` on; those that no token chose are not read.

#pragma once

#include "products.h"
#include "routing.h"

struct PlainMoeDispatch {
    static constexpr const char* NAME = "PlainMoeDispatch";
    static constexpr size_t INPUTS = 4, NEEDED = 4, OUTPUTS = 1;
    static constexpr const char* INPUT_NAMES[INPUTS] = {"hidden", "router_logits", "gate_up", "down"};

    static ort::Type input_type(size_t index) { return index < 2 ? ort::Type::float32 : ort::Type::any; }
    static ort::Type output_type(size_t) { return ort::Type::float32; }

    int64_t top_k, first_expert;

    explicit PlainMoeDispatch(const Settings& settings)
        : top_k(settings.integer("top_k", 1)), first_expert(settings.integer("first_expert", 0)) {}

    void compute(const Call& call) const {
        const Tensor hidden = call.input(0), logits = call.input(1), gate_up = call.input(2), down = call.input(3);
        Layer layer{};
        layer.hidden = hidden.floats(), layer.logits = logits.floats();
        Routing::check(hidden);
        const int64_t tokens = hidden.shape[0], size = hidden.shape[1];
        down.expect({-1, -1, size});
        const int64_t experts = down.shape[0], width = down.shape[1];
        Routing::check_held(down);
        gate_up.expect({experts, size, product({2, width})});
        layer.routing = {top_k, first_expert, experts};
        layer.routed = layer.routing.checked(logits, tokens);
        layer.into = {static_cast<const uint8_t*>(gate_up.data), size, 2 * width, plain_type_of(gate_up)};
        layer.back = {static_cast<const uint8_t*>(down.data), width, size, plain_type_of(down)};
        layer.output = call.output({tokens, size});
        layer.routing.in_pieces(tokens, 8 * size + 12 * width + 128,
                                [&](int64_t first, int64_t count) { dispatch(call, layer, first, count); });
    }

   private:
    // What one call computes on; all of it is known to fit.
    struct Layer {
        const float *hidden, *logits;
        PlainMatrix into, back;
        float* output;
        Routing routing;
        int64_t routed;  // experts that the router knows
    };

    // Between rows: so that those of a tile lie in different sets of the cache.
    static constexpr int64_t GAP = 16;

    void dispatch(const Call& call, const Layer& layer, int64_t start, int64_t tokens) const {
        const Routing& routing = layer.routing;
        const int64_t size = layer.into.inputs, width = layer.back.inputs;
        float* const to = layer.output + start * size;
        const std::vector<Choice> choices = routing.route(layer.logits + start * layer.routed, tokens, layer.routed);
        const auto count = static_cast<int64_t>(choices.size());
        const bool is_direct = routing.is_direct(layer.routed);
        if (!is_direct) std::fill(to, to + tokens * size, 0.0f);
        if (count == 0) return;

        Buffers& own = buffers();
        const int64_t row = size + GAP, activated_row = width + GAP;
        float* const rows = own.rows.take<float>(product({count, row}));
        float* const gates = own.gates.take<float>(product({count, 2, width}));
        float* const activated = own.activations.take<float>(product({count, activated_row}));
        float* const out = is_direct ? to : own.outputs.take<float>(product({tokens, routing.most(), size}));
        std::vector<int64_t> places;
        for (const Choice& choice : choices) places.push_back(choice.place);

        for_rows(call, count, [&](int64_t index) {
            const float* const from = layer.hidden + (start + choices[index].token) * size;
            for (int64_t i = 0; i < size; i++) rows[index * row + i] = from[i] * choices[index].score;
        });
        multiply_chosen(call, layer.into, choices, {rows, row, count, nullptr}, gates);
        for_rows(call, count, [&](int64_t index) {
            kernels().activate(gates + index * 2 * width, width, activated + index * activated_row);
        });
        multiply_chosen(call, layer.back, choices, {activated, activated_row, count, places.data()}, out);
        if (!is_direct) routing.add_up(choices, out, tokens, size, to);
    }

    // The rows that chose one expert; few of them have sums [stretches, outputs] in pieces, each [rows, outputs].
    struct Chosen {
        int64_t expert, first, last;
        float* sums;

        int64_t count() const { return last - first; }
        // Outputs of a piece.
        int64_t at_once() const { return sums ? std::min(OUTPUTS_READ, SUMS_NEAR / count()) : OUTPUTS_AT_ONCE; }
        // The sums of a piece of a stretch, from the output `from` on.
        float* piece(const PlainMatrix& matrix, int64_t stretch, int64_t from) const {
            return sums + (stretch * matrix.outputs + from) * count();
        }
    };

    // A part of what one expert's rows are multiplied with: outputs from `first` on, or of few rows those of a stretch.
    struct Unit {
        const Chosen* of;
        int64_t stretch, first, last;
    };

    // Sums of stretches that are kept at once, in floats; one expert's may be more.
    static constexpr int64_t SUMS_AT_ONCE = 1 << 22;

    // Multiplies the rows of each expert that was chosen with its matrix.
    static void multiply_chosen(const Call& call, const PlainMatrix& matrix, const std::vector<Choice>& choices,
                                const StackedInput& x, float* to) {
        std::vector<Chosen> chosen;
        for (int64_t row = 0; row < x.count; row++) {
            if (row == 0 || choices[row].expert != chosen.back().expert)
                chosen.push_back({choices[row].expert, row, row, nullptr});
            chosen.back().last = row + 1;
        }
        const int64_t stretches = divided_up(matrix.inputs, DEEP);
        const auto needed = [&](const Chosen& of) {
            return of.count() > kernels().few ? 0 : product({of.count(), stretches, matrix.outputs});
        };
        for (size_t first = 0, last = 0; first < chosen.size(); first = last) {
            int64_t floats = 0;
            for (; last < chosen.size() && (last == first || floats + needed(chosen[last]) <= SUMS_AT_ONCE); last++)
                floats += needed(chosen[last]);
            float* sums = buffers().sums.take<float>(floats);
            for (size_t i = first; i < last; sums += needed(chosen[i++]))
                if (needed(chosen[i])) chosen[i].sums = sums;
            multiply_some(call, matrix, chosen.data() + first, chosen.data() + last, x, to);
        }
    }

    static void multiply_some(const Call& call, const PlainMatrix& matrix, const Chosen* chosen, const Chosen* end,
                              const StackedInput& x, float* to) {
        const int64_t stretches = divided_up(matrix.inputs, DEEP);
        std::vector<Unit> units, few;
        const auto add = [&](std::vector<Unit>& some, const Chosen* of, int64_t stretch) {
            for (int64_t first = 0; first < matrix.outputs; first += of->at_once())
                some.push_back({of, stretch, first, std::min(matrix.outputs, first + of->at_once())});
        };
        for (const Chosen* of = chosen; of != end; of++) {
            for (int64_t stretch = 0; of->sums && stretch < stretches; stretch++) add(units, of, stretch);
            add(of->sums ? few : units, of, 0);
        }
        call.in_parallel(static_cast<int64_t>(units.size()), [&](int64_t index) {
            const auto& [of, stretch, first, last] = units[index];
            PlainMatrix one = matrix;
            one.weights += of->expert * matrix.size();
            const StackedInput rows = x.part(of->first, of->last);
            if (of->sums)
                return kernels().sum_stretch(one, rows, stretch, first, last, of->piece(matrix, stretch, first));
            float* const place = x.places ? to : to + of->first * matrix.outputs;
            kernels().multiply_stacked(one, rows, first, last, place, buffers().strip.take<float>(BLOCK_FLOATS));
        });
        if (few.empty()) return;
        call.in_parallel(static_cast<int64_t>(few.size()), [&](int64_t index) {
            const auto& [of, ignored, first, last] = few[index];
            for (int64_t row = 0; row < of->count(); row++) {
                float* const place = to + x.place(of->first + row) * matrix.outputs + first;
                for (int64_t stretch = 0; stretch < stretches; stretch++) {
                    const float* const some = of->piece(matrix, stretch, first) + row * (last - first);
                    for (int64_t n = 0; n < last - first; n++) place[n] = stretch ? place[n] + some[n] : some[n];
                }
            }
        });
    }
};
