// What both directions of routed attention share: one softmax over a token's own block, the sink, its chosen
// blocks and the far summary of all others.
//
// The chosen blocks are read block by block: the tokens that chose a block are gathered into tiles. Work is
// cut into pieces of neighbouring slots of one key head, which own their queries; as in local.h, a piece
// collects what it adds to keys before its own in a buffer, and the buffers are added up in order.
//
// A block's turn comes once. First the tokens that chose it read it, then its own tokens read it, the sink
// and the summaries. Causal, they are done: they have already met all blocks before it. Where tokens see both
// sides, all are done after the last block.
#pragma once

#include "tiles.h"

// Pseudo-keys of all blocks of a stream: (kv_heads, blocks, width) and (kv_heads, blocks, dim).
template <class T>
struct Far {
    const T *keys, *values;
    long width;  // 0: none
    Far of_head(long kv, const Shape& shape) const {
        if (!width) return *this;
        return {keys + kv * shape.blocks() * width, values + kv * shape.blocks() * shape.dim, width};
    }
};

template <class T, class S>
struct RoutedProblem {
    Shape shape;
    T scale;                       // 1 / sqrt(d)
    const S *query, *key, *value;  // (heads, slots, dim), (kv_heads, slots, dim)
    Far<T> far;
    const int32_t* selected;  // (kv_heads, slots, columns): the sink, then the chosen blocks, -1 = none
    int columns;
};

// Pieces of whole blocks. More than one for each key head only where the heads do not keep all threads busy:
// the fewer tokens a piece has, the fewer share a block's tile.
struct Pieces {
    long count, blocks;  // pieces of each key head; blocks of each piece
    explicit Pieces(const Shape& shape) {
        const long threads = shape.threads, least = std::max(1L, 1024 / shape.block);
        const long wanted =
            shape.kv_heads % threads == 0 ? 1 : (4 * threads + shape.kv_heads - 1) / shape.kv_heads;
        blocks = std::max((shape.blocks() + wanted - 1) / wanted, least);
        count = (shape.blocks() + blocks - 1) / blocks;
    }
};

// Calls work(piece, key head, first block, last + 1 block) for all pieces in parallel, the longest ones
// first.
template <class Work>
void for_pieces(const Shape& shape, Work work) {
    const Pieces pieces(shape);
#pragma omp parallel for collapse(2) schedule(dynamic) num_threads(shape.threads)
    for (long order = 0; order < pieces.count; ++order)
        for (long kv = 0; kv < shape.kv_heads; ++kv) {
            const long piece = pieces.count - 1 - order, first = piece * pieces.blocks;
            work(piece, kv, first, std::min(shape.blocks(), first + pieces.blocks));
        }
}

// Whether all chosen blocks are -1 or others of the token's document, causal past ones.
inline bool readable(const Shape& shape, const int32_t* selected, int columns) {
    bool all = true;
#pragma omp parallel for reduction(&& : all) num_threads(shape.threads)
    for (long row = 0; row < shape.kv_heads * shape.slots; ++row) {
        const long own = row % shape.slots / shape.block;
        const int32_t first = shape.first_block[own];
        for (int c = 1; c < columns; ++c) {
            const int32_t block = selected[row * columns + c];
            all = all && (block < 0 || (block >= first && block < shape.end(own) && block != own &&
                                        !shape.hides(own, block, block + 1)));
        }
    }
    return all;
}

// Which tokens of a piece chose each block: tokens[start[b - first] .. start[b + 1 - first]), ascending.
struct Readers {
    std::vector<int32_t> start, tokens;
    Readers(const int32_t* selected, int columns, long begin, long end, long first, long last)
        : start(last - first + 2) {
        const auto for_choices = [&](auto step) {
            for (long token = begin; token < end; ++token)
                for (int c = 1; c < columns; ++c)
                    if (selected[token * columns + c] >= 0)
                        step(token, selected[token * columns + c] - first);
        };
        for_choices([&](long, long block) { ++start[block + 2]; });
        for (size_t i = 2; i < start.size(); ++i) start[i] += start[i - 1];
        tokens.resize(start.back());
        for_choices([&](long token, long block) { tokens[start[block + 1]++] = token; });
    }
};

