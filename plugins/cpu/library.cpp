// The ops of domain `arriero.cpu` for ONNX Runtime: attention, and products with quantised matrices.
//
//   GroupedQueryAttention  the canonical op's inputs, attributes and outputs, in float32 but for its caches
//   Linear                 x [..., K], weight, scale?, x_scale?                                      -> [..., N]
//   MoeDispatch            hidden [T, H], router_logits [T, E], gate_up, gate_up_scale, down, down_scale,
//                          hidden_scale?, activated_scale?                                           -> [T, H]
//
// Weights and scales lie as `matrix.h` says, and are read where they lie. Activations are rounded to int8: in blocks of
// 32 inputs by the largest of each, or by a static scale where one is given. A matrix of floats has no scale, and is
// multiplied with float32 activations.

#include <algorithm>
#include <cmath>
#include <vector>

#include "call.h"
#include "instruction_sets.h"

namespace {

constexpr int64_t SLICE = 1 << 16;  // bytes of weights that are worth a thread's while
constexpr int64_t SLICES = 64;  // slices of one product at most
constexpr int64_t TILE_ROWS = 64;  // queries that a thread takes through a head's cache together
constexpr int64_t ROWS_BYTES = 192 * 1024;  // bytes of rows that a thread takes through its panels: they stay in L2

struct RowBuffers {
    Buffer values, scales, sums;

    Rows take(int64_t count, const Matrix& matrix) {
        return {values.take<int8_t>(count * matrix.padded()), scales.take<float>(count * matrix.blocks()),
                sums.take<int32_t>(count * matrix.blocks()), nullptr};
    }
};

struct Buffers {
    RowBuffers inputs, activated;
    Buffer activations, outputs, queries;
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

// Some experts' matrices, or one, from what the graph says of them; anything that does not fit is refused.
Matrix matrix_of(const Runtime& runtime, int64_t bits, int64_t group, const Tensor& weight, const Tensor& scale,
                 int64_t inputs, int64_t outputs, int64_t experts = 1) {
    Matrix made{};
    made.weights = static_cast<const uint8_t*>(weight.data);
    made.scales = scale.data;
    made.inputs = inputs, made.outputs = outputs, made.bits = static_cast<int>(bits);
    made.block = BLOCK;
    if (group) {
        if (inputs % group || group % 8)
            runtime.fail("arriero.cpu: groups do not divide the inputs, or are no multiples of 8");
        while (group % made.block) made.block /= 2;
    }
    made.groups = group ? inputs / group : 1;
    made.has_wide_scales = scale.type == ort::Type::float32;
    const int64_t panels = experts * made.panels();
    const bool has_scales =
        scale.size() == panels * made.groups * PANEL && (made.has_wide_scales || scale.type == ort::Type::bfloat16);
    if (weight.size() != panels * made.panel_size() || (bits < 16 && !has_scales))
        runtime.fail("arriero.cpu: a weight or its scales are not of the size that they should have");
    return made;
}

struct Linear {
    static constexpr const char* NAME = "Linear";
    static constexpr size_t INPUTS = 4, NEEDED = 2, OUTPUTS = 1;

    static ort::Type input_type(size_t index) { return index ? ort::Type::any : ort::Type::float32; }
    static ort::Type output_type(size_t) { return ort::Type::float32; }

    int64_t bits, group, outputs;

    Linear(const Runtime& runtime, const ort::Info* info)
        : bits(runtime.attribute(info, "bits")),
          group(runtime.attribute(info, "group")),
          outputs(runtime.attribute(info, "outputs")) {}

    void compute(const Call& call) const {
        const Tensor x = call.input(0), weight = call.input(1), scale = call.input(2), x_scale = call.input(3);
        const int64_t inputs = x.shape.back();
        int64_t count = 1;
        for (size_t i = 0; i + 1 < x.shape.size(); i++) count *= x.shape[i];
        const Matrix matrix = matrix_of(call.runtime, bits, group, weight, scale, inputs, outputs);
        std::vector<int64_t> shape = x.shape;
        shape.back() = outputs;
        float* to = call.output(shape);
        if (count == 0) return;
        Rows rows{nullptr, nullptr, nullptr, x.floats()};
        if (matrix.bits < 16) {
            rows = buffers().inputs.take(count, matrix);
            const float fixed = x_scale.data ? *x_scale.floats() : 0;
            for_rows(call, count,
                     [&](int64_t row) { kernels().quantise(x.floats() + row * inputs, matrix, 1, fixed, rows, row); });
        }
        multiply(call, {{matrix, 0, count}}, rows, {to, outputs, nullptr, false});
    }
};

// A token's way to one of its experts.
struct Choice {
    int64_t expert, token, place;  // `place` numbers the pairs (token, choice)
    float score;
};

struct MoeDispatch {
    static constexpr const char* NAME = "MoeDispatch";
    static constexpr size_t INPUTS = 8, NEEDED = 6, OUTPUTS = 1;

