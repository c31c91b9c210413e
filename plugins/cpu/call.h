// ONNX Runtime as a kernel asks it, in terms of C++: attributes, tensors, threads. A refusal is thrown.

#pragma once

#include <atomic>
#include <cmath>
#include <memory>
#include <new>

#include "checks.h"

// A failure of ONNX Runtime's on its way through the code that asked.
struct Failure {
    ort::Status* status;
};

// ONNX Runtime's interface, with failures thrown.
struct Runtime {
    const ort::Interface& interface;

    void check(ort::Status* status) const {
        if (status) throw Failure{status};
    }
};

// A node's attributes, each of the values that it may have.
struct Settings {
    Runtime runtime;
    const ort::Info* info;

    int64_t integer(const char* name, int64_t least, int64_t most = MOST) const {
        const auto value = attribute<int64_t>(name, "integer");
        if (value < least || value > most)
            refuse(name, std::to_string(value), "from " + std::to_string(least) + " to " + std::to_string(most));
        return value;
    }
    int64_t one_of(const char* name, std::initializer_list<int64_t> possible) const {
        const auto value = attribute<int64_t>(name, "integer");
        std::string all;
        for (const int64_t each : possible) {
            if (value == each) return value;
            all += (all.empty() ? "" : " or ") + std::to_string(each);
        }
        refuse(name, std::to_string(value), all);
    }
    // Inputs that share a scale; 0 is all of them.
    int64_t group(const char* name) const {
        const int64_t value = integer(name, 0);
        if (value % 8) refuse(name, std::to_string(value), "a multiple of 8");
        return value;
    }
    float number(const char* name, float least = -INFINITY) const {
        const auto value = attribute<float>(name, "float");
        if (!std::isfinite(value) || value < least)
            refuse(name, written(value), least == 0 ? "finite and not negative" : "finite");
        return value;
    }
    float positive(const char* name) const {
        const float value = number(name);
        if (value <= 0) refuse(name, written(value), "positive");
        return value;
    }

    // Whether an input is an initializer that no caller may replace.
    bool is_constant(size_t index) const {
        int is_constant = 0;
        const ort::Value* value = nullptr;
        runtime.check(runtime.interface.constant_input(info, index, &is_constant, &value));
        return is_constant;
    }

    [[noreturn]] static void refuse(const char* name, const std::string& found, const std::string& needed) {
        throw Refusal("attribute " + (name + (" is " + found)) + ", and must be " + needed);
    }

   private:
    template <typename Value>
    Value attribute(const char* name, const char* kind) const {
        Value value = 0;
        if (ort::Status* status = runtime.interface.attribute(info, name, &value)) {
            runtime.interface.release(status);
            throw Refusal("attribute " + (name + (" is missing, or no " + std::string(kind))));
        }
        return value;
    }
};

// One call of a kernel.
struct Call {
    Runtime runtime;
    ort::Context* context;
    const char* const* names;  // of the inputs
    size_t needed;             // as many of the inputs, the first ones, must be given

    Tensor input(size_t index) const {
        Tensor tensor;
        tensor.name = names[index];
        size_t count = 0;
        runtime.check(runtime.interface.input_count(context, &count));
        const ort::Value* value = nullptr;
        if (index < count) runtime.check(runtime.interface.input(context, index, &value));
        if (!value && index < needed) tensor.refuse("is not given");
        if (!value) return tensor;
        tensor.is_given = true;
        ort::TensorInfo* made = nullptr;
        runtime.check(runtime.interface.tensor_info(value, &made));
        const auto released = [this](ort::TensorInfo* info) { runtime.interface.release(info); };
        const std::unique_ptr<ort::TensorInfo, decltype(released)> info(made, released);
        size_t& rank = tensor.shape.rank;
        runtime.check(runtime.interface.rank(info.get(), &rank));
        if (rank > Shape::MOST_DIMS) tensor.refuse("has " + std::to_string(rank) + " dimensions, and may have 8");
        runtime.check(runtime.interface.dimensions(info.get(), tensor.shape.dims, rank));
        for (size_t i = 0; i < rank; i++)
            if (tensor.shape[i] < 0 || tensor.shape[i] > MOST)
                tensor.refuse("has a dimension of " + std::to_string(tensor.shape[i]));
        runtime.check(runtime.interface.element_type(info.get(), &tensor.type));
        void* data = nullptr;
        runtime.check(runtime.interface.data(const_cast<ort::Value*>(value), &data));
        tensor.data = data;
        return tensor;
    }

    template <typename Value = float>
    Value* output(const Shape& shape, size_t index = 0) const {
        ort::Value* value = nullptr;
        runtime.check(runtime.interface.output(context, index, shape.dims, shape.rank, &value));
        if (!value) throw Refusal("output " + std::to_string(index) + " is left out, and must have a name");
        void* data = nullptr;
        runtime.check(runtime.interface.data(value, &data));
        if (reinterpret_cast<uintptr_t>(data) % alignof(Value))
            throw Refusal("output " + std::to_string(index) + " lies at an address that is no multiple of " +
                          std::to_string(alignof(Value)));
        return static_cast<Value*>(data);
    }

    // Does `work(index)` for all indices below `count`, on ONNX Runtime's own threads.
    template <typename Work>
    void in_parallel(int64_t count, const Work& work) const {
        if (count == 1) return work(0);
        struct Job {
            const Work& work;
            std::atomic<bool> has_failed{false};
        } job{work};
        const auto one = [](void* of, size_t index) {
            auto& own = *static_cast<Job*>(of);
            try {
                own.work(static_cast<int64_t>(index));
            } catch (...) {  // nothing may leave a thread of ONNX Runtime's
                own.has_failed = true;
            }
        };
        runtime.check(runtime.interface.run_in_parallel(context, one, count, &job));
        if (job.has_failed) throw std::bad_alloc();
    }
};
