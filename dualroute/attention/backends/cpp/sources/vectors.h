// Vectors of numbers, their exponential, and the small matrix product that the kernels are made of.
//
// Written with the vector extensions of GCC and Clang: one source for AVX-512, AVX2 and 128-bit machines.
// Where numbers change places between vectors, AVX-512 has instructions that no extension gives. No library
// is called. The matrices are 64 x 64, where the bookkeeping of a BLAS call costs as much as its arithmetic,
// and every operand already lies in the first-level cache.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

// What is called from outside. The rest is hidden: two libraries in one process are two builds of it.
#define DUALROUTE_CALLED extern "C" __attribute__((visibility("default")))

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64, PANEL = 4;  // PANEL: vectors of a row that one inner loop keeps in registers
#elif defined(__AVX2__)
constexpr int VECTOR_BYTES = 32, PANEL = 2;
#else
constexpr int VECTOR_BYTES = 16, PANEL = 2;
#endif
constexpr long WORTH_THREADS = 1 << 18;  // products of a token's step; fewer are done before threads wake
constexpr int STRIP = 6;                 // rows that one inner loop keeps in registers

template <class T>
struct Simd;

template <>
struct Simd<float> {
    typedef float Vector __attribute__((vector_size(VECTOR_BYTES)));
    typedef int32_t Bits __attribute__((vector_size(VECTOR_BYTES)));
    typedef float Unaligned __attribute__((vector_size(VECTOR_BYTES), aligned(4), may_alias));
    static constexpr float LOWEST = -88.0f, LN2_HIGH = 0.693359375f, LN2_LOW = -2.12194440e-4f;
    static constexpr float ROUND = 12582912.0f + 127;  // 1.5 * 2^23 + BIAS: adding it rounds to an integer
    static constexpr int TERMS = 7, MANTISSA = 23;
};

template <>
struct Simd<double> {
    typedef double Vector __attribute__((vector_size(VECTOR_BYTES)));
    typedef int64_t Bits __attribute__((vector_size(VECTOR_BYTES)));
    typedef double Unaligned __attribute__((vector_size(VECTOR_BYTES), aligned(8), may_alias));
    static constexpr double LOWEST = -709.0, LN2_HIGH = 0.693147180369123816490,
                            LN2_LOW = 1.90821492927058770002e-10;
    static constexpr double ROUND = 6755399441055744.0 + 1023;  // 1.5 * 2^52 + BIAS
    static constexpr int TERMS = 13, MANTISSA = 52;
};

template <class T>
using Vector = typename Simd<T>::Vector;
template <class T>
constexpr int LANES = VECTOR_BYTES / sizeof(T);
template <class T>
constexpr T NEG_INF = -INFINITY;

// Uninitialised numbers. They begin at a cache line, so that no vector lies across two.
template <class T>
class Buffer {
  public:
    explicit Buffer(long size) : numbers_(new (std::align_val_t(64)) T[size]) {}
    T* data() const { return numbers_.get(); }

  private:
    struct Free {
        void operator()(T* numbers) const { operator delete[](numbers, std::align_val_t(64)); }
    };
    std::unique_ptr<T[], Free> numbers_;
};

template <class T>
inline Vector<T> load(const T* p) {
    return *reinterpret_cast<const typename Simd<T>::Unaligned*>(p);
}
template <class T>
inline void store(T* p, Vector<T> v) {
    *reinterpret_cast<typename Simd<T>::Unaligned*>(p) = v;
}
template <class T>
inline Vector<T> splat(T x) {
    return x - Vector<T>{};
}

// `count` as a multiple of the lanes.
template <class T>
inline int round_up(long count) {
    return (count + LANES<T> - 1) / LANES<T> * LANES<T>;
}

template <class T>
constexpr T inverse_factorial(int n) {
    double product = 1;
    for (int i = 2; i <= n; ++i) product *= i;
    return T(1 / product);
}

// e^x for x <= 88, exactly 0 from LOWEST down, where n is -BIAS: 2^n times the Taylor series of the rest,
// |rest| <= ln 2 / 2.
template <class T>
inline Vector<T> exponential(Vector<T> x) {
    using S = Simd<T>;
    const Vector<T> low = splat<T>(S::LOWEST);
    x = x < low ? low : x;
    const Vector<T> shifted = x * splat<T>(T(1.4426950408889634)) + S::ROUND;
    const Vector<T> n = shifted - S::ROUND;
    const Vector<T> rest = (x - n * S::LN2_HIGH) - n * S::LN2_LOW;
    Vector<T> sum = splat<T>(inverse_factorial<T>(S::TERMS));
#pragma GCC unroll 16
    for (int i = S::TERMS - 1; i >= 0; --i) sum = sum * rest + inverse_factorial<T>(i);
    typename S::Bits bits;
    std::memcpy(&bits, &shifted, sizeof bits);
    // The integer n + BIAS stands in the low bits of `shifted`; whatever is above them is shifted out.
    bits = bits << S::MANTISSA;
    Vector<T> power;
    std::memcpy(&power, &bits, sizeof bits);
    return sum * power;
}

