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

#define ARRIERO_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define ARRIERO_BEGIN(target_set) \
    ARRIERO_PRAGMA(clang attribute push(__attribute__((target(target_set))), apply_to = function))
#define ARRIERO_END _Pragma("clang attribute pop")
#else
#define ARRIERO_BEGIN(target_set) _Pragma("GCC push_options") ARRIERO_PRAGMA(GCC target(target_set))
#define ARRIERO_END _Pragma("GCC pop_options")
#endif

#define ARRIERO_SET 0
namespace any_processor {
#include "set.h"
}
#undef ARRIERO_SET

#if defined(__x86_64__)
#define ARRIERO_SET 1
ARRIERO_BEGIN("avx2,fma,f16c")
namespace avx2 {
#include "set.h"
}
ARRIERO_END
#undef ARRIERO_SET

#define ARRIERO_SET 2
ARRIERO_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")
namespace avx512 {
#include "set.h"
}
ARRIERO_END

#define ARRIERO_PAIRS 1
ARRIERO_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi,avx512bf16,avx2,fma,f16c")
namespace avx512_bf16 {
#include "vectors.h"
#include "plain_products.h"
#include "turned_products.h"
#include "fp8_products.h"
constexpr PairKernels PAIRS = {round_fp8, multiply_plain};
}
ARRIERO_END
#undef ARRIERO_PAIRS
#undef ARRIERO_SET
#elif defined(__aarch64__) && defined(__linux__)
#define ARRIERO_SET 3
#if defined(__clang__)
ARRIERO_BEGIN("dotprod")
#else
ARRIERO_BEGIN("arch=armv8.2-a+dotprod")
#endif
namespace dotprod {
#include "set.h"
}
ARRIERO_END
#undef ARRIERO_SET
#endif

// The best that the processor has, or what ARRIERO_INSTRUCTION_SET asks for less: `avx512`, `avx2`, or `any`.
inline const Kernels& kernels() {
    static const Kernels& best = []() -> const Kernels& {
        const char* asked = std::getenv("ARRIERO_INSTRUCTION_SET");
        [[maybe_unused]] const std::string most = asked ? asked : "avx512_bf16";
#if defined(__x86_64__)
        const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
        const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512dq");
        if (most == "avx512_bf16" && has_avx512 && __builtin_cpu_supports("avx512bf16") &&
            __builtin_cpu_supports("avx512vbmi")) {
            static const Kernels with_pairs = [] {
                Kernels made = avx512::KERNELS;
                made.pairs = avx512_bf16::PAIRS;
                return made;
            }();
            return with_pairs;
        }
        if ((most == "avx512" || most == "avx512_bf16") && has_avx512) return avx512::KERNELS;
        if (most != "any" && has_avx2) return avx2::KERNELS;
#elif defined(__aarch64__) && defined(__linux__)
        if (most != "any" && getauxval(AT_HWCAP) & HWCAP_ASIMDDP) return dotprod::KERNELS;
#endif
        return any_processor::KERNELS;
    }();
    return best;
}
