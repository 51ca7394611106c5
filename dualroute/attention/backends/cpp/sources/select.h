// Choosing blocks: scores of a tile of tokens against a tile of blocks, and a running best for each token.
//
// No (n, n / B) matrix exists: a token keeps its top_k while its scores pass by, 16 to 64 blocks at a time.
// Scores are compared as float32 and of equal ones the first block wins, as in `router.top_blocks`.
//
// And the order of keys that puts similar ones side by side: see core/clusters.py, `similar_order`.
#pragma once

#include <numeric>

#include "tiles.h"

enum Router { MINMAX, MOMENT, MEAN };

// Features of a tile of queries, summed over the heads that share keys; (rows, width).
template <class T, class S>
void query_features(const Shape& shape, Router router, T scale, const S* query, int rows, T* features,
                    long width) {
    const long dim = shape.dim;
    std::fill_n(features, rows * width, T(0));
    for (long member = 0; member < shape.group(); ++member, query += shape.slots * dim)
        for (int r = 0; r < rows; ++r)
            for (long j = 0; j < dim; j += LANES<T>) {
                T* to = features + r * width + j;
                const Vector<T> q = load_stored<T>(query + r * dim + j), zero{};
                if (router == MEAN) {
                    store<T>(to, load<T>(to) + q);
                } else if (router == MINMAX) {
                    store<T>(to, load<T>(to) + (q > zero ? q : zero));
                    store<T>(to + dim, load<T>(to + dim) + (q < zero ? q : zero));
                } else {
                    const Vector<T> scaled = q * scale;
                    store<T>(to, load<T>(to) + scaled);
                    store<T>(to + dim, load<T>(to + dim) + scaled * scaled * T(0.5));
                }
            }
}

// The best blocks of a token so far, the best one first; of equal ones the first block. `score` and `block`
// have room for WIDE.
struct Best {
    static constexpr int WIDE = 16;
    float* score;
    int32_t* block;
    int count;

    // Scores of the blocks from `first` on; `score` and `block` have room for WIDE.
    void put(Vector<float> scores, int32_t first) {
#if defined(__AVX512F__)
        if (count <= WIDE) {
            const __m512i last = _mm512_set1_epi32(count - 1);
            __m512 kept = _mm512_loadu_ps(score);
            __m512i blocks = _mm512_loadu_si512(block);
            const auto better = [&] {
                return _mm512_cmp_ps_mask(scores, _mm512_permutexvar_ps(last, kept), _CMP_GT_OQ);
            };
            unsigned left = better();
            if (!left) return;
            do {
                const int lane = __builtin_ctz(left);
                const __m512 fresh = _mm512_permutexvar_ps(_mm512_set1_epi32(lane), scores);
                const unsigned before = _mm512_cmp_ps_mask(kept, fresh, _CMP_GE_OQ);
                const __mmask16 others = ~(before + 1);  // all lanes but that of the fresh one
                kept = _mm512_mask_expand_ps(fresh, others, kept);
                blocks = _mm512_mask_expand_epi32(_mm512_set1_epi32(first + lane), others, blocks);
                left &= left - 1;
                left &= better();
            } while (left);
            _mm512_storeu_ps(score, kept);
            _mm512_storeu_si512(block, blocks);
            return;
        }
#endif
        if (!(largest<float>(scores) > worst())) return;
        for (int lane = 0; lane < LANES<float>; ++lane)
            if (scores[lane] > worst()) put(scores[lane], first + lane);
    }

    float worst() const { return score[count - 1]; }
    // A score above the worst.
    void put(float fresh, int32_t its_block) {
        int place = count - 1;
        for (; place > 0 && score[place - 1] < fresh; --place) {
            score[place] = score[place - 1];
            block[place] = block[place - 1];
        }
        score[place] = fresh;
        block[place] = its_block;
    }
};

// Features of all tiles of blocks as right operands, tile by tile. Bounds of bfloat16 keys are bfloat16
// numbers, so nothing is lost.
inline void pack_features(BFloat16* to, const float* from, long tiles, long width, long depth, long row,
                          int threads) {
#pragma omp parallel for num_threads(threads)
    for (long tile = 0; tile < tiles; ++tile) {
        Buffer<BFloat16> rows(width * row);
        store_halves(rows.data(), from + tile * width * row, width * row);
        pack_rows(to + tile * depth * row, depth, rows.data(), width, row);
    }
}

