// Products of bfloat16 matrices, summed in float, and the packing and softmax that go with them.
//
// The processor's matrix unit (AMX) multiplies tiles of 16 x 32 and 32 x 16 numbers, sixteen times as fast as
// its vectors multiply floats. A processor without one computes in floats (tiles.h); for tests a portable
// form gives the same numbers but for the order of sums.
//
// In a product c = a b the left operand lies row by row. The right one is packed in panels of SIDE columns,
// in which two rows stand side by side, [column / SIDE][k / 2][column % SIDE][k % 2], as the unit reads them.
// Products of two bfloat16 numbers are exact in float, so logits of bfloat16 rows lose nothing here.
#pragma once

#include <atomic>

#include "stored.h"

#if defined(__AMX_BF16__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

constexpr int SIDE = 16;   // rows and columns of a tile: counts of rows and columns are multiples of it
constexpr int DEPTH = 32;  // numbers of a left row of a tile: what is summed over is a multiple of it

enum class Unit { FLOATS, PORTABLE, TILES };  // operators.py: UNITS

// The best unit of this processor. Linux gives a process the tiles when it asks for them.
inline Unit best_unit() {
#if defined(__AMX_BF16__) && defined(__linux__)
    constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
    static const bool granted = syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
    if (granted) return Unit::TILES;
#endif
    return Unit::FLOATS;
}

inline std::atomic<Unit>& unit_in_use() {
    static std::atomic<Unit> unit{best_unit()};
    return unit;
}

// Holds the tiles of this thread; they are given back at the end, since other libraries use them too.
class Tiles {
  public:
    explicit Tiles(bool wanted) : held_(wanted && unit_in_use() == Unit::TILES) {
#if defined(__AMX_BF16__)
        if (!held_) return;
        alignas(64) struct {
            uint8_t palette = 1, start = 0, reserved[14] = {};
            uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
        } shape;
        asm volatile("" ::"r"(&shape) : "memory");  // all of it is read
        _tile_loadconfig(&shape);
#endif
    }
    ~Tiles() {
#if defined(__AMX_BF16__)
        if (held_) _tile_release();
#endif
    }
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;

  private:
    bool held_;
};

