// Rows as they are stored: floats, doubles, bfloat16; and the int8 of a weight.
//
// The number of elements need not be a multiple of the lanes here. A cache's rows are as wide as a head; what
// is left over is read one by one.
//
// Widening names instructions: GCC widens bytes one by one where it is not told how, which makes int8 ten
// times slower to read.
#pragma once

#include <algorithm>
#include <type_traits>

#include "vectors.h"

struct BFloat16 {
    uint16_t bits;
};

// LANES<T> narrower integers.
template <class T, class Number>
struct Narrow {
    typedef Number Vector __attribute__((vector_size(LANES<T> * sizeof(Number))));
    static Vector load(const void* p) {
        Vector v;
        std::memcpy(&v, p, sizeof v);
        return v;
    }
};

template <class T>
inline T widen(T x) {
    return x;
}
template <class T>
inline T widen(int8_t x) {
    return T(x);
}
template <class T>
inline T widen(BFloat16 x) {
    const uint32_t bits = uint32_t(x.bits) << 16;
    float wide;
    std::memcpy(&wide, &bits, sizeof wide);
    return wide;
}

template <class T>
inline Vector<T> load_stored(const T* p) {
    return load<T>(p);
}
// Into floats; doubles are stored as they are.
template <class T>
inline Vector<T> load_stored(const int8_t* p) {
#if defined(__AVX512F__)
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(__AVX2__)
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
    return __builtin_convertvector(Narrow<T, int8_t>::load(p), Vector<T>);
#endif
}
template <class T>
inline Vector<T> load_stored(const BFloat16* p) {
    if constexpr (sizeof(T) == 8) {
        Vector<T> v;
        for (int i = 0; i < LANES<T>; ++i) v[i] = widen<T>(p[i]);
        return v;
    } else {
#if defined(__AVX512F__)
        const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
#elif defined(__AVX2__)
        const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
#else
        typedef uint32_t Wide __attribute__((vector_size(VECTOR_BYTES)));
        const Wide bits = __builtin_convertvector(Narrow<T, uint16_t>::load(p), Wide) << 16;
        Vector<T> v;
        std::memcpy(&v, &bits, sizeof v);
        return v;
#endif
    }
}

template <class T>
inline void narrow(T x, T& to) {
    to = x;
}
template <class T>
inline void narrow(T x, BFloat16& to) {  // to the nearest, of two the even one
    const float wide = float(x);
    uint32_t bits;
    std::memcpy(&bits, &wide, sizeof bits);
    to.bits = uint16_t(wide == wide ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : bits >> 16 | 64);
}

inline BFloat16 half(float x) {
    BFloat16 to;
    narrow<float>(x, to);
    return to;
}

// LANES<float> floats as bfloat16.
inline void store_half(BFloat16* to, Vector<float> v) {
#if defined(__AVX512BF16__)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh(v));
#else
    for (int i = 0; i < LANES<float>; ++i) to[i] = half(v[i]);
#endif
}

// Has n numbers brought to the second-level cache.
template <class S>
inline void fetch_row(const S* from, long n) {
    const char* bytes = reinterpret_cast<const char*>(from);
    for (long byte = 0; byte < n * long(sizeof(S)); byte += 64) __builtin_prefetch(bytes + byte, 0, 2);
}
// to (n,) = from (n,), n a multiple of 16.
template <class S>
inline void copy_row(S* to, const S* from, long n) {
    for (long i = 0; i < n; i += 16) std::memcpy(to + i, from + i, 16 * sizeof(S));
}
// to (n,) = stored numbers times a factor; n a multiple of the lanes, as in the two that follow.
template <class T, class S>
inline void scale_row(T* to, const S* from, T factor, long n) {
    for (long i = 0; i < n; i += LANES<T>) store<T>(to + i, load_stored<T>(from + i) * factor);
}
// to (n,) += numbers times a factor.
template <class T>
inline void add_row(T* to, const T* from, T factor, long n) {
    for (long i = 0; i < n; i += LANES<T>) store<T>(to + i, load<T>(to + i) + load<T>(from + i) * factor);
}
// Stored numbers as T: where they are, or in `room`.
template <class T, class S>
inline const T* widened(const S* from, long n, T* room) {
    if constexpr (std::is_same_v<T, S>)
        return from;
    else {
        scale_row<T>(room, from, T(1), n);
        return room;
    }
}
// Where sums are collected: in their own place if they are stored as T, else in `room`.
template <class T, class S>
inline T* in_place(S* place, T* room) {
    if constexpr (std::is_same_v<T, S>)
        return place;
    else
        return room;
}
// n a multiple of the lanes.
template <class T, class S>
inline void put_numbers(S* to, const T* from, long n) {
    if constexpr (std::is_same_v<T, S>) {
        if (to != from) std::copy_n(from, n, to);
    } else {
        for (long i = 0; i < n; i += LANES<T>) store_half(to + i, load<T>(from + i));
    }
}

