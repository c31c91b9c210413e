// The part of ONNX Runtime's C interface that a library of custom ops needs, declared anew: wheels bring no headers.
//
// The interface is a table of functions that grows at its end only, so a function is known by its place. The places are
// those of `onnxruntime_c_api.h` (versions 1.18 and later); a runtime that is older refuses `INTERFACE`.

#pragma once

#include <cstddef>
#include <cstdint>

namespace ort {

constexpr uint32_t INTERFACE = 18;

struct Status;
struct Value;
struct Context;
struct Info;
struct Domain;
struct SessionOptions;
struct TensorInfo;

enum class Type : int {
    any = 0,
    float32 = 1,
    uint8 = 2,
    int8 = 3,
    int32 = 6,
    int64 = 7,
    float16 = 10,
    bfloat16 = 16,
    e4m3 = 17
};
enum class Presence : int { required = 0, optional = 1 };

using Function = void (*)();

struct Interface {
    Function at[512];

    template <typename Signature>
    Signature* function(int place) const {
        return reinterpret_cast<Signature*>(at[place]);
    }

    Status* failure(const char* message) const { return function<Status*(int, const char*)>(0)(1, message); }
    Status* create_domain(const char* name, Domain** made) const {
        return function<Status*(const char*, Domain**)>(26)(name, made);
    }
    Status* add_to_domain(Domain* domain, const struct CustomOp* op) const {
        return function<Status*(Domain*, const struct CustomOp*)>(27)(domain, op);
    }
    Status* add_domain(SessionOptions* options, Domain* domain) const {
        return function<Status*(SessionOptions*, Domain*)>(28)(options, domain);
    }
    Status* data(Value* value, void** found) const { return function<Status*(Value*, void**)>(51)(value, found); }
    Status* element_type(const TensorInfo* info, Type* found) const {
        return function<Status*(const TensorInfo*, Type*)>(60)(info, found);
    }
    Status* rank(const TensorInfo* info, size_t* found) const {
        return function<Status*(const TensorInfo*, size_t*)>(61)(info, found);
    }
    Status* dimensions(const TensorInfo* info, int64_t* found, size_t count) const {
        return function<Status*(const TensorInfo*, int64_t*, size_t)>(62)(info, found, count);
    }
    Status* tensor_info(const Value* value, TensorInfo** made) const {
        return function<Status*(const Value*, TensorInfo**)>(65)(value, made);
    }
    Status* attribute(const Info* info, const char* name, float* found) const {
        return function<Status*(const Info*, const char*, float*)>(85)(info, name, found);
    }
    Status* attribute(const Info* info, const char* name, int64_t* found) const {
        return function<Status*(const Info*, const char*, int64_t*)>(86)(info, name, found);
    }
    Status* input_count(const Context* context, size_t* found) const {
        return function<Status*(const Context*, size_t*)>(88)(context, found);
    }
    Status* input(const Context* context, size_t index, const Value** found) const {
        return function<Status*(const Context*, size_t, const Value**)>(90)(context, index, found);
    }
    Status* output(Context* context, size_t index, const int64_t* shape, size_t rank, Value** made) const {
        return function<Status*(Context*, size_t, const int64_t*, size_t, Value**)>(91)(context, index, shape, rank,
                                                                                        made);
    }
    void release(Status* status) const { function<void(Status*)>(93)(status); }
    void release(TensorInfo* info) const { function<void(TensorInfo*)>(99)(info); }
    Status* constant_input(const Info* info, size_t index, int* is_constant, const Value** value) const {
        return function<Status*(const Info*, size_t, int*, const Value**)>(249)(info, index, is_constant, value);
    }
    Status* run_in_parallel(const Context* context, void (*work)(void*, size_t), size_t count, void* of) const {
        using Signature = Status*(const Context*, void (*)(void*, size_t), size_t, size_t, void*);
        return function<Signature>(274)(context, work, count, 0, of);
    }
};

struct Base {
    const Interface* (*interface)(uint32_t version);
    const char* (*version)();
};

// The description of an op: plain functions that are given the description itself.
struct CustomOp {
    uint32_t interface;
    void* (*create_kernel)(const CustomOp*, const Interface*, const Info*);
    const char* (*name)(const CustomOp*);
    const char* (*provider)(const CustomOp*);
    Type (*input_type)(const CustomOp*, size_t);
    size_t (*input_count)(const CustomOp*);
    Type (*output_type)(const CustomOp*, size_t);
    size_t (*output_count)(const CustomOp*);
    void (*compute)(void*, Context*);
    void (*destroy_kernel)(void*);
    Presence (*input_presence)(const CustomOp*, size_t);
    Presence (*output_presence)(const CustomOp*, size_t);
    int (*input_memory)(const CustomOp*, size_t);
    int (*variadic[4])(const CustomOp*);
    Status* (*create_kernel_or_fail)(const CustomOp*, const Interface*, const Info*, void**);
    Status* (*compute_or_fail)(void*, Context*);
    Status* (*infer_shapes)(const CustomOp*, void*);
    int (*start_version)(const CustomOp*);
    int (*end_version)(const CustomOp*);
    size_t (*may_be_in_place)(int**, int**);
    void (*release_in_place)(int*, int*);
    size_t (*aliases)(int**, int**);
    void (*release_aliases)(int*, int*);
};

}  // namespace ort
