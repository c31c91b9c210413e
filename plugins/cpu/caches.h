// Keys and values as caches hold them: read as float32, and rounded and written.
//
// Included once for each instruction set, within its own namespace, behind `vectors.h`. `matrix.h` says how slots lie.

inline float bfloat16(const uint8_t* from) {
    uint16_t half;
    std::memcpy(&half, from, sizeof half);
    const uint32_t bits = static_cast<uint32_t>(half) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline void write_bfloat16(uint8_t* to, float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const auto half = static_cast<uint16_t>(bits >> 16);
    std::memcpy(to, &half, sizeof half);
}

// The next bfloat16 on the side of zero, or away from it.
inline float rounded_to_bfloat16(float value, bool away) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    bits = (bits + (away ? 0xFFFFu : 0)) & 0xFFFF0000u;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// As many signed bytes as a vector has lanes, as 32 bits; fewer of them are followed by others.
inline WideInts load_bytes(const uint8_t* from, int64_t count) {
    WideBytes bytes = {};
    if (count == WIDTH)
        bytes = load<WideBytes>(from);
    else
        std::memcpy(&bytes, from, count);
#if ARRIERO_SET == 2
    return whole(bytes);
#elif ARRIERO_SET == 1
    long long both;
    std::memcpy(&both, &bytes, sizeof both);
    return reinterpret_cast<WideInts>(_mm256_cvtepi8_epi32(_mm_cvtsi64_si128(both)));
#else
    return __builtin_convertvector(bytes, WideInts);
#endif
}

// Some dims from `d` on, as many as a vector has lanes or the last ones, of what a slot of a cache holds, in float32.
template <Cached CACHE>
inline Wide load_cached(const uint8_t* slot, int64_t d, int64_t count, int64_t padded) {
    if (CACHE == Cached::float32) {
        const uint8_t* const from = slot + 4 * d;
        return count == WIDTH ? load<Wide>(from) : widened_some<PlainFloat32>(from, count);
    }
    if (CACHE == Cached::float16) {
        const uint8_t* const from = slot + 2 * d;
        return count == WIDTH ? PlainFloat16::widened(from) : widened_some<PlainFloat16>(from, count);
    }
    if (CACHE == Cached::groups4) {
        const uint8_t* of_group = slot + padded / 2 + d / GROUP * 4;
        const WideInts both = load_bytes(slot + d / GROUP * LANES + d % LANES, WIDTH);
        const WideInts values = (both >> (d % GROUP < LANES ? 0 : 4)) & 15;
        return __builtin_convertvector(values, Wide) * bfloat16(of_group) + bfloat16(of_group + 2);
    }
    if (CACHE == Cached::e4m3) {
        const uint8_t* const from = slot + d;
        return (count == WIDTH ? PlainE4m3::widened(from) : widened_some<PlainE4m3>(from, count)) * PlainE4m3::FACTOR;
    }
    const WideInts values = load_bytes(slot + d, count);
    if (CACHE == Cached::groups8)
        return __builtin_convertvector(values, Wide) * bfloat16(slot + padded + d / GROUP * 2);
    return __builtin_convertvector(values, Wide);
}

// The bits of the nearest value of a float with `MANTISSA` bits of mantissa, ties to even.
template <int MANTISSA, int BIAS>
inline uint32_t narrowed(float magnitude) {
    constexpr int LESS = 23 - MANTISSA;
    if (magnitude < std::ldexp(1.0f, 1 - BIAS)) return std::nearbyint(std::ldexp(magnitude, BIAS - 1 + MANTISSA));
    uint32_t bits;
    std::memcpy(&bits, &magnitude, sizeof bits);
    bits += (1u << (LESS - 1)) - 1 + (bits >> LESS & 1);
    return (bits >> LESS) - ((127 - BIAS) << MANTISSA);
}

// The nearest float16, saturating.
inline uint16_t as_half(float value) {
    const float magnitude = std::fabs(value);
    if (magnitude != magnitude) return 0x7E00;
    return (std::signbit(value) ? 0x8000 : 0) | narrowed<10, 15>(magnitude > 65504.0f ? 65504.0f : magnitude);
}

// The nearest E4M3, saturating.
inline uint8_t as_e4m3(float value) {
    const float magnitude = std::fabs(value);
    if (magnitude != magnitude) return 0x7F;
    return (std::signbit(value) ? 0x80 : 0) | narrowed<3, 7>(magnitude > 448.0f ? 448.0f : magnitude);
}

// Rounds a head to integers of 8 or 4 bits, each group of dims by its own scale, and in 4 bits from its own least
// value. Both are bfloat16, chosen so that nothing saturates.
inline void write_groups(const Attention& call, uint8_t* slot, const float* values) {
    const int64_t padded = divided_up(call.head_dim, GROUP) * GROUP;
    const bool is_narrow = call.cache == Cached::groups4;
    for (int64_t start = 0; start < padded; start += GROUP) {
        float own[GROUP] = {};
        std::memcpy(own, values + start, std::min(GROUP, call.head_dim - start) * sizeof(float));
        const float least = *std::min_element(own, own + GROUP), most = *std::max_element(own, own + GROUP);
        const float base = is_narrow ? rounded_to_bfloat16(least, least < 0) : 0;
        const float span = is_narrow ? (most - base) / 15 : std::max(most, -least) / 127;
        float scale = rounded_to_bfloat16(span, true), poison = 0;
        for (const float value : own) poison += value * 0;  // NaN, if there is an infinity or a NaN
        uint8_t rounded[GROUP] = {};
        const float inverse = 1 / scale;  // infinite of the very smallest, whose groups become their least value
        if (scale > 0 && std::isfinite(scale) && std::isfinite(inverse) && poison == 0) {
            for (int i = 0; i < GROUP; i++)
                rounded[i] = static_cast<uint8_t>(static_cast<int8_t>(std::nearbyint((own[i] - base) * inverse)));
        }
        scale = poison == 0 ? scale : NAN;
        uint8_t* to = slot + padded + start / GROUP * 2;
        if (is_narrow) {
            for (int i = 0; i < LANES; i++) slot[start / 2 + i] = rounded[i] | rounded[i + LANES] << 4;
            to = slot + padded / 2 + start / GROUP * 4;
            write_bfloat16(to + 2, base);
        } else {
            std::memcpy(slot + start, rounded, GROUP);
        }
        write_bfloat16(to, scale);
    }
}

// Writes a head's key or value to its slot.
inline void write_cached(const Attention& call, uint8_t* slot, const float* values, const float* scales) {
    const int64_t size = call.head_dim;
    switch (call.cache) {
        case Cached::float32: std::memcpy(slot, values, size * sizeof(float)); return;
        case Cached::float16:
            for (int64_t d = 0; d < size; d++) {
                const uint16_t half = as_half(values[d]);
                std::memcpy(slot + 2 * d, &half, 2);
            }
            return;
        case Cached::int8:
            for (int64_t d = 0; d < size; d++) {
                const float scaled = values[d] / scales[d];
                const float held = scaled < -128 ? -128 : scaled > 127 ? 127 : scaled == scaled ? scaled : 0;
                const float rounded = std::nearbyint(held);
                slot[d] = static_cast<uint8_t>(static_cast<int8_t>(rounded));
            }
            return;
        case Cached::e4m3:
            for (int64_t d = 0; d < size; d++) slot[d] = as_e4m3(values[d] / scales[d]);
            return;
        case Cached::groups8:
        case Cached::groups4: write_groups(call, slot, values); return;
    }
}