// Rows (rows, dim).
template <class S>
struct Rows {
    S* numbers;
    long dim;
};

// Sum of a (n,) times a stored row.
template <class T, class S>
inline T dot(const T* a, const S* b, long n) {
    Vector<T> sum{};
    long j = 0;
    for (; j + LANES<T> <= n; j += LANES<T>) sum += load<T>(a + j) * load_stored<T>(b + j);
    T rest = total<T>(sum);
    for (; j < n; ++j) rest += a[j] * widen<T>(b[j]);
    return rest;
}

// out[i] = sum of a (n,) times the i-th of `count` stored rows of n numbers. Four at a time, so that one's
// sums are added while another's are waited for, and what is needed next is on its way from memory.
template <class T, class S>
void dot_rows(const T* a, const S* rows, long count, long n, T* out) {
    constexpr int TOGETHER = 4, AHEAD = 16;
    long i = 0;
    for (; i + TOGETHER <= count; i += TOGETHER, rows += TOGETHER * n) {
        const char* ahead = reinterpret_cast<const char*>(rows + AHEAD * n);
        for (long byte = 0; byte < long(TOGETHER * n * sizeof(S)); byte += 64)
            __builtin_prefetch(ahead + byte);
        Vector<T> sums[TOGETHER] = {};
        long j = 0;
        for (; j + LANES<T> <= n; j += LANES<T>) {
            const Vector<T> x = load<T>(a + j);
#pragma GCC unroll 4
            for (int k = 0; k < TOGETHER; ++k) sums[k] += x * load_stored<T>(rows + k * n + j);
        }
#pragma GCC unroll 4
        for (int k = 0; k < TOGETHER; ++k) {
            T sum = total<T>(sums[k]);
            for (long rest = j; rest < n; ++rest) sum += a[rest] * widen<T>(rows[k * n + rest]);
            out[i + k] = sum;
        }
    }
    for (; i < count; ++i, rows += n) out[i] = dot<T>(a, rows, n);
}

// to (n,) += factor * a stored row.
template <class T, class S>
inline void add_stored(T* to, T factor, const S* from, long n) {
    long j = 0;
    for (; j + LANES<T> <= n; j += LANES<T>)
        store<T>(to + j, load<T>(to + j) + load_stored<T>(from + j) * factor);
    for (; j < n; ++j) to[j] += widen<T>(from[j]) * factor;
}

// to (n,) += the sum of weights[i] * the i-th of `count` stored rows of n numbers, in registers.
template <class T, class S>
void add_rows(T* to, const T* weights, const S* rows, long count, long n) {
    constexpr int WIDE = 4;
    long j = 0;
    for (; j + WIDE * LANES<T> <= n; j += WIDE * LANES<T>) {
        Vector<T> sums[1][WIDE] = {};
        for (long i = 0; i < count; ++i)
#pragma GCC unroll 4
            for (int v = 0; v < WIDE; ++v)
                sums[0][v] += load_stored<T>(rows + i * n + j + v * LANES<T>) * weights[i];
        for (int v = 0; v < WIDE; ++v) {
            T* place = to + j + v * LANES<T>;
            store<T>(place, load<T>(place) + sums[0][v]);
        }
    }
    for (; j + LANES<T> <= n; j += LANES<T>) {
        Vector<T> sum{};
        for (long i = 0; i < count; ++i) sum += load_stored<T>(rows + i * n + j) * weights[i];
        store<T>(to + j, load<T>(to + j) + sum);
    }
    for (; j < n; ++j)
        for (long i = 0; i < count; ++i) to[j] += widen<T>(rows[i * n + j]) * weights[i];
}

template <class T, class S>
inline void put_row(const Rows<S>& rows, long row, const T* from) {
    for (long j = 0; j < rows.dim; ++j) narrow<T>(from[j], rows.numbers[row * rows.dim + j]);
}

template <class T, class S>
inline void get_row(const Rows<S>& rows, long row, T* to) {
    for (long j = 0; j < rows.dim; ++j) to[j] = widen<T>(rows.numbers[row * rows.dim + j]);
}
