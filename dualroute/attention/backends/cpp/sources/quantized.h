// A row of a cache whose complete blocks are integers of BITS bits: core/storage/quantized_cache.py says how.
//
// Integers are never widened into memory. A query is multiplied with the steps of a block's channels once,
// for all of its keys; a value's step goes into its weight.
#pragma once

#include <vector>

#include "select.h"
#include "stored.h"

// LANES<T> bytes as numbers.
template <class T>
inline Vector<T> load_bytes(const uint8_t* p) {
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4)
        return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(__AVX2__)
    if constexpr (sizeof(T) == 4)
        return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#endif
    return __builtin_convertvector(Narrow<T, uint8_t>::load(p), Vector<T>);
}

// The low and the high halves of LANES<T> bytes as numbers.
template <class T>
inline void load_halves(const uint8_t* p, Vector<T>& low, Vector<T>& high) {
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4) {
        const __m512i wide = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
        low = _mm512_cvtepi32_ps(_mm512_and_si512(wide, _mm512_set1_epi32(15)));
        high = _mm512_cvtepi32_ps(_mm512_srli_epi32(wide, 4));
        return;
    }
#elif defined(__AVX2__)
    if constexpr (sizeof(T) == 4) {
        const __m256i wide = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
        low = _mm256_cvtepi32_ps(_mm256_and_si256(wide, _mm256_set1_epi32(15)));
        high = _mm256_cvtepi32_ps(_mm256_srli_epi32(wide, 4));
        return;
    }
#endif
    const auto bytes = Narrow<T, uint8_t>::load(p);
    low = __builtin_convertvector(bytes & 15, Vector<T>);
    high = __builtin_convertvector(bytes >> 4, Vector<T>);
}

// out[i] = sum of a (dim,) times the i-th of `count` rows of integers, `stride` bytes apart.
template <class T, int BITS>
void dot_codes(const T* a, const uint8_t* codes, long count, long dim, long stride, T* out) {
    constexpr int TOGETHER = 4;
    const long bytes = dim * BITS / 8;
    for (long i = 0; i < count; i += TOGETHER, codes += TOGETHER * stride) {
        const int rows = int(std::min<long>(TOGETHER, count - i));
        const long step = rows == TOGETHER ? stride : 0;  // fewer: the first one again and again
        Vector<T> sums[TOGETHER] = {};
        long j = 0;
        for (; j + LANES<T> <= bytes; j += LANES<T>) {
            const Vector<T> x = load<T>(a + j);
            if constexpr (BITS == 8) {
#pragma GCC unroll 4
                for (int k = 0; k < TOGETHER; ++k) sums[k] += x * load_bytes<T>(codes + k * step + j);
            } else {
                const Vector<T> y = load<T>(a + bytes + j);
#pragma GCC unroll 4
                for (int k = 0; k < TOGETHER; ++k) {
                    Vector<T> low, high;
                    load_halves<T>(codes + k * step + j, low, high);
                    sums[k] += x * low + y * high;
                }
            }
        }
        for (int k = 0; k < rows; ++k) {
            if (rows < TOGETHER && k > 0) {  // the rest of a short tile, one by one
                dot_codes<T, BITS>(a, codes + k * stride, 1, dim, stride, out + i + k);
                continue;
            }
            T sum = total<T>(sums[k]);
            for (long rest = j; rest < bytes; ++rest) {
                const uint8_t byte = codes[k * stride + rest];
                sum += BITS == 8 ? a[rest] * byte : a[rest] * (byte & 15) + a[bytes + rest] * (byte >> 4);
            }
            out[i + k] = sum;
        }
    }
}

// to (dim,) += the sum of weights[i] * the i-th of `count` rows of integers.
template <class T, int BITS>
void add_codes(T* to, const T* weights, const uint8_t* codes, long count, long dim) {
    constexpr int WIDE = 2;
    const long bytes = dim * BITS / 8;
    const auto add = [](T* place, const Vector<T>& sum) { store<T>(place, load<T>(place) + sum); };
    const auto columns = [&](long j, auto wide) {
        constexpr int VECTORS = decltype(wide)::value;
        Vector<T> low_sums[VECTORS] = {}, high_sums[VECTORS] = {};
        for (long i = 0; i < count; ++i)
#pragma GCC unroll 2
            for (int v = 0; v < VECTORS; ++v) {
                const uint8_t* from = codes + i * bytes + j + v * LANES<T>;
                if constexpr (BITS == 8) {
                    low_sums[v] += load_bytes<T>(from) * weights[i];
                } else {
                    Vector<T> low, high;
                    load_halves<T>(from, low, high);
                    low_sums[v] += low * weights[i];
                    high_sums[v] += high * weights[i];
                }
            }
        for (int v = 0; v < VECTORS; ++v) {
            add(to + j + v * LANES<T>, low_sums[v]);
            if (BITS == 4) add(to + bytes + j + v * LANES<T>, high_sums[v]);
        }
    };
    long j = 0;
    for (; j + WIDE * LANES<T> <= bytes; j += WIDE * LANES<T>)
        columns(j, std::integral_constant<int, WIDE>{});
    for (; j + LANES<T> <= bytes; j += LANES<T>) columns(j, std::integral_constant<int, 1>{});
    for (; j < bytes; ++j)
        for (long i = 0; i < count; ++i) {
            const uint8_t byte = codes[i * bytes + j];
            if (BITS == 8) {
                to[j] += weights[i] * byte;
            } else {
                to[j] += weights[i] * (byte & 15);
                to[bytes + j] += weights[i] * (byte >> 4);
            }
        }
}