// Scores of a tile of tokens against all tiles of blocks, by one of two kinds of products.
template <class T>
struct Scores {
    const T* features;
    long width, row, depth;
    const BFloat16* packed;  // null: floats are multiplied
    Buffer<T> queries, scores;
    Buffer<BFloat16> left, rest;
    bool two;  // whether a half of a query's features leaves a rest: of sums over several heads

    Scores(const T* features, const BFloat16* packed, long width, long row, bool two)
        : features(features),
          width(width),
          row(row),
          depth(round_to(width, DEPTH)),
          packed(packed),
          queries(TILE * width),
          scores(TILE * row),
          left(packed ? TILE * depth : 0),
          rest(packed && two ? TILE * depth : 0),
          two(two) {
        for (BFloat16* rows : {packed ? left.data() : nullptr, packed && two ? rest.data() : nullptr})
            if (rows) std::fill_n(rows, TILE * depth, BFloat16{});
    }

    // After the features of `rows` queries were written to `queries`.
    void pack_queries(int rows) {
        if constexpr (std::is_same_v<T, float>)
            for (int r = 0; packed && r < rows; ++r)
                store_halves(left.data() + r * depth, queries.data() + r * width, width,
                             two ? rest.data() + r * depth : nullptr);
    }

    const T* with(long tile, int rows) {
        if constexpr (std::is_same_v<T, float>)
            if (packed) {
                const BFloat16* right = packed + tile * depth * row;
                const int padded = round_to(rows, SIDE);
                product(scores.data(), row, left.data(), depth, right, depth * SIDE, padded, row, depth,
                        false);
                if (two)
                    product(scores.data(), row, rest.data(), depth, right, depth * SIDE, padded, row, depth,
                            true);
                return scores.data();
            }
        multiply<T>(scores.data(), row, {queries.data(), width, 1}, features + tile * width * row, row, rows,
                    row, width, false);
        return scores.data();
    }
};

// Scores of LANES blocks from column `j` on, each the best of its parts, as floats.
template <class T>
inline Vector<float> best_parts(const T* line, int parts, int columns, int j) {
    Vector<float> score;
    if constexpr (std::is_same_v<T, float>) {
        score = load<float>(line + j);
        for (int part = 1; part < parts; ++part) {
            const Vector<float> other = load<float>(line + part * columns + j);
            score = score < other ? other : score;
        }
    } else {
        for (int i = 0; i < LANES<float>; ++i) {
            T best = line[j + i];
            for (int part = 1; part < parts; ++part) best = std::max(best, line[part * columns + j + i]);
            score[i] = float(best);
        }
    }
    return score;
}

