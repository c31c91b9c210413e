// Refusals: what a graph asks for and must not get, each in one line that names what was found and what is needed.

#pragma once

#include <cstdint>
#include <cstdio>
#include <initializer_list>
#include <stdexcept>
#include <string>

#include "onnxruntime.h"

// A refusal on its way to ONNX Runtime; the op's name is put in front of it there.
struct Refusal : std::runtime_error {
    using std::runtime_error::runtime_error;
};

constexpr int64_t MOST = int64_t{1} << 40;  // the largest size that an attribute or a dimension may have

// Dimensions as a message shows them; -1 stands for any.
inline std::string written(const int64_t* dims, size_t rank) {
    std::string text = "[";
    for (size_t i = 0; i < rank; i++) text += (i ? ", " : "") + (dims[i] < 0 ? "*" : std::to_string(dims[i]));
    return text + "]";
}

inline std::string written(float value) {
    char text[32];
    std::snprintf(text, sizeof text, "%g", static_cast<double>(value));
    return text;
}

inline std::string name_of(ort::Type type) {
    constexpr const char* NAMES[] = {"no type", "float32", "uint8",     "int8",       "uint16",   "int16",
                                     "int32",   "int64",   "string",    "bool",       "float16",  "float64",
                                     "uint32",  "uint64",  "complex64", "complex128", "bfloat16", "float8e4m3fn"};
    const auto index = static_cast<size_t>(type);
    return index < sizeof NAMES / sizeof *NAMES ? NAMES[index] : "type " + std::to_string(index);
}

// The product of sizes, none of them negative.
inline int64_t product(std::initializer_list<int64_t> sizes) {
    int64_t made = 1;
    for (const int64_t size : sizes)
        if (size == 0) return 0;
    for (const int64_t size : sizes)
        if (__builtin_mul_overflow(made, size, &made))
            throw Refusal("sizes of " + written(sizes.begin(), sizes.size()) + " are more than memory can hold");
    return made;
}

// Few dimensions, where they stand: a tensor's shape without memory of its own.
struct Shape {
    static constexpr size_t MOST_DIMS = 8;
    int64_t dims[MOST_DIMS] = {};
    size_t rank = 0;

    Shape() = default;
    Shape(std::initializer_list<int64_t> given) {
        for (const int64_t size : given) dims[rank++] = size;
    }
    int64_t operator[](size_t index) const { return dims[index]; }
    int64_t& back() { return dims[rank - 1]; }
    int64_t back() const { return dims[rank - 1]; }
};

// An input's shape, type and data. `data` may be null where one is given that has no elements.
struct Tensor {
    const char* name = "";
    bool is_given = false;
    const void* data = nullptr;
    Shape shape;
    ort::Type type = ort::Type::any;

    [[noreturn]] void refuse(const std::string& why) const { throw Refusal(name + (" " + why)); }

    // Refuses any other shape; of -1 any size is taken.
    void expect(std::initializer_list<int64_t> sizes) const {
        bool is_equal = shape.rank == sizes.size();
        const int64_t* own = shape.dims;
        if (is_equal)
            for (const int64_t size : sizes) {
                is_equal &= size < 0 || size == *own;
                own++;
            }
        if (!is_equal)
            refuse("has the shape " + written(shape.dims, shape.rank) + ", and needs " +
                   written(sizes.begin(), sizes.size()));
    }

    // The data, of exactly this type and where such values may lie; null where the input is not given.
    const float* floats() const { return values<float>(ort::Type::float32); }
    const int32_t* integers() const { return values<int32_t>(ort::Type::int32); }
    const uint8_t* bytes() const { return values<uint8_t>(ort::Type::uint8); }

    template <typename Value>
    const Value* values(ort::Type wanted) const {
        if (!is_given) return nullptr;
        if (type != wanted) refuse("is of " + name_of(type) + ", and must be of " + name_of(wanted));
        if (reinterpret_cast<uintptr_t>(data) % alignof(Value))
            refuse("lies at an address that is no multiple of " + std::to_string(alignof(Value)));
        return static_cast<const Value*>(data);
    }
};
