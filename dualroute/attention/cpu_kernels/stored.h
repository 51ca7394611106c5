// Rows of a cache as they are stored: floats, doubles, bfloat16, or int8 with a scale for each row.
//
// The surprising fact: the number of elements need not be a multiple of the lanes here. A cache's rows are as
// wide as a head; what is left over is read one by one.
#pragma once

#include <algorithm>

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
inline Vector<T> load_stored(const T* p) {
    return load<T>(p);
}
template <class T>
inline Vector<T> load_stored(const int8_t* p) {
    return __builtin_convertvector(Narrow<T, int8_t>::load(p), Vector<T>);
}
template <class T>
inline Vector<T> load_stored(const BFloat16* p) {
    typedef uint32_t Wide __attribute__((vector_size(VECTOR_BYTES)));
    const Wide bits = __builtin_convertvector(Narrow<T, uint16_t>::load(p), Wide) << 16;
    Vector<T> v;
    std::memcpy(&v, &bits, sizeof v);
    return v;
}

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

// Rows (rows, dim); `scales` (rows,) where they are int8.
template <class S>
struct Rows {
    S* numbers;
    float* scales;
    long dim;
};

template <class T, class S>
inline T scale_of(const Rows<S>& rows, long row) {
    return rows.scales ? T(rows.scales[row]) : T(1);
}

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

// Rounded to 255 steps of the largest number, as `cache.to_int8` does.
template <class T>
inline void put_row(const Rows<int8_t>& rows, long row, const T* from) {
    T largest = 0;
    for (long j = 0; j < rows.dim; ++j) largest = std::max(largest, std::abs(from[j]));
    const float scale = std::max(float(largest) / 127, 1.17549435e-38f);
    rows.scales[row] = scale;
    for (long j = 0; j < rows.dim; ++j)
        rows.numbers[row * rows.dim + j] = int8_t(std::nearbyint(float(from[j]) / scale));
}

template <class T, class S>
inline void get_row(const Rows<S>& rows, long row, T* to) {
    std::fill_n(to, rows.dim, T(0));
    add_stored<T>(to, scale_of<T>(rows, row), rows.numbers + row * rows.dim, rows.dim);
}
