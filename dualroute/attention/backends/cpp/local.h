// The local route: o_t = sum_s softmax_s(q_t . k_s / sqrt(d)) v_s over 0 <= t - s < window in one document.
//
// Work is cut into pieces of neighbouring tiles. A piece owns the gradients of its own keys; what it adds to
// keys before them goes to a buffer of its own, and the buffers are added up at the end, in order. So the
// sums do not depend on how many threads there are.
#pragma once

#include "tiles.h"

struct LocalTile {
    long begin, document;  // slots
    int rows;
};

// Tiles of at most TILE rows that never cross documents, counted from the beginning of their document.
inline std::vector<LocalTile> local_tiles(const Shape& shape) {
    std::vector<LocalTile> tiles;
    for (long b = 0; b < shape.blocks();) {
        const long document = shape.document(b);
        while (b < shape.blocks() && shape.document(b) == document) ++b;
        for (long slot = document; slot < b * shape.block; slot += TILE)
            tiles.push_back({slot, document, int(std::min<long>(TILE, b * shape.block - slot))});
    }
    return tiles;
}

// Turned tiles of keys and values, kept while the window moves over them.
template <class T, class S>
struct LocalKeys {
    long dim;
    std::vector<TurnedKeys<T, S>> ring;
    std::vector<long> held;

    LocalKeys(long window, long dim, bool values_too) : dim(dim), held((window + TILE - 2) / TILE + 2, -1) {
        for (size_t i = 0; i < held.size(); ++i) ring.emplace_back(dim, TILE, values_too);
    }

    // The tile of `count` keys from slot `begin` on, of a head whose rows begin at `key` and `value`.
    const Keys<T>& get(const S* key, const S* value, long begin, long document, int count) {
        const long place = (begin - document) / TILE % held.size();
        if (held[place] == begin) return ring[place].view;
        held[place] = begin;
        return ring[place].turn(key + begin * dim, value + begin * dim, count);
    }
};

// Calls step(keys, band, first slot) for the tiles of keys that a tile of queries sees.
template <class T, class S, class Step>
void for_local_keys(const LocalTile& tile, long window, const S* key, const S* value, LocalKeys<T, S>& cache,
                    Step step) {
    const long oldest = std::max(tile.document, tile.begin - window + 1);
    const long first = tile.document + (oldest - tile.document) / TILE * TILE;
    for (long begin = first; begin <= tile.begin; begin += TILE) {
        const int count = begin == tile.begin ? tile.rows : TILE;
        step(cache.get(key, value, begin, tile.document, count), Band{true, tile.begin - begin, window},
             begin);
    }
}

struct LocalPieces {
    std::vector<LocalTile> tiles;
    long size, count;
    // At least four times as long as the window, to turn few keys twice; but in quarters at least, so that
    // one head keeps some threads busy even where the window hides nothing.
    explicit LocalPieces(const Shape& shape, long window) : tiles(local_tiles(shape)) {
        const long all = tiles.size();
        size = std::max(32L, std::min((window + TILE - 1) / TILE * 4, (all + 3) / 4));
        count = (all + size - 1) / size;
    }
    long first(long piece) const { return piece * size; }
    long last(long piece) const { return std::min<long>(tiles.size(), (piece + 1) * size); }
};

template <class T, class S>
void local_forward(const Shape& shape, long window, T scale, const S* query, const S* key, const S* value,
                   S* out, T* lse) {
    const LocalPieces pieces(shape, window);
    const long dim = shape.dim, row = shape.slots * dim;
#pragma omp parallel for collapse(2) schedule(dynamic) num_threads(shape.threads)
    for (long head = 0; head < shape.heads; ++head)
        for (long piece = 0; piece < pieces.count; ++piece) {
            const long kv = head / shape.group();
            Scratch<T> scratch(dim, dim, TILE);
            LocalKeys<T, S> cache(window, dim, false);
            for (long i = pieces.first(piece); i < pieces.last(piece); ++i) {
                const LocalTile& tile = pieces.tiles[i];
                S* rows_out = out + head * row + tile.begin * dim;
                T* sums = in_place(rows_out, scratch.output.data());
                scale_row<T>(scratch.query.data(), query + head * row + tile.begin * dim, scale,
                             tile.rows * dim);
                std::fill_n(sums, tile.rows * dim, T(0));
                std::fill_n(scratch.peak, TILE, T(UNSEEN));
                std::fill_n(scratch.norm, TILE, T(0));
                for_local_keys(tile, window, key + kv * row, value + kv * row, cache,
                               [&](const Keys<T>& keys, const Band& band, long) {
                                   attend_tile<T>(scratch.query.data(), dim, tile.rows, keys, dim, band,
                                                  close_nothing<T>, sums, scratch);
                               });
                for (int r = 0; r < tile.rows; ++r) {
                    scale_row<T>(sums + r * dim, sums + r * dim, 1 / scratch.norm[r], dim);
                    lse[head * shape.slots + tile.begin + r] = scratch.peak[r] + std::log(scratch.norm[r]);
                }
                put_numbers(rows_out, sums, tile.rows * dim);
            }
        }
}