// c (M tiles, N tiles) = or += a b.
#if defined(__AMX_BF16__)
template <int M, int N>
inline void tile_product(float* c, long c_row, const BFloat16* a, long a_row, const BFloat16* b, long b_panel,
                         int inner, bool add) {
    const long c_bytes = c_row * 4, a_bytes = a_row * 2, b_bytes = 4 * SIDE;
    float* below = c + SIDE * c_row;
    if (add) {
        _tile_loadd(0, c, c_bytes);
        if constexpr (N > 1) _tile_loadd(1, c + SIDE, c_bytes);
        if constexpr (M > 1) _tile_loadd(2, below, c_bytes);
        if constexpr (M > 1 && N > 1) _tile_loadd(3, below + SIDE, c_bytes);
    } else {
        _tile_zero(0);
        if constexpr (N > 1) _tile_zero(1);
        if constexpr (M > 1) _tile_zero(2);
        if constexpr (M > 1 && N > 1) _tile_zero(3);
    }
    for (int k = 0; k < inner; k += DEPTH) {
        _tile_loadd(4, a + k, a_bytes);
        _tile_loadd(6, b + k * SIDE, b_bytes);
        _tile_dpbf16ps(0, 4, 6);
        if constexpr (N > 1) {
            _tile_loadd(7, b + k * SIDE + b_panel, b_bytes);
            _tile_dpbf16ps(1, 4, 7);
        }
        if constexpr (M > 1) {
            _tile_loadd(5, a + SIDE * a_row + k, a_bytes);
            _tile_dpbf16ps(2, 5, 6);
            if constexpr (N > 1) _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, c, c_bytes);
    if constexpr (N > 1) _tile_stored(1, c + SIDE, c_bytes);
    if constexpr (M > 1) _tile_stored(2, below, c_bytes);
    if constexpr (M > 1 && N > 1) _tile_stored(3, below + SIDE, c_bytes);
}

template <int N>
inline void tile_product_columns(float* c, long c_row, const BFloat16* a, long a_row, const BFloat16* b,
                                 long b_panel, int rows, int inner, bool add) {
    int i = 0;
    for (; i + 2 * SIDE <= rows; i += 2 * SIDE)
        tile_product<2, N>(c + i * c_row, c_row, a + i * a_row, a_row, b, b_panel, inner, add);
    if (i < rows) tile_product<1, N>(c + i * c_row, c_row, a + i * a_row, a_row, b, b_panel, inner, add);
}
#endif

inline void portable_product(float* c, long c_row, const BFloat16* a, long a_row, const BFloat16* b,
                             int inner, bool add) {
    for (int i = 0; i < SIDE; ++i)
        for (int j = 0; j < SIDE; ++j) {
            float sum = add ? c[i * c_row + j] : 0;
            for (int k = 0; k < inner; ++k)
                sum += widen<float>(a[i * a_row + k]) * widen<float>(b[k / 2 * 2 * SIDE + 2 * j + k % 2]);
            c[i * c_row + j] = sum;
        }
}

// c (rows, columns) = a (rows, inner) b (inner, columns), or += with `add`; b in panels that are b_panel
// numbers apart. Rows and columns are multiples of SIDE, inner of DEPTH. With the tiles held by a `Tiles`.
inline void product(float* c, long c_row, const BFloat16* a, long a_row, const BFloat16* b, long b_panel,
                    int rows, int columns, int inner, bool add) {
#if defined(__AMX_BF16__)
    if (unit_in_use().load(std::memory_order_relaxed) == Unit::TILES) {
        asm volatile("" ::: "memory");  // what was stored is there before the tiles load it
        int j = 0;
        for (; j + 2 * SIDE <= columns; j += 2 * SIDE)
            tile_product_columns<2>(c + j, c_row, a, a_row, b + j / SIDE * b_panel, b_panel, rows, inner,
                                    add);
        if (j < columns)
            tile_product_columns<1>(c + j, c_row, a, a_row, b + j / SIDE * b_panel, b_panel, rows, inner,
                                    add);
        asm volatile("" ::: "memory");
        return;
    }
#endif
    for (int i = 0; i < rows; i += SIDE)
        for (int j = 0; j < columns; j += SIDE)
            portable_product(c + i * c_row + j, c_row, a + i * a_row, a_row, b + j / SIDE * b_panel, inner,
                             add);
}

constexpr long round_to(long count, long multiple) { return (count + multiple - 1) / multiple * multiple; }

// ---- packing ----

// n floats as bfloat16, and what that leaves of them if `rest` is asked for; n a multiple of the lanes.
inline void store_halves(BFloat16* to, const float* from, long n, BFloat16* rest = nullptr) {
    for (long j = 0; j < n; j += LANES<float>) {
        const Vector<float> v = load<float>(from + j);
        store_half(to + j, v);
        if (rest) store_half(rest + j, v - load_stored<float>(to + j));
    }
}

// Right operand of a product with from^T: rows (rows, columns) -> panels for up to `row` of them, each of
// depth pairs of columns; what is beyond rows and columns becomes 0. Columns even.
inline void pack_transposed(BFloat16* to, long row, long depth, const BFloat16* from, int rows, int columns) {
    typedef uint32_t __attribute__((may_alias)) Pair;  // of neighbouring numbers of a row
    for (long i = 0; i < row; i += SIDE, to += depth * SIDE, from += SIDE * columns, rows -= SIDE) {
        Pair* pairs = reinterpret_cast<Pair*>(to);
        transpose<Pair>(pairs, SIDE, reinterpret_cast<const Pair*>(from), columns / 2,
                        std::clamp(rows, 0, SIDE), columns / 2);
        std::fill_n(pairs + columns / 2 * SIDE, (depth - columns) / 2 * SIDE, 0u);
    }
}

// SIDE numbers of two rows side by side.
inline void interleave(void* to, const BFloat16* even, const BFloat16* odd) {
#if defined(__AVX512F__)
    const auto wide = [](const BFloat16* from) {
        return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    };
    _mm512_storeu_si512(to, _mm512_or_si512(wide(even), _mm512_slli_epi32(wide(odd), 16)));
#else
    BFloat16* pairs = static_cast<BFloat16*>(to);
    for (int i = 0; i < SIDE; ++i) {
        pairs[2 * i] = even[i];
        pairs[2 * i + 1] = odd[i];
    }
#endif
}

// Right operand of a product with `from`: rows (rows, columns) -> panels of depth rows, 0 beyond the rows.
inline void pack_rows(BFloat16* to, long depth, const BFloat16* from, int rows, long columns) {
    typedef uint32_t __attribute__((may_alias)) Pair;
    for (long j = 0; j < columns; j += SIDE) {
        Pair* pairs = reinterpret_cast<Pair*>(to + j * depth);
        for (long k = 0; k < depth / 2; ++k, pairs += SIDE) {
            const BFloat16 *even = from + 2 * k * columns + j, *odd = even + columns;
            if (2 * k + 1 < rows)
                interleave(pairs, even, odd);
            else if (2 * k < rows)
                for (long i = 0; i < SIDE; ++i) pairs[i] = even[i].bits;
            else
                std::fill_n(pairs, SIDE, 0u);
        }
    }
}

// Left operands: rows (rows, columns) -> (row, depth), 0 beyond both.
inline void pack_left(BFloat16* to, long row, long depth, const BFloat16* from, int rows, long columns) {
    for (int i = 0; i < rows; ++i) {
        copy_row(to + i * depth, from + i * columns, columns);
        std::fill_n(to + i * depth + columns, depth - columns, BFloat16{});
    }
    std::fill_n(to + rows * depth, (row - rows) * depth, BFloat16{});
}

// The transposed of rows (rows, columns) as a left operand: (columns, row), 0 beyond the rows. `room` is as
// large.
inline void pack_columns(BFloat16* to, long row, const BFloat16* from, int rows, long columns,
                         BFloat16* room) {
    typedef uint32_t __attribute__((may_alias)) Pair;
    pack_rows(room, row, from, rows, columns);
    for (long j = 0; j < columns; j += SIDE)
        transpose<Pair>(reinterpret_cast<Pair*>(to + j * row), row / 2,
                        reinterpret_cast<const Pair*>(room + j * row), SIDE, row / 2, SIDE);
}

// ---- softmax ----

constexpr float LOG2_E = 1.4426950408889634f;

// 2^x for x <= 127, exactly 0 from -127 down: 2^n times a polynomial of the rest, |rest| <= 1 / 2, whose
// largest relative error is 2.6e-6 (least maximum).
inline Vector<float> power_of_two(Vector<float> x) {
    using S = Simd<float>;
    const Vector<float> low = splat<float>(-127.0f);
    x = x < low ? low : x;
    const Vector<float> shifted = x + S::ROUND, rest = x - (shifted - S::ROUND);
    Vector<float> sum = splat<float>(9.5701e-3f);
    sum = sum * rest + 5.591786e-2f;
    sum = sum * rest + 2.4024745e-1f;
    sum = sum * rest + 6.9312181e-1f;
    sum = sum * rest + 9.9999926e-1f;
    S::Bits bits;
    std::memcpy(&bits, &shifted, sizeof bits);
    bits = bits << S::MANTISSA;
    Vector<float> power;
    std::memcpy(&power, &bits, sizeof bits);
    return sum * power;
}