// The largest bfloat16 that is not above x.
template <class T>
inline BFloat16 down(T x) {
    const float near = float(x);
    int32_t bits;
    std::memcpy(&bits, &near, sizeof bits);
    bits &= ~0xffff;
    if (widen<T>(BFloat16{uint16_t(uint32_t(bits) >> 16)}) > x) bits += bits >= 0 ? -0x10000 : 0x10000;
    return {uint16_t(uint32_t(bits) >> 16)};
}

// Writes the grid of numbers between `least` and `most`; not `finite`: none.
template <class T, int BITS>
struct Grid {
    static constexpr int LEVELS = (1 << BITS) - 1;
    T low, step;
    Grid(T least, T most, bool finite, BFloat16& stored_low, BFloat16& stored_step) {
        stored_low = down<T>(least);
        stored_step = down<T>((widen<T>(stored_low) - most) / LEVELS);
        stored_step.bits ^= 0x8000;
        if (!finite) stored_low.bits = stored_step.bits = 0x7fc0;
        low = widen<T>(stored_low), step = widen<T>(stored_step);
    }
    uint8_t code(T x) const {
        const T steps = std::nearbyint((x - low) / (step > 0 ? step : T(1)));
        return steps > 0 ? uint8_t(std::min<T>(steps, LEVELS)) : 0;  // NaN: 0
    }
};

template <int BITS>
inline void put_code(uint8_t* row, long channel, long dim, uint8_t code) {
    if (BITS == 8)
        row[channel] = code;
    else if (channel < dim / 2)
        row[channel] = code;  // the high half comes later
    else
        row[channel - dim / 2] |= code << 4;
}

template <class A>
struct QuantizedMemory {
    uint8_t *keys, *values;
    BFloat16 *key_grids, *value_grids;
    A *tail_keys, *tail_values;
};

// Keys and values of one row of such a cache; see `Stored` in decode.h.
template <class T, class A, int BITS>
struct Quantized {
    using Memory = QuantizedMemory<A>;
    using Statistic = BFloat16;
    uint8_t *keys, *values;             // (tokens, bytes)
    BFloat16 *key_grids, *value_grids;  // (blocks, 2, dim), (tokens, 2)
    Rows<A> tail_keys, tail_values;
    long dim, bytes, block, own;

    Quantized(long row, long tokens, long width, long block_size, long position, const Memory& memory)
        : dim(width), bytes(width * BITS / 8), block(block_size), own(position / block_size) {
        keys = memory.keys + row * tokens * bytes;
        values = memory.values + row * tokens * bytes;
        key_grids = memory.key_grids + row * (tokens / block) * 2 * dim;
        value_grids = memory.value_grids + row * tokens * 2;
        tail_keys = {memory.tail_keys + row * block * dim, dim};
        tail_values = {memory.tail_values + row * block * dim, dim};
    }

    void put(long token, const T* key, const T* value) const {
        put_row<T>(tail_keys, token % block, key);
        put_row<T>(tail_values, token % block, value);
    }
    static long feature_bytes(Router router, long parts, long dim) {
        if (router == MINMAX) return parts * 2 * (dim * BITS / 8);
        return parts * (router == MEAN ? dim : 2 * dim) * long(sizeof(Statistic));
    }
    Rows<A> own_keys() const { return tail_keys; }
    Rows<A> own_values() const { return tail_values; }