    static ort::Type input_type(size_t index) { return index < 2 ? ort::Type::float32 : ort::Type::any; }
    static ort::Type output_type(size_t) { return ort::Type::float32; }

    int64_t bits, group, down_group, top_k, first_expert, experts, width;

    MoeDispatch(const Runtime& runtime, const ort::Info* info)
        : bits(runtime.attribute(info, "bits")),
          group(runtime.attribute(info, "group")),
          down_group(runtime.attribute(info, "down_group")),
          top_k(runtime.attribute(info, "top_k")),
          first_expert(runtime.attribute(info, "first_expert")),
          experts(runtime.attribute(info, "experts")),
          width(runtime.attribute(info, "width")) {}

    void compute(const Call& call) const {
        const Tensor hidden = call.input(0), logits = call.input(1), hidden_scale = call.input(6),
                     activated_scale = call.input(7);
        const int64_t tokens = hidden.shape[0], size = hidden.shape[1];
        const Matrix into =
            matrix_of(call.runtime, bits, group, call.input(2), call.input(3), size, 2 * width, experts);
        const Matrix back =
            matrix_of(call.runtime, bits, down_group, call.input(4), call.input(5), width, size, experts);
        for (const Tensor* scale : {&hidden_scale, &activated_scale})
            if (scale->data && scale->size() != experts)
                call.runtime.fail("arriero.cpu: not every expert has a static scale");
        float* to = call.output({tokens, size});
        const std::vector<Choice> choices = route(logits.floats(), tokens, logits.shape[1]);
        const auto count = static_cast<int64_t>(choices.size());
        const bool is_direct = top_k == 1 && experts == logits.shape[1];
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
            const float fixed = hidden_scale.data ? hidden_scale.floats()[choice.expert] : 0;
            kernels().quantise(hidden.floats() + choice.token * size, into, choice.score, fixed, rows, row);
        });
        float* activated = own.activations.take<float>(count * width);
        multiply(call, first, rows, {activated, width, nullptr, true});
        const Rows middle = own.activated.take(count, back);
        for_rows(call, count, [&](int64_t row) {
            const float fixed = activated_scale.data ? activated_scale.floats()[choices[row].expert] : 0;
            kernels().quantise(activated + row * width, back, 1, fixed, middle, row);
        });
        float* out = is_direct ? to : own.outputs.take<float>(tokens * top_k * size);
        multiply(call, second, middle, {out, size, places.data(), false});
        if (is_direct) return;
        std::vector<int64_t> by_place(tokens * top_k, -1);
        for (const Choice& choice : choices) by_place[choice.place] = choice.token;
        for (int64_t place = 0; place < tokens * top_k; place++)
            if (by_place[place] >= 0)
                for (int64_t i = 0; i < size; i++) to[by_place[place] * size + i] += out[place * size + i];
    }

   private:
    // Each token's experts, of those that are held, expert by expert: the largest logits, the first of equals.
    std::vector<Choice> route(const float* logits, int64_t tokens, int64_t count) const {
        std::vector<Choice> choices;
        std::vector<int64_t> order(count);
        const int64_t chosen = std::min(top_k, count);
        for (int64_t token = 0; token < tokens; token++) {
            const float* own = logits + token * count;
            for (int64_t expert = 0; expert < count; expert++) order[expert] = expert;
            const auto logit = [own](int64_t expert) { return std::isnan(own[expert]) ? -INFINITY : own[expert]; };
            std::partial_sort(order.begin(), order.begin() + chosen, order.end(), [logit](int64_t a, int64_t b) {
                return logit(a) > logit(b) || (logit(a) == logit(b) && a < b);
            });
            for (int64_t rank = 0; rank < chosen; rank++) {
                const int64_t expert = order[rank] - first_expert;
                if (expert < 0 || expert >= experts) continue;
                choices.push_back({expert, token, token * top_k + rank, 1 / (1 + std::exp(-own[order[rank]]))});
            }
        }
        std::stable_sort(choices.begin(), choices.end(),
                         [](const Choice& a, const Choice& b) { return a.expert < b.expert; });
        return choices;
    }
};

