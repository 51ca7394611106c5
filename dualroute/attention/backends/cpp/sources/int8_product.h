// One row of numbers times a matrix of int8 with a scale for each of its columns.
//
// The matrix lies in panels of 64 columns, one behind the other: `inner` rows of 64 numbers and then the 64
// scales, float32. So the sums of a panel stay in registers, none waits for its last addition, and memory is
// read in one stream.
#pragma once

#include "stored.h"

constexpr int PANEL_COLUMNS = 64;  // COLUMNS in int8_product.py

// sums (PANEL_COLUMNS,) = a (inner,) times a panel, scaled.
template <class T>
void int8_panel(const T* a, const int8_t* panel, long inner, T* sums) {
    constexpr int VECTORS = PANEL_COLUMNS / LANES<T>;
    constexpr int APART = VECTORS < 8 ? 2 : 1;  // rows with sums of their own
    constexpr int AHEAD = 64;                   // rows that are on their way from memory
    Vector<T> of[APART][VECTORS] = {};
    const auto row = [&](long k, Vector<T>* to) {
        const int8_t* numbers = panel + k * PANEL_COLUMNS;
        __builtin_prefetch(numbers + AHEAD * PANEL_COLUMNS);
#pragma GCC unroll 16
        for (int v = 0; v < VECTORS; ++v) to[v] += load_stored<T>(numbers + v * LANES<T>) * a[k];
    };
    long k = 0;
    for (; k + APART <= inner; k += APART)
#pragma GCC unroll 2
        for (int i = 0; i < APART; ++i) row(k + i, of[i]);
    for (; k < inner; ++k) row(k, of[0]);
    float scales[PANEL_COLUMNS];
    std::memcpy(scales, panel + inner * PANEL_COLUMNS, sizeof scales);
#pragma GCC unroll 16
    for (int v = 0; v < VECTORS; ++v) {
        if (APART == 2) of[0][v] += of[APART - 1][v];
        store<T>(sums + v * LANES<T>, of[0][v] * load<T>(scales + v * LANES<T>));
    }
}

// out (columns,) = row (inner,) times the matrix; what the last panel has too much is left out.
template <class T, class A>
void int8_product(const A* row, const int8_t* panels, long columns, long inner, int threads, A* out) {
    const long size = (inner + sizeof(float)) * PANEL_COLUMNS, count = (columns - 1) / PANEL_COLUMNS + 1;
    const Buffer<T> a(inner);
    for (long k = 0; k < inner; ++k) a.data()[k] = widen<T>(row[k]);
#pragma omp parallel for num_threads(threads) if (columns * inner > WORTH_THREADS)
    for (long panel = 0; panel < count; ++panel) {
        T sums[PANEL_COLUMNS];
        int8_panel<T>(a.data(), panels + panel * size, inner, sums);
        const long first = panel * PANEL_COLUMNS, end = std::min<long>(PANEL_COLUMNS, columns - first);
        for (long c = 0; c < end; ++c) narrow<T>(sums[c], out[first + c]);
    }
}