    void logits(const T* scaled, long begin, long end, T* out) const {
        std::vector<T> steps(dim);
        for (long first = begin; first < end;) {
            const long number = first / block, last = std::min(end, (number + 1) * block);
            if (number == own) {
                dot_rows<T>(scaled, tail_keys.numbers + (first - own * block) * dim, last - first, dim, out);
            } else {
                const T base = on_grid(scaled, number, steps.data());
                dot_codes<T, BITS>(steps.data(), keys + first * bytes, last - first, dim, bytes, out);
                for (long i = 0; i < last - first; ++i) out[i] += base;
            }
            out += last - first;
            first = last;
        }
    }
    void add(T* out, T* weights, long begin, long end) const {
        const long whole = std::min(end, std::max(begin, own * block));  // behind it: the own block
        T shift = 0;
        for (long token = begin; token < whole; ++token) {
            T& weight = weights[token - begin];
            shift += weight * widen<T>(value_grids[2 * token]);
            weight *= widen<T>(value_grids[2 * token + 1]);
        }
        add_codes<T, BITS>(out, weights, values + begin * bytes, whole - begin, dim);
        for (long j = 0; j < dim; ++j) out[j] += shift;
        if (whole < end)
            add_rows<T>(out, weights + (whole - begin), tail_values.numbers + (whole - own * block) * dim,
                        end - whole, dim);
    }

    // The own block is complete: store it, and for the minmax router the bounds of its `parts`.
    void complete(Statistic* features, long parts) const {
        std::vector<T> row(dim);
        std::vector<Grid<T, BITS>> grids;
        BFloat16* grid = key_grids + own * 2 * dim;
        for (long j = 0; j < dim; ++j) {
            T least = widen<T>(tail_keys.numbers[j]), most = least, none = 0;
            for (long i = 0; i < block; ++i) {
                const T x = widen<T>(tail_keys.numbers[i * dim + j]);
                least = std::min(least, x), most = std::max(most, x), none += x - x;
            }
            grids.emplace_back(least, most, none == 0, grid[j], grid[dim + j]);
        }
        for (long i = 0; i < block; ++i) {
            const long token = own * block + i;
            get_row<T>(tail_keys, i, row.data());
            for (long j = 0; j < dim; ++j)
                put_code<BITS>(keys + token * bytes, j, dim, grids[j].code(row[j]));
            get_row<T>(tail_values, i, row.data());
            T least = row[0], most = least, none = 0;
            for (const T x : row) least = std::min(least, x), most = std::max(most, x), none += x - x;
            const Grid<T, BITS> of_value(least, most, none == 0, value_grids[2 * token],
                                         value_grids[2 * token + 1]);
            for (long j = 0; j < dim; ++j)
                put_code<BITS>(values + token * bytes, j, dim, of_value.code(row[j]));
        }
        if (!features) return;
        const long size = block / parts;
        uint8_t* bounds = reinterpret_cast<uint8_t*>(features) + own * parts * 2 * bytes;
        for (long part = 0; part < parts; ++part, bounds += 2 * bytes)
            for (long byte = 0; byte < bytes; ++byte) {
                uint8_t most[2] = {0, 0}, least[2] = {255, 255};
                for (long i = 0; i < size; ++i) {
                    const uint8_t stored = keys[(own * block + part * size + i) * bytes + byte];
                    const uint8_t halves[2] = {uint8_t(BITS == 8 ? stored : stored & 15),
                                               uint8_t(BITS == 8 ? 0 : stored >> 4)};
                    for (int h = 0; h < 2; ++h)
                        most[h] = std::max(most[h], halves[h]), least[h] = std::min(least[h], halves[h]);
                }
                bounds[byte] = BITS == 8 ? most[0] : most[0] | most[1] << 4;
                bounds[bytes + byte] = BITS == 8 ? least[0] : least[0] | least[1] << 4;
            }
    }

    // The minmax router's scores of the parts of blocks 0 .. count-1, for query features (2 dim,).
    void bound_scores(const T* query, const Statistic* features, long parts, long count, T* out) const {
        const uint8_t* bounds = reinterpret_cast<const uint8_t*>(features);
        std::vector<T> most(dim), least(dim), of_least(parts);
        for (long number = 0; number < count; ++number, out += parts, bounds += parts * 2 * bytes) {
            const T base = on_grid(query, number, most.data()) + on_grid(query + dim, number, least.data());
            dot_codes<T, BITS>(most.data(), bounds, parts, dim, 2 * bytes, out);
            dot_codes<T, BITS>(least.data(), bounds + bytes, parts, dim, 2 * bytes, of_least.data());
            for (long part = 0; part < parts; ++part) out[part] += of_least[part] + base;
        }
    }

  private:
    // a (dim,) times the steps of a block's channels; returns a times their lows.
    T on_grid(const T* a, long number, T* steps) const {
        const BFloat16* grid = key_grids + number * 2 * dim;
        long j = 0;
        for (; j + LANES<T> <= dim; j += LANES<T>)
            store<T>(steps + j, load<T>(a + j) * load_stored<T>(grid + dim + j));
        for (; j < dim; ++j) steps[j] = a[j] * widen<T>(grid[dim + j]);
        return dot<T>(a, grid, dim);
    }
};