// One op for each type of cache: ONNX Runtime wants to know what an output's type is.
template <ort::Type CACHE>
struct GroupedQueryAttention {
    static constexpr const char* NAME = "GroupedQueryAttention";
    static constexpr size_t INPUTS = 9, NEEDED = 6, OUTPUTS = 3;

    static ort::Type input_type(size_t index) {
        if (index == 3 || index == 4) return CACHE;
        return index == 5 ? ort::Type::int32 : ort::Type::float32;
    }
    static ort::Type output_type(size_t index) { return index ? CACHE : ort::Type::float32; }

    Attention settings{};

    GroupedQueryAttention(const Runtime& runtime, const ort::Info* info) {
        settings.cache = cached(runtime.attribute(info, "cache_bits"));
        settings.heads = runtime.attribute(info, "heads");
        settings.kv_heads = runtime.attribute(info, "kv_heads");
        settings.chunk = runtime.attribute(info, "chunk");
        settings.scale = runtime.attribute<float>(info, "scale");
        settings.qk_norm_eps = runtime.attribute<float>(info, "qk_norm_eps");
        settings.temperature_scale = runtime.attribute<float>(info, "temperature_scale");
        settings.temperature_floor = runtime.attribute<float>(info, "temperature_floor");
    }

    void compute(const Call& call) const {
        const Tensor query = call.input(0), key = call.input(1), value = call.input(2), past = call.input(5);
        Attention own = settings;
        own.batch = query.shape[0], own.length = query.shape[1], own.head_dim = query.shape[2] / own.heads;
        if (own.head_dim > MOST_DIMS) call.runtime.fail("arriero.cpu: heads of more than 512 dimensions");
        own.query = query.floats(), own.key = key.floats(), own.value = value.floats();
        own.past = static_cast<const int32_t*>(past.data);
        own.inv_freq = call.input(6).floats(), own.key_scale = call.input(7).floats(),
        own.value_scale = call.input(8).floats();
        own.output = call.output(query.shape);
        own.key_cache = cache(call, 3, own), own.value_cache = cache(call, 4, own);
        if (own.batch * own.length == 0) return;
        for (int64_t row = 0; row < own.batch; row++)
            if (own.past[row] < 0 || own.slot(row) + own.length > own.capacity)
                call.runtime.fail("arriero.cpu: a piece does not fit the slots that its cache has left");
        own.queries = buffers().queries.take<float>(query.size());
        call.in_parallel(own.batch * own.length,
                         [&](int64_t token) { kernels().enter(own, token / own.length, token % own.length); });
        const int64_t at_once = std::max<int64_t>(1, TILE_ROWS / (own.heads / own.kv_heads));
        const int64_t tiles = divided_up(own.length, at_once);
        call.in_parallel(own.batch * own.kv_heads * tiles, [&](int64_t unit) {
            const int64_t first = unit % tiles * at_once, head = unit / tiles % own.kv_heads,
                          row = unit / tiles / own.kv_heads;
            kernels().attend(own, row, head, first, std::min(at_once, own.length - first), buffers().attention);
        });
    }

   private:
    // A cache as the op leaves it: its past, which it usually is already.
    static uint8_t* cache(const Call& call, size_t input, Attention& own) {
        const Tensor past = call.input(input);
        own.capacity = past.shape[2];
        if (past.shape[3] != (CACHE == ort::Type::uint8 ? own.slot_size() : own.head_dim))
            call.runtime.fail("arriero.cpu: a cache's slots are not of the size that they should have");
        auto* present = call.output<uint8_t>(past.shape, input - 2);
        const int64_t size = past.shape[0] * past.shape[1] * own.capacity * own.slot_size();
        if (present != past.data) std::memcpy(present, past.data, size);
        return present;
    }

