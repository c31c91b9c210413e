// The kernels compiled for each instruction set, and the choice among them.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <string>
#include <type_traits>

#include "matrix.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#if defined(__linux__)
#include <sys/auxv.h>
#endif
#endif

#define ARRIERO_SET 0
namespace any_processor {
#include "vectors.h"
#include "kernels.h"
#include "attention.h"
constexpr Kernels KERNELS = {quantise, multiply, enter, attend};
}  // namespace any_processor
#undef ARRIERO_SET

#if defined(__x86_64__)
#define ARRIERO_SET 1
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
namespace avx2 {
#include "vectors.h"
#include "kernels.h"
#include "attention.h"
constexpr Kernels KERNELS = {quantise, multiply, enter, attend};
}  // namespace avx2
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef ARRIERO_SET

#define ARRIERO_SET 2
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")
#endif
namespace avx512 {
#include "vectors.h"
#include "kernels.h"
#include "attention.h"
constexpr Kernels KERNELS = {quantise, multiply, enter, attend};
}  // namespace avx512
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef ARRIERO_SET
#endif

#if defined(__aarch64__) && defined(__linux__)
#define ARRIERO_SET 3
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("dotprod"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("arch=armv8.2-a+dotprod")
#endif
namespace dotprod {
#include "vectors.h"
#include "kernels.h"
#include "attention.h"
constexpr Kernels KERNELS = {quantise, multiply, enter, attend};
}  // namespace dotprod
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef ARRIERO_SET
#endif

// The best that the processor has, or what ARRIERO_INSTRUCTION_SET asks for less: `avx2`, or `any`.
inline const Kernels& kernels() {
    static const Kernels& best = []() -> const Kernels& {
#if defined(__x86_64__)
        const char* asked = std::getenv("ARRIERO_INSTRUCTION_SET");
        const std::string most = asked ? asked : "avx512";
        const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
        if (most == "avx512" && has_avx2 && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512dq"))
            return avx512::KERNELS;
        if (most != "any" && has_avx2) return avx2::KERNELS;
#elif defined(__aarch64__) && defined(__linux__)
        const char* asked = std::getenv("ARRIERO_INSTRUCTION_SET");
        const bool is_any = asked && std::string(asked) == "any";
        if (!is_any && getauxval(AT_HWCAP) & HWCAP_ASIMDDP) return dotprod::KERNELS;
#endif
        return any_processor::KERNELS;
    }();
    return best;
}
