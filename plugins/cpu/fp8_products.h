// Products of rows rounded to E4M3 with a matrix of E4M3 as checkpoints hold it, an output's inputs side by side.
//
// Included once for each instruction set, within its own namespace, behind `turned_products.h`, whose sums these are. A
// product of two such values is exact in float32, and so is a value in bfloat16: where the processor adds up products of
// pairs of those (`ARRIERO_PAIRS`), two inputs lie in the place of one float. A row's scale and the outputs' are applied
// behind the sums.

#if ARRIERO_PAIRS
// The bits of a magnitude in bfloat16.
constexpr uint16_t as_bfloat16(int magnitude) {
    if (magnitude == 0x7F) return 0x7FC0;
    if (magnitude >= 8) return static_cast<uint16_t>((magnitude << 4) + (120 << 7));
    const int power = magnitude >= 4 ? 2 : magnitude >= 2 ? 1 : 0;
    return magnitude ? static_cast<uint16_t>((118 + power) << 7 | (magnitude - (1 << power)) << (7 - power)) : 0;
}

// Low bytes of all magnitudes, high ones, and of each two bytes the same of 32.
struct PairTables {
    uint8_t low[128] = {}, high[128] = {}, twice[64] = {};

    constexpr PairTables() {
        for (int i = 0; i < 128; i++) low[i] = as_bfloat16(i) & 0xFF, high[i] = as_bfloat16(i) >> 8;
        for (int i = 0; i < 64; i++) twice[i] = i / 2;
    }
};
alignas(LINE) constexpr PairTables PAIR_TABLES;

struct OfPairs {
    static Wide everywhere(float value) { return reinterpret_cast<Wide>(_mm512_set1_ps(value)); }
    static Wide added(Wide sums, Wide x, Wide weights) {
        return reinterpret_cast<Wide>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sums), reinterpret_cast<__m512bh>(x),
                                                       reinterpret_cast<__m512bh>(weights)));
    }
    using Sums = OfPairs;
    static constexpr int64_t BYTES = 64;  // as of `OfFloats`; these sums take longer
};

struct PairedE4m3 : OfPairs {
    static constexpr int64_t SIZE = 2;
    static Wide widened(const void* from) {
        const auto table = [](const uint8_t* half) { return load<__m512i>(half); };
        const __m512i twice = _mm512_permutexvar_epi8(table(PAIR_TABLES.twice),
                                                      _mm512_castsi256_si512(load<__m256i>(from)));
        const __m512i lows = _mm512_mask2_permutex2var_epi8(table(PAIR_TABLES.low), twice, 0x5555555555555555u,
                                                            table(PAIR_TABLES.low + 64));
        const __m512i both = _mm512_mask2_permutex2var_epi8(table(PAIR_TABLES.high), lows, 0xAAAAAAAAAAAAAAAAu,
                                                            table(PAIR_TABLES.high + 64));
        // The magnitudes, and the second of each two bytes' signs.
        return reinterpret_cast<Wide>(_mm512_ternarylogic_epi32(both, twice, _mm512_set1_epi16(-0x8000), 0xF8));
    }
};
#else
// A value is what is read times FACTOR, which the rows of float32 that meet it have in them.
struct PlainE4m3 : OfFloats {
    static constexpr int64_t SIZE = 1;
#if ARRIERO_SET == 2
    static constexpr float FACTOR = 256;  // read as float16, whose exponents' bias is 15 and not 7
    static Wide widened(const void* from) {
        const __m256i bytes = _mm256_cvtepi8_epi16(load<__m128i>(from));
        const __m256i halves = _mm256_and_si256(_mm256_slli_epi16(bytes, 7), _mm256_set1_epi16(-0x4080));
        const __m256i magnitude_bits = _mm256_set1_epi16(0x7F);
        const __mmask16 is_nan = _mm256_cmpeq_epi16_mask(_mm256_and_si256(bytes, magnitude_bits), magnitude_bits);
        const __m256i made = _mm256_mask_mov_epi16(halves, is_nan, _mm256_set1_epi16(0x7E00));
        return reinterpret_cast<Wide>(_mm512_cvtph_ps(made));
    }
#elif ARRIERO_SET == 1
    static constexpr float FACTOR = 256;
    static Wide widened(const void* from) {
        const __m128i bytes = _mm_cvtepi8_epi16(_mm_loadl_epi64(static_cast<const __m128i*>(from)));
        const __m128i halves = _mm_and_si128(_mm_slli_epi16(bytes, 7), _mm_set1_epi16(-0x4080));
        const __m128i is_nan = _mm_cmpeq_epi16(_mm_or_si128(bytes, _mm_set1_epi16(-0x80)), _mm_set1_epi16(-1));
        const __m128i made = _mm_or_si128(halves, _mm_and_si128(is_nan, _mm_set1_epi16(0x7E00)));
        return reinterpret_cast<Wide>(_mm256_cvtph_ps(made));
    }
#else
    static constexpr float FACTOR = 1;
    static Wide widened(const void* from) {
        const auto bits = reinterpret_cast<WideWords>(__builtin_convertvector(load<WideBytes>(from), WideInts));
        // Exponent and mantissa at their places in a float32, and the exponents' biases, 7 and 127, made even.
        const Wide made = reinterpret_cast<Wide>((bits & 0x7Fu) << 20 | (bits & 0x80000000u)) * 0x1p120f;
        return (bits & 0x7Fu) == 0x7Fu ? Wide{} + NAN : made;
    }
#endif
};
#endif