template <class T, class S>
void local_backward(const Shape& shape, long window, T scale, const S* grad, const S* query, const S* key,
                    const S* value, const S* out, const T* lse, S* to_query, T* to_key, T* to_value) {
    const LocalPieces pieces(shape, window);
    const long dim = shape.dim, row = shape.slots * dim, reach = (window + TILE - 2) / TILE * TILE;
    // Gradients of the keys and values that lie before a piece: 2 * reach * dim numbers each.
    std::vector<std::vector<T>> before(shape.kv_heads * pieces.count);
#pragma omp parallel for collapse(2) schedule(dynamic) num_threads(shape.threads)
    for (long kv = 0; kv < shape.kv_heads; ++kv)
        for (long piece = 0; piece < pieces.count; ++piece) {
            Scratch<T> scratch(dim, dim, TILE);
            LocalKeys<T, S> cache(window, dim, true);
            const LocalTile& first = pieces.tiles[pieces.first(piece)];
            const LocalTile& last = pieces.tiles[pieces.last(piece) - 1];
            const long start = first.begin, past = std::min(reach, start - first.document);
            std::vector<T>& earlier = before[kv * pieces.count + piece];
            earlier.assign(2 * past * dim, T(0));
            const long own = (last.begin + last.rows - start) * dim;
            std::fill_n(to_key + kv * row + start * dim, own, T(0));
            std::fill_n(to_value + kv * row + start * dim, own, T(0));
            for (long i = pieces.first(piece); i < pieces.last(piece); ++i)
                for (long head = kv * shape.group(); head < (kv + 1) * shape.group(); ++head) {
                    const LocalTile& tile = pieces.tiles[i];
                    const long place = head * row + tile.begin * dim;
                    scale_row<T>(scratch.query.data(), query + place, scale, tile.rows * dim);
                    softmax_delta<T>(grad + place, out + place, tile.rows, dim, scratch.delta);
                    const T* rows_grad = widened<T>(grad + place, tile.rows * dim, scratch.grad.data());
                    T* sums = scratch.to_query.data();
                    std::fill_n(sums, tile.rows * dim, T(0));
                    for_local_keys(tile, window, key + kv * row, value + kv * row, cache,
                                   [&](const Keys<T>& keys, const Band& band, long begin) {
                                       T* key_sums = begin >= start
                                                         ? to_key + kv * row + begin * dim
                                                         : earlier.data() + (begin - start + past) * dim;
                                       T* value_sums = begin >= start ? to_value + kv * row + begin * dim
                                                                      : key_sums + past * dim;
                                       attend_tile_backward<T>(
                                           scratch.query.data(), dim, rows_grad, tile.rows, keys, dim, band,
                                           close_nothing<T>, lse + head * shape.slots + tile.begin,
                                           scratch.delta, sums, key_sums, value_sums, scratch);
                                   });
                    scale_row<T>(sums, sums, scale, tile.rows * dim);
                    put_numbers(to_query + place, sums, tile.rows * dim);
                }
        }
#pragma omp parallel for num_threads(shape.threads)
    for (long kv = 0; kv < shape.kv_heads; ++kv)
        for (long piece = 0; piece < pieces.count; ++piece) {
            const std::vector<T>& earlier = before[kv * pieces.count + piece];
            const long size = earlier.size() / 2,
                       place = kv * row + pieces.tiles[pieces.first(piece)].begin * dim - size;
            add_row<T>(to_key + place, earlier.data(), T(1), size);
            add_row<T>(to_value + place, earlier.data() + size, T(1), size);
        }
}