// Largest and sum of the numbers in a vector, by halves.
template <class T, int N>
struct Reduce {
    typedef T Half __attribute__((vector_size(N / 2 * sizeof(T))));
    template <class V>
    static T largest(V v) {
        Half a, b;
        std::memcpy(&a, &v, sizeof a);
        std::memcpy(&b, reinterpret_cast<char*>(&v) + sizeof a, sizeof b);
        return Reduce<T, N / 2>::largest(a > b ? a : b);
    }
    template <class V>
    static T sum(V v) {
        Half a, b;
        std::memcpy(&a, &v, sizeof a);
        std::memcpy(&b, reinterpret_cast<char*>(&v) + sizeof a, sizeof b);
        return Reduce<T, N / 2>::sum(a + b);
    }
};
template <class T>
struct Reduce<T, 2> {
    template <class V>
    static T largest(V v) {
        return v[0] > v[1] ? v[0] : v[1];
    }
    template <class V>
    static T sum(V v) {
        return v[0] + v[1];
    }
};
template <class T>
inline T largest(Vector<T> v) {
    return Reduce<T, LANES<T>>::largest(v);
}
template <class T>
inline T total(Vector<T> v) {
    return Reduce<T, LANES<T>>::sum(v);
}

// The largest number, and the sum, of each of LANES vectors.
#if defined(__AVX512F__)
template <class Combine>
inline __m512 combine_each(const __m512* v, Combine combine) {
    __m512 fours[4], pair[2];
    for (int i = 0; i < 4; ++i) {
        const __m512 *p = v + 4 * i,
                     a = combine(_mm512_unpacklo_ps(p[0], p[1]), _mm512_unpackhi_ps(p[0], p[1])),
                     b = combine(_mm512_unpacklo_ps(p[2], p[3]), _mm512_unpackhi_ps(p[2], p[3]));
        const __m512d x = _mm512_castps_pd(a), y = _mm512_castps_pd(b);
        fours[i] =
            combine(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
    }
    for (int i = 0; i < 2; ++i)
        pair[i] = combine(_mm512_shuffle_f32x4(fours[2 * i], fours[2 * i + 1], 0x44),
                          _mm512_shuffle_f32x4(fours[2 * i], fours[2 * i + 1], 0xee));
    return combine(_mm512_shuffle_f32x4(pair[0], pair[1], 0x88),
                   _mm512_shuffle_f32x4(pair[0], pair[1], 0xdd));
}
#endif
template <class T>
inline Vector<T> largest_of_each(const Vector<T>* v) {
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4)
        return combine_each(v, [](__m512 a, __m512 b) { return _mm512_max_ps(a, b); });
#endif
    Vector<T> found;
    for (int i = 0; i < LANES<T>; ++i) found[i] = largest<T>(v[i]);
    return found;
}
template <class T>
inline Vector<T> total_of_each(const Vector<T>* v) {
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4) return combine_each(v, [](__m512 a, __m512 b) { return a + b; });
#endif
    Vector<T> found;
    for (int i = 0; i < LANES<T>; ++i) found[i] = total<T>(v[i]);
    return found;
}

// A matrix whose element (i, j) lies at data[i * row + j * column].
template <class T>
struct Strided {
    const T* data;
    long row, column;
};