// One piece of one key head. T is computed in, S how queries, keys and values are stored.
template <class T, class S>
struct Routed {
    const Shape& shape;
    const Far<T> far;  // of this head
    const T scale;
    const S *query, *key, *value;  // of the first head of the group
    const int32_t* selected;
    const int columns;
    const long first, last, start, stop;  // blocks of the piece, and of all that its tokens may read
    const long begin, slots;              // the same in slots: the first one, and how many
    const bool backward, packs;
    const long far_depth, value_depth;  // numbers of a packed row of summaries, and of their values
    const Readers readers;
    TurnedKeys<T, S> block_turned, sink_turned;
    Buffer<T> far_turned, far_values;  // summaries of the document `summarised`, in tiles
    Buffer<BFloat16> far_key_pairs, far_value_pairs, far_columns, far_queries;  // backward rows and columns
    long sink = -1, summarised = -1;
    alignas(64) T far_bias[TILE];
    Scratch<T> scratch;

    Routed(const RoutedProblem<T, S>& p, long kv, long first, long last, bool backward)
        : shape(p.shape),
          far(p.far.of_head(kv, shape)),
          scale(p.scale),
          query(p.query + kv * shape.group() * shape.slots * shape.dim),
          key(p.key + kv * shape.slots * shape.dim),
          value(p.value + kv * shape.slots * shape.dim),
          selected(p.selected + kv * shape.slots * p.columns),
          columns(p.columns),
          first(first),
          last(last),
          start(shape.first_block[first]),
          stop(std::max(last, shape.end(last - 1))),
          begin(first * shape.block),
          slots((last - first) * shape.block),
          backward(backward),
          packs(shape.packs),
          far_depth(round_to(far.width, DEPTH)),
          value_depth(round_to(shape.dim, DEPTH)),
          readers(selected, columns, first * shape.block, last * shape.block, start, stop),
          block_turned(shape.dim, shape.block, backward, packs),
          sink_turned(shape.dim, shape.block, backward, packs),
          far_turned(packs ? 0 : far_tiles() * far.width * TILE),
          far_values(backward && !packs ? far_tiles() * shape.dim * TILE : 0),
          far_key_pairs(packs ? far_tiles() * far_depth * TILE : 0),
          far_value_pairs(packs ? far_tiles() * value_depth * TILE : 0),
          far_columns(packs && backward ? far_tiles() * far.width * TILE : 0),
          far_queries(packs && !backward ? far_depth * TILE : 0),
          scratch(shape.dim, std::max(shape.dim, far.width), std::max<long>(TILE, block_turned.row),
                  packs && !backward) {
        if (packs && !backward) std::fill_n(far_queries.data(), far_depth * TILE, BFloat16{});
    }

    const Keys<T>& turn(long block, TurnedKeys<T, S>& turned) const {
        const long place = block * shape.block * shape.dim;
        return turned.turn(key + place, value + place, shape.tokens(block));
    }
    const Keys<T>& sink_keys(long block) {
        if (sink == block) return sink_turned.view;
        sink = block;
        return turn(block, sink_turned);
    }

    // Last + 1 block of a document, as far as this piece looks.
    long end_of(long document) const {
        long end = document;
        while (end < stop && shape.first_block[end] == document) ++end;
        return end;
    }
    // Tiles of summaries of the longest document.
    long far_tiles() const {
        long most = 0;
        for (long document = start; far.width && document < stop;) {
            const long end = end_of(document);
            most = std::max(most, (end - document + TILE - 1) / TILE);
            document = end;
        }
        return most;
    }

    // Tiles begin with their document: nothing of another one is ever multiplied, not even by a weight of 0.
    void turn_summaries(long document) {
        if (summarised == document) return;
        summarised = document;
        const long end = end_of(document);
        for (long tile = 0; document + tile * TILE < end; ++tile) {
            const long block = document + tile * TILE, count = std::min<long>(TILE, end - block);
            if (packs) {
                pack_summaries(block, count, tile);
                continue;
            }
            transpose<T>(far_turned.data() + tile * far.width * TILE, TILE, far.keys + block * far.width,
                         far.width, count, far.width);
            if (backward)
                transpose<T>(far_values.data() + tile * shape.dim * TILE, TILE,
                             far.values + block * shape.dim, shape.dim, count, shape.dim);
        }
    }

