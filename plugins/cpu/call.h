// ONNX Runtime as a kernel asks it, in terms of C++: attributes, tensors, threads. A refusal is thrown.

#pragma once

#include <atomic>
#include <memory>
#include <vector>

#include "onnxruntime.h"

// A failure of ONNX Runtime's on its way through the code that asked.
struct Failure {
    ort::Status* status;
};

// ONNX Runtime's interface, with refusals thrown.
struct Runtime {
    const ort::Interface& interface;

    void check(ort::Status* status) const {
        if (status) throw Failure{status};
    }
    [[noreturn]] void fail(const char* message) const { throw Failure{interface.failure(message)}; }
    template <typename Value = int64_t>
    Value attribute(const ort::Info* info, const char* name) const {
        Value value = 0;
        check(interface.attribute(info, name, &value));
        return value;
    }
};

// A tensor's shape, type and data; `data` is null for an input that is not given.
struct Tensor {
    const void* data = nullptr;
    std::vector<int64_t> shape;
    ort::Type type = ort::Type::any;

    const float* floats() const { return static_cast<const float*>(data); }
    int64_t size() const {
        int64_t count = data ? 1 : 0;
        for (const int64_t dimension : shape) count *= dimension;
        return count;
    }
};

// One call of a kernel.
struct Call {
    Runtime runtime;
    ort::Context* context;

    Tensor input(size_t index) const {
        size_t count = 0;
        runtime.check(runtime.interface.input_count(context, &count));
        const ort::Value* value = nullptr;
        if (index < count) runtime.check(runtime.interface.input(context, index, &value));
        Tensor tensor;
        if (!value) return tensor;
        ort::TensorInfo* made = nullptr;
        runtime.check(runtime.interface.tensor_info(value, &made));
        const auto released = [this](ort::TensorInfo* info) { runtime.interface.release(info); };
        const std::unique_ptr<ort::TensorInfo, decltype(released)> info(made, released);
        size_t rank = 0;
        runtime.check(runtime.interface.rank(info.get(), &rank));
        tensor.shape.resize(rank);
        runtime.check(runtime.interface.dimensions(info.get(), tensor.shape.data(), rank));
        runtime.check(runtime.interface.element_type(info.get(), &tensor.type));
        void* data = nullptr;
        runtime.check(runtime.interface.data(const_cast<ort::Value*>(value), &data));
        tensor.data = data;
        return tensor;
    }

    template <typename Value = float>
    Value* output(const std::vector<int64_t>& shape, size_t index = 0) const {
        ort::Value* value = nullptr;
        runtime.check(runtime.interface.output(context, index, shape.data(), shape.size(), &value));
        void* data = nullptr;
        runtime.check(runtime.interface.data(value, &data));
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
        if (job.has_failed) runtime.fail("arriero.cpu: there is not enough memory");
    }
};
