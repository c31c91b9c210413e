// Sixteen lanes of float or int32, and what one register holds of them.
//
// Included once for each instruction set, within its own namespace: the compiler makes of a vector what the set has.
// Only where intrinsics stand, and where loops have to keep vectors in registers, matters which one that is.

constexpr int64_t LANES = 16;

// Where what is read next is asked to: the second cache, for a compiler. The requests that the first can have under way
// are few, and memory would wait for them.
constexpr int NEAR = 2;

using Floats = float __attribute__((vector_size(64)));
using Ints = int32_t __attribute__((vector_size(64)));
using Words = uint32_t __attribute__((vector_size(64)));
using Bytes = uint8_t __attribute__((vector_size(64)));

template <typename Vector>
inline Vector load(const void* from) {
    Vector vector;
    std::memcpy(&vector, from, sizeof vector);
    return vector;
}

template <typename Vector>
inline void store(void* to, Vector vector) {
    std::memcpy(to, &vector, sizeof vector);
}

// What one register holds.
#if ARRIERO_SET == 2
using Part = Floats;
#elif ARRIERO_SET == 1
using Part = float __attribute__((vector_size(32)));
#else
using Part = float __attribute__((vector_size(16)));
#endif
constexpr int64_t PART_LANES = sizeof(Part) / sizeof(float);
using PartInts = int32_t __attribute__((vector_size(sizeof(Part))));

inline Part part_of(float value) { return value - Part{}; }
inline Floats all(float value) { return value - Floats{}; }
inline Ints all(int32_t value) { return value - Ints{}; }
// Rounded to whole numbers, ties to even; up to 2^22: what is added to 1.5 * 2^23 is rounded so.
template <typename Vector>
inline Vector to_whole(Vector x) {
    return (x + 12582912.0f) - 12582912.0f;
}

inline Floats as_floats(Ints values) { return __builtin_convertvector(values, Floats); }
inline Floats bits_as_floats(Words bits) { return reinterpret_cast<Floats>(bits); }

// Sixteen signed bytes or unsigned words as 32 bits, and back; compilers make single ones of `__builtin_convertvector`.
using Small = int8_t __attribute__((vector_size(16)));
using Halves = uint16_t __attribute__((vector_size(32)));
#if ARRIERO_SET == 2
inline Ints whole(Small bytes) {
    return reinterpret_cast<Ints>(_mm512_cvtepi8_epi32(reinterpret_cast<__m128i>(bytes)));
}
inline Small narrow(Ints values) {
    return reinterpret_cast<Small>(_mm512_cvtepi32_epi8(reinterpret_cast<__m512i>(values)));
}
inline Words whole(Halves words) {
    return reinterpret_cast<Words>(_mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(words)));
}
#else
inline Ints whole(Small bytes) { return __builtin_convertvector(bytes, Ints); }
inline Words whole(Halves words) { return __builtin_convertvector(words, Words); }
#endif

// The values of float16's bits, none of them infinite.
template <typename Values, typename Bits>
inline Values half_values(Bits bits) {
    // Exponent and mantissa at their places in a float32, and the exponents' biases, 15 and 127, made even.
    const Values magnitudes = reinterpret_cast<Values>((bits & 0x7FFFu) << 13) * 0x1p112f;
    const Values values = reinterpret_cast<Values>(reinterpret_cast<Bits>(magnitudes) | (bits & 0x8000u) << 16);
    return (bits & 0x7C00u) == 0x7C00u ? Values{} + NAN : values;
}

// Sixteen float16 values, none of them infinite, as float32.
inline Floats widen_half(Halves halves) {
#if ARRIERO_SET == 2
    return reinterpret_cast<Floats>(_mm512_cvtph_ps(reinterpret_cast<__m256i>(halves)));
#elif ARRIERO_SET == 1
    __m128i parts[2];
    std::memcpy(parts, &halves, sizeof parts);
    const __m256 wide[2] = {_mm256_cvtph_ps(parts[0]), _mm256_cvtph_ps(parts[1])};
    return load<Floats>(wide);
#else
    return half_values<Floats>(whole(halves));
#endif
}

// Sixteen bfloat16 values as float32.
inline Floats widen(const uint16_t* from) { return bits_as_floats(whole(load<Halves>(from)) << 16); }

// All lanes as one: each half onto the other, down to a single lane.
template <typename Vector, typename Operation>
inline auto folded(const Vector& lanes, const Operation& operation) {
    if constexpr (sizeof lanes == 64) {
        return folded(operation(__builtin_shufflevector(lanes, lanes, 0, 1, 2, 3, 4, 5, 6, 7),
                                __builtin_shufflevector(lanes, lanes, 8, 9, 10, 11, 12, 13, 14, 15)),
                      operation);
    } else if constexpr (sizeof lanes == 32) {
        return folded(operation(__builtin_shufflevector(lanes, lanes, 0, 1, 2, 3),
                                __builtin_shufflevector(lanes, lanes, 4, 5, 6, 7)),
                      operation);
    } else {
        const Vector pairs = operation(lanes, __builtin_shufflevector(lanes, lanes, 2, 3, 0, 1));
        return operation(pairs, __builtin_shufflevector(pairs, pairs, 1, 0, 3, 2))[0];
    }
}

template <typename Vector>
inline auto sum_of(const Vector& lanes) {
    return folded(lanes, [](auto a, auto b) { return a + b; });
}

template <typename Vector>
inline float largest_of(const Vector& lanes) {
    return folded(lanes, [](auto a, auto b) { return a > b ? a : b; });
}

// e to the power of each lane, to two units in the last place: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2].
inline Part exponential(Part x) {
    const Part low = part_of(-87.0f), high = part_of(88.0f);
    x = x < low ? low : x;
    x = x > high ? high : x;
    const Part whole = to_whole(x * 1.44269504f);
    const Part rest = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
    Part sum = part_of(1.0f / 5040);
    for (const float term : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) sum = sum * rest + term;
    const PartInts power = (__builtin_convertvector(whole, PartInts) + 127) << 23;
    return sum * reinterpret_cast<Part>(power);
}

#if ARRIERO_SET != 2
inline Floats exponential(Floats x) {
    Part parts[LANES / PART_LANES];
    std::memcpy(parts, &x, sizeof parts);
    for (Part& part : parts) part = exponential(part);
    return load<Floats>(parts);
}
#endif