    // Summaries for products of bfloat16: rounded like keys and values.
    void pack_summaries(long block, int count, long tile) {
        if constexpr (std::is_same_v<T, float>) {
            Buffer<BFloat16> keys(TILE * far.width), values(TILE * shape.dim);
            store_halves(keys.data(), far.keys + block * far.width, count * far.width);
            store_halves(values.data(), far.values + block * shape.dim, count * shape.dim);
            BFloat16 *to = far_key_pairs.data() + tile * far_depth * TILE,
                     *to_values = far_value_pairs.data() + tile * value_depth * TILE;
            if (backward) {
                pack_columns(far_columns.data() + tile * far.width * TILE, TILE, keys.data(), count,
                             far.width, to);
                pack_left(to, TILE, far_depth, keys.data(), count, far.width);
                pack_left(to_values, TILE, value_depth, values.data(), count, shape.dim);
            } else {
                pack_transposed(to, TILE, far_depth, keys.data(), count, far.width);
                pack_rows(to_values, TILE, values.data(), count, shape.dim);
            }
        }
    }

    // What the summaries are multiplied by: the queries of the scratch.
    Queries<T> summary_queries(int rows) {
        if (packs) {
            if constexpr (std::is_same_v<T, float>) pack_far_queries(rows);
        } else {
            far_features(scratch.query.data(), rows, scratch.to_query.data());
        }
        return {scratch.to_query.data(), int(far.width), far_queries.data(), scale};
    }
    void pack_far_queries(int rows) {
        for (int r = 0; r < rows; ++r)
            put_far_query(scratch.packed_query.data() + r * scratch.depth,
                          far_queries.data() + r * far_depth);
    }
    void put_far_query(const BFloat16* from, BFloat16* to) const {
        if constexpr (std::is_same_v<T, float>) {
            copy_row(to, from, shape.dim);
            for (long j = 0; far.width > shape.dim && j < shape.dim; j += LANES<float>) {
                const Vector<float> q = load_stored<float>(from + j);
                store_half(to + shape.dim + j, q * q * (0.5f * float(scale)));
            }
        }
    }

    // Calls step(summaries, their first block) for the tiles of summaries that block `own` may read.
    template <class Step>
    void for_far(long own, Step step) {
        const long document = shape.first_block[own], end = shape.end(own);
        if (!far.width || end <= document + 1) return;
        turn_summaries(document);
        for (long tile = 0; document + tile * TILE < end; ++tile) {
            const long block = document + tile * TILE;
            if (shape.hides(own, block, block + TILE)) continue;
            Packed packed;
            if (packs) {
                const BFloat16 *keys = far_key_pairs.data() + tile * far_depth * TILE,
                               *values = far_value_pairs.data() + tile * value_depth * TILE,
                               *columns = far_columns.data() + tile * far.width * TILE;
                packed = backward ? Packed{nullptr, nullptr, far_depth, keys, values, columns}
                                  : Packed{keys, values, far_depth};
            }
            step(Keys<T>{far.keys + block * far.width, far_turned.data() + tile * far.width * TILE,
                         far.values + block * shape.dim, far_values.data() + tile * shape.dim * TILE, TILE,
                         int(std::min<long>(TILE, end - block)), packed},
                 block);
        }
    }

    // What is added to the logits of a tile of summaries for the tokens of block `own`: log n, or -inf where
    // they do not read it: the sink, their own, what is hidden.
    void set_far_bias(long own, long tile_begin) {
        const T unit = packs ? 1 / scale : 1;  // packed, logits are multiplied by the scale later
        const long end = shape.end(own);
        const T whole = std::log(T(shape.block)) * unit;
        for (int j = 0; j < TILE; ++j) {
            const long block = tile_begin + j;
            const bool closed = block <= shape.first_block[own] || block == own || block >= end ||
                                shape.hides(own, block, block + 1);
            far_bias[j] = closed                               ? NEG_INF<T>
                          : shape.tokens(block) == shape.block ? whole
                                                               : std::log(T(shape.tokens(block))) * unit;
        }
    }
    // The column of a chosen block of a token in a tile of summaries, -1 for another tile's.
    int chosen_column(long slot, int choice, long tile_begin) const {
        const long column = selected[slot * columns + choice] - tile_begin;
        return column >= 0 && column < TILE ? int(column) : -1;
    }

