// Tokens' ways to their experts, of which some of the router's are held.

#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "call.h"

#ifndef ARRIERO_WORKSPACE
#define ARRIERO_WORKSPACE (1 << 30)
#endif
constexpr int64_t WORKSPACE = ARRIERO_WORKSPACE;  // bytes, about, of what a call computes on its way, at most

// A token's way to one of its experts.
struct Choice {
    int64_t expert, token, place;  // `place` numbers the pairs (token, choice)
    float score;
};

// Which experts are held, and how many each token chooses.
struct Routing {
    int64_t top_k, first_expert, experts;

    // Refuses hidden states that are not [T, H] with features.
    static void check(const Tensor& hidden) {
        hidden.expect({-1, -1});
        if (hidden.shape[1] == 0)
            hidden.refuse("has the shape " + written(hidden.shape.dims, 2) + ", and needs features");
    }

    // Refuses the last matrices of experts, of three dimensions, where there are no experts or no features.
    static void check_held(const Tensor& down) {
        for (size_t i = 0; i < 3; i++)
            if (down.shape[i] == 0)
                down.refuse("has the shape " + written(down.shape.dims, 3) + ", and needs experts and their features");
    }

    // Whether each token has one choice, and all experts are here: its row is that choice's.
    bool is_direct(int64_t routed) const { return top_k == 1 && experts == routed; }

    // Calls `compute` with the first token and the number of tokens of pieces of a call, each token's choices taking so
    // many bytes each.
    template <typename Compute>
    void in_pieces(int64_t tokens, int64_t bytes, const Compute& compute) const {
        const int64_t at_once = std::max<int64_t>(1, WORKSPACE / product({most(), bytes}));
        for (int64_t first = 0; first < tokens; first += at_once) compute(first, std::min(at_once, tokens - first));
    }

    // Choices that a token has here at most.
    int64_t most() const { return std::min(top_k, experts); }

    // Refuses logits [tokens, E] of too few experts; returns E.
    int64_t checked(const Tensor& logits, int64_t tokens) const {
        logits.expect({tokens, -1});
        const int64_t routed = logits.shape[1];
        if (top_k > routed || first_expert + experts > routed)
            logits.refuse("is of " + std::to_string(routed) + " experts, and experts " + std::to_string(first_expert) +
                          " to " + std::to_string(first_expert + experts - 1) + " are held and " +
                          std::to_string(top_k) + " chosen");
        return routed;
    }

    // Each token's experts, of those that are held, expert by expert: the largest logits, the first of equals.
    std::vector<Choice> route(const float* logits, int64_t tokens, int64_t count) const {
        std::vector<Choice> choices;
        std::vector<int64_t> order(count);
        for (int64_t token = 0; token < tokens; token++) {
            const float* own = logits + token * count;
            for (int64_t expert = 0; expert < count; expert++) order[expert] = expert;
            const auto logit = [own](int64_t expert) { return std::isnan(own[expert]) ? -INFINITY : own[expert]; };
            std::partial_sort(order.begin(), order.begin() + top_k, order.end(), [logit](int64_t a, int64_t b) {
                return logit(a) > logit(b) || (logit(a) == logit(b) && a < b);
            });
            int64_t place = token * most();
            for (int64_t rank = 0; rank < top_k; rank++) {
                const int64_t expert = order[rank] - first_expert;
                if (expert < 0 || expert >= experts) continue;
                choices.push_back({expert, token, place++, 1 / (1 + std::exp(-own[order[rank]]))});
            }
        }
        std::stable_sort(choices.begin(), choices.end(),
                         [](const Choice& a, const Choice& b) { return a.expert < b.expert; });
        return choices;
    }

    // Adds what lies at the choices' places, [tokens * most(), size], to the tokens' rows.
    void add_up(const std::vector<Choice>& choices, const float* from, int64_t tokens, int64_t size, float* to) const {
        std::vector<int64_t> by_place(tokens * most(), -1);
        for (const Choice& choice : choices) by_place[choice.place] = choice.token;
        for (int64_t place = 0; place < tokens * most(); place++)
            if (by_place[place] >= 0)
                for (int64_t i = 0; i < size; i++) to[by_place[place] * size + i] += from[place * size + i];
    }
};
