// Choosing blocks: scores of a tile of tokens against a tile of blocks, and a running best for each token.
//
// No (n, n / B) matrix exists: a token keeps its top_k while its scores pass by, 16 to 64 blocks at a time.
// Scores are compared as float32 and of equal ones the first block wins, as in `router.top_blocks`.
#pragma once

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

// The top_k best of a token, in no order.
struct Best {
    float* score;
    int32_t* block;
    int count;
    float worst() const { return *std::min_element(score, score + count); }
    // Takes the place of the worst; of equally bad ones the last block goes.
    void put(float new_score, int32_t new_block) {
        int place = 0;
        for (int i = 1; i < count; ++i)
            if (score[i] < score[place] || (score[i] == score[place] && block[i] > block[place])) place = i;
        score[place] = new_score;
        block[place] = new_block;
    }
};

// features: (kv_heads, tiles, width, parts, columns), block `tile * columns + column` of the stream.
// selected: (kv_heads, slots, 1 + top_k), all -1 at first.
template <class T, class S>
void select_blocks(const Shape& shape, Router router, T scale, const S* query, const T* features, int parts,
                   int columns, int top_k, int32_t* selected) {
    const long dim = shape.dim, width = router == MEAN ? dim : 2 * dim, blocks = shape.blocks();
    const long tiles = (blocks + columns - 1) / columns, row = parts * columns;
#pragma omp parallel num_threads(shape.threads)
    {
        Buffer<T> rows_features(TILE * width), scores(TILE * row);
        std::vector<float> best(TILE * top_k), worst(TILE), compared(columns);
        std::vector<int32_t> closed(columns);
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
                                      rows_features.data(), width);
                    std::fill(best.begin(), best.end(), -INFINITY);
                    std::fill(worst.begin(), worst.end(), -INFINITY);
                    for (long tile = (first + 1) / columns; tile * columns < end; ++tile) {
                        if (shape.hides(own, tile * columns, (tile + 1) * columns)) continue;
                        multiply<T>(scores.data(), row, {rows_features.data(), width, 1},
                                    features + (kv * tiles + tile) * width * row, row, rows, row, width,
                                    false);
                        const int from = std::max(0L, first + 1 - tile * columns);
                        const int to = std::min<long>(columns, end - tile * columns);
                        for (int j = 0; j < columns; ++j) {
                            const long block = tile * columns + j;
                            closed[j] =
                                j < from || j >= to || block == own || shape.hides(own, block, block + 1);
                        }
                        for (int r = 0; r < rows; ++r) {
                            const T* line = scores.data() + r * row;
                            float top = -INFINITY;
                            for (int j = 0; j < columns; ++j) {
                                T score = line[j];
                                for (int part = 1; part < parts; ++part)
                                    score = std::max(score, line[part * columns + j]);
                                compared[j] = closed[j] ? -INFINITY : float(score);
                                top = std::max(top, compared[j]);
                            }
                            if (!(top > worst[r])) continue;
                            Best kept{best.data() + r * top_k, chosen + r * (1 + top_k) + 1, top_k};
                            for (int j = from; j < to; ++j)
                                if (compared[j] > worst[r]) {
                                    kept.put(compared[j], tile * columns + j);
                                    worst[r] = kept.worst();
                                }
                        }
                    }
                }
            }
    }
}
