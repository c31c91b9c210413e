// A runtime for the library's ops without ONNX Runtime: as much of its interface as `onnxruntime.h` declares, over
// tensors of exactly the memory that they need, so that a sanitizer sees each byte beyond them.

#pragma once

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "../../../plugins/cpu/all_reduce_op.h"
#include "../../../plugins/cpu/onnxruntime.h"

extern "C" ort::Status* RegisterCustomOps(ort::SessionOptions* options, const ort::Base* base);

namespace ort {

struct Status {
    std::string message;
};

struct Value {
    Type type;
    std::vector<int64_t> dims;
    void* data = nullptr;

    Value(Type type, std::vector<int64_t> dims) : type(type), dims(std::move(dims)) {
        // As aligned as memory that ranks share must be.
        if (size() && posix_memalign(&data, 128, size())) throw std::bad_alloc();
    }
    Value(const Value&) = delete;
    Value& operator=(const Value&) = delete;
    ~Value() { std::free(data); }

    size_t count() const {
        size_t made = 1;
        for (const int64_t size : dims) made *= size;
        return made;
    }
    size_t size() const { return (count() * bits() + 7) / 8; }
    int bits() const {
        switch (static_cast<int>(type)) {
            case 1:
            case 6:
            case 12: return 32;
            case 7:
            case 11:
            case 13:
            case 14: return 64;
            case 4:
            case 5:
            case 10:
            case 16: return 16;
            case 15: return 128;
            case 21:
            case 22:
            case 23: return 4;
            default: return 8;
        }
    }
};

struct TensorInfo {
    const Value* of;
};
struct Info {
    std::map<std::string, int64_t> integers;
    std::map<std::string, float> numbers;
    std::set<size_t> constants;  // places of inputs that are initializers
};
struct Context {
    std::vector<std::unique_ptr<Value>> inputs;
    std::vector<std::unique_ptr<Value>> outputs;
    std::vector<Type> output_types;
    int output_byte = 0;  // outputs are full of it before they are written
    size_t threads = 1;
    bool in_place = false;  // whether caches are written where they were read
};
struct Domain {
    std::vector<const CustomOp*> ops;
};

inline Domain& domain() {
    static Domain only;
    return only;
}

// Does all indices' work, on some threads of its own.
inline void run_parallel(size_t threads, void (*work)(void*, size_t), size_t count, void* of) {
    std::atomic<size_t> next{0};
    const auto some = [&] {
        for (size_t index; (index = next++) < count;) work(of, index);
    };
    std::vector<std::thread> running;
    for (size_t i = 1; i < std::min(threads, count); i++) running.emplace_back(some);
    some();
    for (std::thread& each : running) each.join();
}

inline Value* output(Context* context, size_t index, const int64_t* dims, size_t rank) {
    const std::vector<int64_t> shape(dims, dims + rank);
    if (context->in_place && index && context->inputs[index + 2]->dims == shape)
        return context->inputs[index + 2].get();
    auto& made = context->outputs[index];
    made = std::make_unique<Value>(context->output_types[index], shape);
    if (made->data) std::memset(made->data, context->output_byte, made->size());
    return made.get();
}

template <typename Held, typename Found>
Status* find(const std::map<std::string, Held>& all, const char* name, Found* found) {
    const auto at = all.find(name);
    if (at == all.end()) return new Status{"no attribute"};
    *found = at->second;
    return nullptr;
}

template <typename Signature>
void put(Interface& table, int place, Signature* function) {
    table.at[place] = reinterpret_cast<Function>(function);
}

inline const Interface& interface() {
    static const Interface table = [] {
        Interface made{};
        put<Status*(int, const char*)>(made, 0, [](int, const char* text) { return new Status{text}; });
        put<Status*(const char*, Domain**)>(made, 26, [](const char*, Domain** found) -> Status* {
            *found = &domain();
            return nullptr;
        });
        put<Status*(Domain*, const CustomOp*)>(made, 27, [](Domain* to, const CustomOp* op) -> Status* {
            to->ops.push_back(op);
            return nullptr;
        });
        put<Status*(SessionOptions*, Domain*)>(made, 28, [](SessionOptions*, Domain*) -> Status* { return nullptr; });
        put<Status*(Value*, void**)>(made, 51, [](Value* value, void** found) -> Status* {
            *found = value->data;
            return nullptr;
        });
        put<Status*(const TensorInfo*, Type*)>(made, 60, [](const TensorInfo* info, Type* found) -> Status* {
            *found = info->of->type;
            return nullptr;
        });
        put<Status*(const TensorInfo*, size_t*)>(made, 61, [](const TensorInfo* info, size_t* found) -> Status* {
            *found = info->of->dims.size();
            return nullptr;
        });
        put<Status*(const TensorInfo*, int64_t*, size_t)>(
            made, 62, [](const TensorInfo* info, int64_t* found, size_t count) -> Status* {
                for (size_t i = 0; i < count; i++) found[i] = info->of->dims[i];
                return nullptr;
            });
        put<Status*(const Value*, TensorInfo**)>(made, 65, [](const Value* value, TensorInfo** found) -> Status* {
            *found = new TensorInfo{value};
            return nullptr;
        });
        put<Status*(const Info*, const char*, float*)>(made, 85, [](const Info* info, const char* name, float* found) {
            return find(info->numbers, name, found);
        });
        put<Status*(const Info*, const char*, int64_t*)>(
            made, 86,
            [](const Info* info, const char* name, int64_t* found) { return find(info->integers, name, found); });
        put<Status*(const Context*, size_t*)>(made, 88, [](const Context* context, size_t* found) -> Status* {
            *found = context->inputs.size();
            return nullptr;
        });
        put<Status*(const Context*, size_t, const Value**)>(
            made, 90, [](const Context* context, size_t index, const Value** found) -> Status* {
                *found = context->inputs[index].get();
                return nullptr;
            });
        put<Status*(Context*, size_t, const int64_t*, size_t, Value**)>(
            made, 91, [](Context* context, size_t index, const int64_t* dims, size_t rank, Value** found) -> Status* {
                *found = output(context, index, dims, rank);
                return nullptr;
            });
        put<Status*(const Info*, size_t, int*, const Value**)>(
            made, 249, [](const Info* info, size_t index, int* is_constant, const Value** found) -> Status* {
                *is_constant = info->constants.count(index) > 0;
                *found = nullptr;
                return nullptr;
            });
        put<void(Status*)>(made, 93, [](Status* status) { delete status; });
        put<void(TensorInfo*)>(made, 99, [](TensorInfo* info) { delete info; });
        put<Status*(const Context*, void (*)(void*, size_t), size_t, size_t, void*)>(
            made, 274,
            [](const Context* context, void (*work)(void*, size_t), size_t count, size_t, void* of) -> Status* {
                run_parallel(context->threads, work, count, of);
                return nullptr;
            });
        return made;
    }();
    return table;
}

// The library's ops, in the order in which it gives them.
inline const std::vector<const CustomOp*>& ops() {
    static const bool is_done = [] {
        const Base base{[](uint32_t) { return &interface(); }, nullptr};
        if (RegisterCustomOps(nullptr, &base)) throw std::runtime_error("no ops");
        return true;
    }();
    static_cast<void>(is_done);
    return domain().ops;
}

// A kernel of an op; what it refuses is thrown.
struct Kernel {
    const CustomOp* op;
    void* held = nullptr;

    Kernel(const CustomOp* op, const Info& info) : op(op) {
        check(op->create_kernel_or_fail(op, &interface(), &info, &held));
    }
    Kernel(const Kernel&) = delete;
    Kernel& operator=(const Kernel&) = delete;
    ~Kernel() { op->destroy_kernel(held); }

    void compute(Context& context) const {
        context.outputs.resize(op->output_count(op));
        for (size_t i = 0; i < context.outputs.size(); i++) context.output_types.push_back(op->output_type(op, i));
        check(op->compute_or_fail(held, &context));
    }

   private:
    static void check(Status* status) {
        if (!status) return;
        const std::unique_ptr<Status> owned(status);
        throw std::runtime_error(owned->message);
    }
};

}  // namespace ort