// Values in float32 rounded to the nearest of E4M3, ties to even, saturating: from 2^-6 on to three bits of mantissa, and
// below to steps of 2^-9.
inline Floats nearest_fp8(Floats x) {
    x = x > 448.0f ? all(448.0f) : x;
    x = x < -448.0f ? all(-448.0f) : x;
    const Words bits = reinterpret_cast<Words>(x);
    const Floats rounded = bits_as_floats((bits + 0x7FFFFu + (bits >> 20 & 1u)) & 0xFFF00000u);
    const Floats small = (x + 24576.0f) - 24576.0f;  // whose own steps are 2^-9
    const Floats magnitude = x < 0.0f ? -x : x;
    const Floats made = magnitude < 0x1p-6f ? small : rounded;
    return x == x ? made : all(NAN);
}

// Sixteen of a row's inputs times a factor; those that are missing are 0.
inline Floats some_inputs(const float* x, int64_t count, float factor) {
    if (count >= LANES) return load<Floats>(x) * factor;
    float values[LANES] = {};
    std::memcpy(values, x, count * sizeof(float));
    return load<Floats>(values) * factor;
}

// Rounds a row times a factor to E4M3, as its products take it; returns its scale.
inline float round_fp8(const float* x, int64_t inputs, float factor, const Fp8Scale& of, float* to) {
    float scale = of.fixed;
    if (scale == 0) {
        Floats largest{};
        for (int64_t k = 0; k < inputs; k += LANES) {
            const Floats values = some_inputs(x + k, inputs - k, factor), magnitude = values < 0.0f ? -values : values;
            largest = magnitude > largest ? magnitude : largest;
        }
        const float most = largest_of(largest);
        scale = (of.bound > 0 && most > of.bound ? of.bound : most) / 448.0f;
        scale = scale == 0 ? 1.0f : scale;
    }
    for (int64_t k = 0; k < inputs; k += LANES) {
        const int64_t count = std::min(LANES, inputs - k);
        const Floats rounded = nearest_fp8(some_inputs(x + k, count, factor) / scale);
#if ARRIERO_PAIRS
        const __m256i halves = _mm512_cvtepi32_epi16(_mm512_srli_epi32(reinterpret_cast<__m512i>(rounded), 16));
        std::memcpy(to + k / 2, &halves, count * sizeof(uint16_t));
#else
        const Floats values = rounded * PlainE4m3::FACTOR;
        std::memcpy(to + k, &values, count * sizeof(float));
#endif
    }
    return scale;
}

#if ARRIERO_PAIRS
inline void multiply_plain(const PlainMatrix& matrix, const PlainInput& x, int64_t first, int64_t last, float* to,
                           float* space) {
    multiply_stored<PairedE4m3>(matrix, x, first, last, to, space);
}
#else
// Rows times the outputs from `first` to `last` of a matrix of any type, but for pairs.
inline void multiply_plain(const PlainMatrix& matrix, const PlainInput& x, int64_t first, int64_t last, float* to,
                           float* space) {
    switch (matrix.type) {
        case Plain::float32: return multiply_stored<PlainFloat32>(matrix, x, first, last, to, space);
        case Plain::float16: return multiply_stored<PlainFloat16>(matrix, x, first, last, to, space);
        case Plain::bfloat16: return multiply_stored<PlainBfloat16>(matrix, x, first, last, to, space);
        case Plain::e4m3: return multiply_stored<PlainE4m3>(matrix, x, first, last, to, space);
        case Plain::e4m3_pairs: return;
    }
}
#endif