// features: (kv_heads, tiles, width, parts, columns), block `tile * columns + column` of the stream.
// selected: (kv_heads, slots, 1 + top_k), all -1 at first.
template <class T, class S>
void select_blocks(const Shape& shape, Router router, T scale, const S* query, const T* features, int parts,
                   int columns, int top_k, int32_t* selected) {
    const long dim = shape.dim, width = router == MEAN ? dim : 2 * dim, blocks = shape.blocks();
    const long tiles = (blocks + columns - 1) / columns, row = parts * columns,
               depth = round_to(width, DEPTH);
    const bool packs = std::is_same_v<T, float> && shape.packs && router == MINMAX;
    Buffer<BFloat16> packed(packs ? shape.kv_heads * tiles * depth * row : 0);
    if constexpr (std::is_same_v<T, float>)
        if (packs)
            pack_features(packed.data(), features, shape.kv_heads * tiles, width, depth, row, shape.threads);
#pragma omp parallel num_threads(shape.threads)
    {
        const Tiles held(packs);
        Scores<T> scores(features, packs ? packed.data() : nullptr, width, row, shape.group() > 1);
        const int room = std::max(top_k, Best::WIDE);
        std::vector<float> best(TILE * room), open(columns);
        std::vector<int32_t> found(TILE * room);
#pragma omp for collapse(2) schedule(dynamic)
        for (long order = 0; order < blocks; ++order)
            for (long kv = 0; kv < shape.kv_heads; ++kv) {
                const long own = blocks - 1 - order,
                           first = shape.first_block[own];  // the longest work first
                const long end = shape.end(own);
                if ((own == first && shape.causal()) || shape.copied(own)) continue;
                for (long offset = 0; offset < shape.block; offset += TILE) {
                    const int rows = std::min<long>(TILE, shape.block - offset);
                    const long slot = own * shape.block + offset;
                    int32_t* chosen = selected + (kv * shape.slots + slot) * (1 + top_k);
                    for (int r = 0; r < rows && own > first; ++r) chosen[r * (1 + top_k)] = first;
                    if (top_k == 0) continue;
                    query_features<T>(shape, router, scale,
                                      query + (kv * shape.group() * shape.slots + slot) * dim, rows,
                                      scores.queries.data(), width);
                    scores.pack_queries(rows);
                    std::fill(best.begin(), best.end(), -INFINITY);
                    std::fill(found.begin(), found.end(), -1);
                    for (long tile = (first + 1) / columns; tile * columns < end; ++tile) {
                        if (shape.hides(own, tile * columns, (tile + 1) * columns)) continue;
                        const T* lines = scores.with(kv * tiles + tile, rows);
                        const int from = std::max(0L, first + 1 - tile * columns);
                        const int to = std::min<long>(columns, end - tile * columns);
                        for (int j = 0; j < columns; ++j) {
                            const long block = tile * columns + j;
                            const bool closed =
                                j < from || j >= to || block == own || shape.hides(own, block, block + 1);
                            open[j] = closed ? -INFINITY : INFINITY;
                        }
                        for (int r = 0; r < rows; ++r) {
                            Best kept{best.data() + r * room, found.data() + r * room, top_k};
                            for (int j = 0; j < columns; j += LANES<float>) {
                                const Vector<float> score = best_parts(lines + r * row, parts, columns, j),
                                                    most = load<float>(open.data() + j);
                                kept.put(most < score ? most : score, tile * columns + j);
                            }
                        }
                    }
                    for (int r = 0; r < rows && end > first + 1; ++r)
                        std::copy_n(found.data() + r * room, top_k, chosen + r * (1 + top_k) + 1);
                }
            }
    }
}

// The channel of the keys numbers[0 .. size) that varies most; of equal ones the first.
template <class T, class S>
long widest_channel(const S* keys, long dim, const int32_t* numbers, long size, std::vector<double>& mean,
                    std::vector<double>& spread) {
    std::fill(mean.begin(), mean.end(), 0.0);
    std::fill(spread.begin(), spread.end(), 0.0);
    for (long i = 0; i < size; ++i)
        for (long j = 0; j < dim; ++j) mean[j] += double(widen<T>(keys[numbers[i] * dim + j]));
    for (long j = 0; j < dim; ++j) mean[j] /= size;
    for (long i = 0; i < size; ++i)
        for (long j = 0; j < dim; ++j) {
            const double off = double(widen<T>(keys[numbers[i] * dim + j])) - mean[j];
            spread[j] += off * off;
        }
    return std::max_element(spread.begin(), spread.end()) - spread.begin();
}

// order (spans, size): keys (spans, size, dim) are halved until cells of `cell` keys are left.
template <class T, class S>
void similar_order(const S* keys, long spans, long size, long dim, long cell, int threads, int32_t* order) {
#pragma omp parallel num_threads(threads)
    {
        std::vector<double> mean(dim), spread(dim);
        std::vector<std::pair<double, int32_t>> values(size);
#pragma omp for schedule(dynamic)
        for (long span = 0; span < spans; ++span) {
            const S* of_span = keys + span * size * dim;
            int32_t* numbers = order + span * size;
            std::iota(numbers, numbers + size, 0);
            for (long count = size; count > cell; count /= 2)
                for (int32_t* part = numbers; part < numbers + size; part += count) {
                    const long channel = widest_channel<T>(of_span, dim, part, count, mean, spread);
                    for (long i = 0; i < count; ++i)
                        values[i] = {double(widen<T>(of_span[part[i] * dim + channel])), part[i]};
                    std::nth_element(values.begin(), values.begin() + count / 2, values.begin() + count);
                    for (long i = 0; i < count; ++i) part[i] = values[i].second;
                    std::sort(part, part + count / 2);  // a half is in the order of the text
                    std::sort(part + count / 2, part + count);
                }
        }
    }
}