    // Adds the bias to a tile of logits of summaries, and closes the blocks that the tokens from `slot` on
    // have chosen.
    auto close_far(long slot, long tile_begin) {
        set_far_bias(slot / shape.block, tile_begin);
        return [this, slot, tile_begin](T* logits, int row, int rows, int from, int to) {
            for (int r = 0; r < rows; ++r) {
                T* line = logits + r * TILE;
                for (int j = from; j < to; j += LANES<T>)
                    store<T>(line + j, load<T>(line + j) + load<T>(far_bias + j));
                for (int c = 1; c < columns; ++c) {
                    const int column = chosen_column(slot + row + r, c, tile_begin);
                    if (column >= 0) line[column] = NEG_INF<T>;
                }
            }
        };
    }
    // The same for the transposed logits of `rows` tokens.
    auto close_far_turned(long slot, int rows, long tile_begin) {
        set_far_bias(slot / shape.block, tile_begin);
        return [this, slot, rows, tile_begin](T* logits, int, int count) {
            for (int j = 0; j < count; ++j)
                for (int r = 0; r < TILE; r += LANES<T>)
                    store<T>(logits + j * TILE + r, load<T>(logits + j * TILE + r) + far_bias[j]);
            for (int r = 0; r < rows; ++r)
                for (int c = 1; c < columns; ++c) {
                    const int column = chosen_column(slot + r, c, tile_begin);
                    if (column >= 0) logits[column * TILE + r] = NEG_INF<T>;
                }
        };
    }

    // Features of scaled queries: q, and q^2 / 2 where the width asks for it.
    void far_features(const T* scaled, int rows, T* features) const {
        for (int r = 0; r < rows; ++r)
            for (long j = 0; j < shape.dim; j += LANES<T>) {
                const Vector<T> q = load<T>(scaled + r * shape.dim + j);
                store<T>(features + r * far.width + j, q);
                if (far.width > shape.dim) store<T>(features + r * far.width + shape.dim + j, q * q * T(0.5));
            }
    }
    // Adds the gradient of the features, (rows, width), to that of the queries.
    void add_far_features(const T* gradient, const T* scaled, int rows, T factor, T* to_query) const {
        for (int r = 0; r < rows; ++r)
            for (long j = 0; j < shape.dim; j += LANES<T>) {
                const T* line = gradient + r * far.width + j;
                T* to = to_query + r * shape.dim + j;
                Vector<T> sum = load<T>(line);
                if (far.width > shape.dim)
                    sum += load<T>(line + shape.dim) * load<T>(scaled + r * shape.dim + j);
                store<T>(to, load<T>(to) + sum * factor);
            }
    }

    // For all blocks: calls read(keys, block, member of the group, tokens, rows) for the tiles of its
    // readers, and then, if the block is the piece's own, own(keys, block, member, offset inside it, rows)
    // for the tiles of its tokens; finish(block, member, offset, rows) when they have read all.
    template <class Read, class Own, class Finish>
    void for_blocks(Read read, Own own, Finish finish) {
        for (long block = start; block < stop; ++block) {
            const bool inside = block >= first && block < last;
            const int begin = readers.start[block - start], end = readers.start[block - start + 1];
            if (begin == end && !inside) continue;
            const Keys<T> keys = turn(block, block_turned);
            for (int at = begin; at < end; at += TILE)
                for (long member = 0; member < shape.group(); ++member)
                    read(keys, block, member, readers.tokens.data() + at, std::min(TILE, end - at));
            if (!inside || shape.copied(block)) continue;
            for_rows([&](long member, long offset, int rows) {
                own(keys, block, member, offset, rows);
                if (shape.causal()) finish(block, member, offset, rows);
            });
        }
        for (long block = first; block < last && !shape.causal(); ++block)
            for_rows([&](long member, long offset, int rows) { finish(block, member, offset, rows); });
    }
    // Calls step(token) for the readers that follow those of a tile: what they need is far apart in memory.
    template <class Step>
    void for_next_readers(const int32_t* tokens, int rows, Step step) const {
        const int32_t *next = tokens + rows, *end = readers.tokens.data() + readers.tokens.size();
        for (const int32_t* token = next; token < std::min(next + TILE, end); ++token) step(*token);
    }
    // The tiles of a block's tokens.
    template <class Step>
    void for_rows(Step step) const {
        for (long member = 0; member < shape.group(); ++member)
            for (long offset = 0; offset < shape.block; offset += TILE)
                step(member, offset, int(std::min<long>(TILE, shape.block - offset)));
    }
    // What a block's own tokens see of it.
    Band own_band(long offset) const { return shape.causal() ? Band{true, offset, shape.block} : Band{}; }
};