template <class T, int M, int N>
inline void multiply_panel(T* c, long c_row, Strided<T> a, const T* b, long b_row, int inner, bool add) {
    Vector<T> sum[M][N];
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 16
        for (int j = 0; j < N; ++j) sum[i][j] = add ? load<T>(c + i * c_row + j * LANES<T>) : Vector<T>{};
    for (int k = 0; k < inner; ++k) {
        Vector<T> row[N];
#pragma GCC unroll 16
        for (int j = 0; j < N; ++j) row[j] = load<T>(b + k * b_row + j * LANES<T>);
#pragma GCC unroll 16
        for (int i = 0; i < M; ++i) {
            const Vector<T> x = splat<T>(a.data[i * a.row + k * a.column]);
#pragma GCC unroll 16
            for (int j = 0; j < N; ++j) sum[i][j] += x * row[j];
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 16
        for (int j = 0; j < N; ++j) store<T>(c + i * c_row + j * LANES<T>, sum[i][j]);
}

// The rows (fewer than STRIP) and the vectors (fewer than PANEL) that are left over.
template <class T, int N, int M = STRIP - 1>
inline void multiply_last_rows(T* c, long c_row, Strided<T> a, const T* b, long b_row, int rows, int inner,
                               bool add) {
    if (rows == M)
        multiply_panel<T, M, N>(c, c_row, a, b, b_row, inner, add);
    else if constexpr (M > 1)
        multiply_last_rows<T, N, M - 1>(c, c_row, a, b, b_row, rows, inner, add);
}

template <class T, int N>
inline void multiply_rows(T* c, long c_row, Strided<T> a, const T* b, long b_row, int rows, int inner,
                          bool add) {
    for (; rows >= STRIP; rows -= STRIP, c += STRIP * c_row, a.data += STRIP * a.row)
        multiply_panel<T, STRIP, N>(c, c_row, a, b, b_row, inner, add);
    multiply_last_rows<T, N>(c, c_row, a, b, b_row, rows, inner, add);
}

template <class T, int N = PANEL - 1>
inline void multiply_last_vectors(T* c, long c_row, Strided<T> a, const T* b, long b_row, int rows,
                                  int vectors, int inner, bool add) {
    if (vectors == N)
        multiply_rows<T, N>(c, c_row, a, b, b_row, rows, inner, add);
    else if constexpr (N > 1)
        multiply_last_vectors<T, N - 1>(c, c_row, a, b, b_row, rows, vectors, inner, add);
}

// c (rows, columns) = a (rows, inner) b (inner, columns), or += with `add`; columns a multiple of the lanes.
// A row of c is the same sum in the same order however many rows are computed with it.
template <class T>
void multiply(T* c, long c_row, Strided<T> a, const T* b, long b_row, int rows, int columns, int inner,
              bool add) {
    int vectors = columns / LANES<T>;
    for (; vectors >= PANEL; vectors -= PANEL, c += PANEL * LANES<T>, b += PANEL * LANES<T>)
        multiply_rows<T, PANEL>(c, c_row, a, b, b_row, rows, inner, add);
    multiply_last_vectors<T>(c, c_row, a, b, b_row, rows, vectors, inner, add);
}

// to (16, 16) = from (16, 16) transposed, of numbers of four bytes.
#if defined(__AVX512F__)
inline void transpose_square(void* to, long to_row, const void* from, long from_row) {
    __m512i row[16], fours[16];
    for (int i = 0; i < 16; ++i)
        row[i] = _mm512_loadu_si512(static_cast<const int32_t*>(from) + i * from_row);
    // Of four neighbouring rows: columns 4 L + c, in lane L of the c-th vector.
    for (int i = 0; i < 16; i += 4) {
        const __m512i a = _mm512_unpacklo_epi32(row[i], row[i + 1]),
                      b = _mm512_unpackhi_epi32(row[i], row[i + 1]),
                      c = _mm512_unpacklo_epi32(row[i + 2], row[i + 3]),
                      d = _mm512_unpackhi_epi32(row[i + 2], row[i + 3]);
        fours[i] = _mm512_unpacklo_epi64(a, c);
        fours[i + 1] = _mm512_unpackhi_epi64(a, c);
        fours[i + 2] = _mm512_unpacklo_epi64(b, d);
        fours[i + 3] = _mm512_unpackhi_epi64(b, d);
    }
    const auto put = [&](int column, __m512i v) {
        _mm512_storeu_si512(static_cast<int32_t*>(to) + column * to_row, v);
    };
    for (int c = 0; c < 4; ++c) {
        const __m512i even = _mm512_shuffle_i32x4(fours[c], fours[4 + c], 0x88),
                      odd = _mm512_shuffle_i32x4(fours[c], fours[4 + c], 0xdd),
                      later_even = _mm512_shuffle_i32x4(fours[8 + c], fours[12 + c], 0x88),
                      later_odd = _mm512_shuffle_i32x4(fours[8 + c], fours[12 + c], 0xdd);
        put(c, _mm512_shuffle_i32x4(even, later_even, 0x88));
        put(4 + c, _mm512_shuffle_i32x4(odd, later_odd, 0x88));
        put(8 + c, _mm512_shuffle_i32x4(even, later_even, 0xdd));
        put(12 + c, _mm512_shuffle_i32x4(odd, later_odd, 0xdd));
    }
}
#endif

// to (columns, rows) = from (rows, columns) transposed; columns rows..to_row-1 of `to` become 0.
template <class T>
void transpose(T* to, long to_row, const T* from, long from_row, int rows, int columns) {
    int square_rows = 0, square_columns = 0;
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4) {
        square_rows = rows / 16 * 16;
        square_columns = columns / 16 * 16;
        for (int i = 0; i < square_rows; i += 16)
            for (int j = 0; j < square_columns; j += 16)
                transpose_square(to + j * to_row + i, to_row, from + i * from_row + j, from_row);
    }
#endif
    for (int j = 0; j < columns; ++j) {
        for (int i = j < square_columns ? square_rows : 0; i < rows; ++i)
            to[j * to_row + i] = from[i * from_row + j];
        for (int i = rows; i < to_row; ++i) to[j * to_row + i] = 0;
    }
}