    static Cached cached(int64_t bits) {
        switch (CACHE) {
            case ort::Type::float32: return Cached::float32;
            case ort::Type::float16: return Cached::float16;
            case ort::Type::int8: return Cached::int8;
            case ort::Type::e4m3: return Cached::e4m3;
            default: return bits == 4 ? Cached::groups4 : Cached::groups8;
        }
    }
};

template <typename Kernel>
struct Held {
    Runtime runtime;
    Kernel kernel;
};

// Runs code that may throw where ONNX Runtime takes a status.
template <typename Code>
ort::Status* guarded(const ort::Interface& interface, const Code& code) {
    try {
        code();
    } catch (const Failure& failure) {
        return failure.status;
    } catch (const std::exception& error) {
        return interface.failure(error.what());
    }
    return nullptr;
}

template <typename Kernel>
const ort::CustomOp* described() {
    static const ort::CustomOp op = [] {
        ort::CustomOp made{};
        made.interface = ort::INTERFACE;
        made.name = [](const ort::CustomOp*) { return Kernel::NAME; };
        made.provider = [](const ort::CustomOp*) -> const char* { return nullptr; };
        made.input_count = [](const ort::CustomOp*) { return Kernel::INPUTS; };
        made.input_type = [](const ort::CustomOp*, size_t index) { return Kernel::input_type(index); };
        made.output_count = [](const ort::CustomOp*) { return Kernel::OUTPUTS; };
        made.output_type = [](const ort::CustomOp*, size_t index) { return Kernel::output_type(index); };
        made.input_presence = [](const ort::CustomOp*, size_t index) {
            return index < Kernel::NEEDED ? ort::Presence::required : ort::Presence::optional;
        };
        made.output_presence = [](const ort::CustomOp*, size_t) { return ort::Presence::required; };
        made.input_memory = [](const ort::CustomOp*, size_t) { return 0; };
        for (auto& variadic : made.variadic) variadic = [](const ort::CustomOp*) { return 1; };
        made.start_version = [](const ort::CustomOp*) { return 1; };
        made.end_version = [](const ort::CustomOp*) { return 1; };
        made.create_kernel_or_fail = [](const ort::CustomOp*, const ort::Interface* interface, const ort::Info* info,
                                        void** kernel) {
            return guarded(*interface, [&] {
                const Runtime runtime{*interface};
                *kernel = new Held<Kernel>{runtime, Kernel(runtime, info)};
            });
        };
        made.compute_or_fail = [](void* kernel, ort::Context* context) {
            const auto& held = *static_cast<Held<Kernel>*>(kernel);
            return guarded(held.runtime.interface, [&] { held.kernel.compute({held.runtime, context}); });
        };
        made.destroy_kernel = [](void* kernel) { delete static_cast<Held<Kernel>*>(kernel); };
        return made;
    }();
    return &op;
}

}  // namespace

extern "C" __attribute__((visibility("default"))) ort::Status* RegisterCustomOps(ort::SessionOptions* options,
                                                                                 const ort::Base* base) {
    const ort::Interface* interface = base->interface(ort::INTERFACE);
    if (!interface) return nullptr;  // ONNX Runtime has said that it is too old
    return guarded(*interface, [&] {
        const Runtime runtime{*interface};
        ort::Domain* domain = nullptr;  // lives as long as the process, like the ops
        runtime.check(interface->create_domain("arriero.cpu", &domain));
        runtime.check(interface->add_to_domain(domain, described<Linear>()));
        runtime.check(interface->add_to_domain(domain, described<MoeDispatch>()));
        runtime.check(interface->add_to_domain(domain, described<GroupedQueryAttention<ort::Type::float32>>()));
        runtime.check(interface->add_to_domain(domain, described<GroupedQueryAttention<ort::Type::float16>>()));
        runtime.check(interface->add_to_domain(domain, described<GroupedQueryAttention<ort::Type::int8>>()));
        runtime.check(interface->add_to_domain(domain, described<GroupedQueryAttention<ort::Type::e4m3>>()));
        runtime.check(interface->add_to_domain(domain, described<GroupedQueryAttention<ort::Type::uint8>>()));
        runtime.check(interface->add_domain(options, domain));
    });
}
