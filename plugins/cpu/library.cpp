// The ops of domain `arriero.cpu` for ONNX Runtime: attention, products with quantised matrices, and sums over ranks.
//
// Weights and scales lie as `matrix.h` says, and are read where they lie. Activations are rounded to int8: in blocks of
// 32 inputs by the largest of each, or by a static scale where one is given. A matrix of floats has no scale, and is
// multiplied with float32 activations.
//
// A graph is data: an op checks its attributes when its kernel is made, and all that a call gives it before it reads or
// writes any of it.

#include "all_reduce_op.h"
#include "fp8_linear_op.h"
#include "fp8_moe_op.h"
#include "gqa_op.h"
#include "linear_op.h"
#include "moe_op.h"
#include "plain_linear_op.h"
#include "plain_moe_op.h"

namespace {

template <typename Kernel>
struct Held {
    Runtime runtime;
    Kernel kernel;
};

// Runs code that may throw where ONNX Runtime takes a status, which begins with the op's name.
template <typename Code>
ort::Status* guarded(const ort::Interface& interface, const char* name, const Code& code) {
    const auto failed = [&](const char* why) {
        char message[512];
        std::snprintf(message, sizeof message, "arriero.cpu %s: %s", name, why);
        return interface.failure(message);
    };
    try {
        code();
    } catch (const Failure& failure) {
        return failure.status;
    } catch (const std::bad_alloc&) {
        return failed("there is not enough memory");
    } catch (const std::length_error&) {
        return failed("there is not enough memory");
    } catch (const std::exception& error) {
        return failed(error.what());
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
            return guarded(*interface, Kernel::NAME, [&] {
                const Runtime runtime{*interface};
                *kernel = new Held<Kernel>{runtime, Kernel(Settings{runtime, info})};
            });
        };
        made.compute_or_fail = [](void* kernel, ort::Context* context) {
            const auto& held = *static_cast<Held<Kernel>*>(kernel);
            return guarded(held.runtime.interface, Kernel::NAME,
                           [&] { held.kernel.compute({held.runtime, context, Kernel::INPUT_NAMES, Kernel::NEEDED}); });
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
    return guarded(*interface, "ops", [&] {
        const Runtime runtime{*interface};
        ort::Domain* domain = nullptr;  // lives as long as the process, like the ops
        runtime.check(interface->create_domain("arriero.cpu", &domain));
        runtime.check(interface->add_to_domain(domain, described<AllReduce>()));
        runtime.check(interface->add_to_domain(domain, described<Fp8Linear>()));
        runtime.check(interface->add_to_domain(domain, described<Fp8MoeDispatch>()));
        runtime.check(interface->add_to_domain(domain, described<Linear>()));
        runtime.check(interface->add_to_domain(domain, described<MoeDispatch>()));
        runtime.check(interface->add_to_domain(domain, described<PlainLinear>()));
        runtime.check(interface->add_to_domain(domain, described<PlainMoeDispatch>()));
        runtime.check(interface->add_to_domain(domain, described<GroupedQueryAttention<ort::Type::float32>>()));
        runtime.check(interface->add_to_domain(domain, described<GroupedQueryAttention<ort::Type::float16>>()));
        runtime.check(interface->add_to_domain(domain, described<GroupedQueryAttention<ort::Type::int8>>()));
        runtime.check(interface->add_to_domain(domain, described<GroupedQueryAttention<ort::Type::e4m3>>()));
        runtime.check(interface->add_to_domain(domain, described<GroupedQueryAttention<ort::Type::uint8>>()));
        runtime.check(interface->add_domain(options, domain));
    });
}
