// Routed attention, backward: gradients of queries, keys, values and of the summaries.
#pragma once

#include <utility>

#include "packed_backward.h"
#include "routed.h"

// Where gradients go; all (heads, ...) like what they are the gradients of. Those to which several pieces add
// are T.
template <class T, class S>
struct RoutedGradients {
    S* query;
    T *key, *value, *far_keys, *far_values;
};

// Gradients that a piece cannot write to their place: of keys outside of it, and of summaries, which others
// read too.
template <class T>
struct Sums {
    std::vector<T> keys, values;
    void clear(long keys_size, long values_size) {
        keys.assign(keys_size, T(0));
        values.assign(values_size, T(0));
    }
};

template <class T, class S>
struct RoutedBackward : Routed<T, S> {
    using Base = Routed<T, S>;
    using Base::shape, Base::far, Base::scratch, Base::scale, Base::begin, Base::slots;
    const S* grad;  // of the first head of the group, like to_query
    const T* lse;
    S* to_query;
    T *to_key, *to_value;
    std::vector<T> deltas;
    Buffer<T> query_sums;
    Sums<T>&outside, &summaries;
    PackedQueries packed;
    PackedScratch packed_scratch;

    RoutedBackward(const RoutedProblem<T, S>& problem, long kv, long first, long last, const S* grad,
                   const S* out, const T* lse, const RoutedGradients<T, S>& to, Sums<T>& outside,
                   Sums<T>& summaries)
        : Base(problem, kv, first, last, true),
          grad(grad + kv * shape.group() * shape.slots * shape.dim),
          lse(lse + kv * shape.group() * shape.slots),
          to_query(to.query + kv * shape.group() * shape.slots * shape.dim),
          to_key(to.key + kv * shape.slots * shape.dim),
          to_value(to.value + kv * shape.slots * shape.dim),
          deltas(shape.group() * slots),
          query_sums(std::is_same_v<T, S> ? 0 : deltas.size() * shape.dim),
          outside(outside),
          summaries(summaries),
          packed(std::max(shape.dim, far.width), shape.dim),
          packed_scratch(std::max(shape.dim, far.width)) {
        const long dim = shape.dim, blocks = this->stop - this->start,
                   others = (blocks - (last - first)) * shape.block * dim;
        outside.clear(others, others);
        summaries.clear(blocks * far.width, far.width ? blocks * dim : 0);
        std::fill_n(to_key + begin * dim, slots * dim, T(0));
        std::fill_n(to_value + begin * dim, slots * dim, T(0));
        out += kv * shape.group() * shape.slots * dim;
        for (long member = 0; member < shape.group(); ++member) {
            const long place = (member * shape.slots + begin) * dim;
            std::fill_n(sums_of(member, begin), slots * dim, T(0));
            softmax_delta<T>(this->grad + place, out + place, slots, dim, deltas.data() + member * slots);
        }
    }

    // The sums of a query's gradient.
    T* sums_of(long member, long token) {
        return in_place(to_query + (member * shape.slots + token) * shape.dim,
                        query_sums.data() + (member * slots + token - begin) * shape.dim);
    }

    T* key_sums(long block) { return sums(to_key, outside.keys, block); }
    T* value_sums(long block) { return sums(to_value, outside.values, block); }
    T* sums(T* all, std::vector<T>& others, long block) const {
        const long size = shape.block * shape.dim;
        if (block >= this->first && block < this->last) return all + block * size;
        return others.data() +
               (block - this->start - (block < this->first ? 0 : this->last - this->first)) * size;
    }

    void run() {
        this->for_blocks([this](auto... part) { read(part...); }, [this](auto... part) { own(part...); },
                         [this](auto... part) { finish(part...); });
    }

    // Tokens that chose the block.
    void read(const Keys<T>& keys, long block, long member, const int32_t* tokens, int rows) {
        if constexpr (std::is_same_v<S, BFloat16>)
            if (this->packs) return read_packed(keys, block, member, tokens, rows);
        const long dim = shape.dim, head = member * shape.slots;
        for (int i = 0; i < rows; ++i) {
            scale_row<T>(scratch.query.data() + i * dim, this->query + (head + tokens[i]) * dim, scale, dim);
            scale_row<T>(scratch.grad.data() + i * dim, grad + (head + tokens[i]) * dim, T(1), dim);
            scratch.lse[i] = lse[head + tokens[i]];
            scratch.delta[i] = deltas[member * slots + tokens[i] - begin];
        }
        T* collected = scratch.to_query.data();
        std::fill_n(collected, rows * dim, T(0));
        attend_tile_backward<T>(scratch.query.data(), dim, scratch.grad.data(), rows, keys, dim, Band{},
                                CloseNothing{}, scratch.lse, scratch.delta, collected, key_sums(block),
                                value_sums(block), scratch);
        for (int i = 0; i < rows; ++i)
            add_row<T>(sums_of(member, tokens[i]), collected + i * dim, scale, dim);
    }

    void read_packed(const Keys<float>& keys, long block, long member, const int32_t* tokens, int rows) {
        const long dim = shape.dim, head = member * shape.slots;
        this->for_next_readers(tokens, rows, [&](long token) {
            fetch_row(this->query + (head + token) * dim, dim);
            fetch_row(grad + (head + token) * dim, dim);
            fetch_row(sums_of(member, token), dim);
        });
        for (int i = 0; i < rows; ++i) put_packed(i, member, tokens[i]);
        packed.pack(rows);
        packed_scratch.clear(dim);
        attend_packed_backward(packed, keys, Band{}, scale, CloseNothing{}, key_sums(block),
                               value_sums(block), packed_scratch);
        const float* collected = packed_scratch.gradients(dim);
        for (int i = 0; i < rows; ++i) add_row<T>(sums_of(member, tokens[i]), collected + i * dim, T(1), dim);
    }
    // Token `token` becomes row `row` of the packed queries.
    void put_packed(int row, long member, long token) {
        const long dim = shape.dim, place = member * shape.slots + token;
        copy_row(packed.rows.data() + row * dim, this->query + place * dim, dim);
        copy_row(packed.grads.data() + row * dim, grad + place * dim, dim);
        packed.put(row, lse[place], deltas[member * slots + token - begin]);
    }

    // The block's own tokens: their block, the sink, the summaries.
    void own(const Keys<T>& keys, long block, long member, long offset, int rows) {
        if constexpr (std::is_same_v<S, BFloat16>)
            if (this->packs) return own_packed(keys, block, member, offset, rows);
        const long dim = shape.dim, slot = block * shape.block + offset, row = member * shape.slots + slot,
                   document = shape.first_block[block];
        const T* delta = deltas.data() + member * slots + slot - begin;
        const T* row_grad = widened<T>(grad + row * dim, rows * dim, scratch.grad.data());
        T *query = scratch.query.data(), *collected = scratch.to_query.data(), *sums = sums_of(member, slot);
        const auto attend = [&](const Keys<T>& tile, const Band& band, long from) {
            attend_tile_backward<T>(query, dim, row_grad, rows, tile, dim, band, CloseNothing{}, lse + row,
                                    delta, collected, key_sums(from), value_sums(from), scratch);
        };
        scale_row<T>(query, this->query + row * dim, scale, rows * dim);
        std::fill_n(collected, rows * dim, T(0));
        attend(keys, this->own_band(offset), block);
        if (block > document) attend(this->sink_keys(document), Band{}, document);
        add_row<T>(sums, collected, scale, rows * dim);
        if (far.width) read_far(block, member, offset, rows, row_grad, sums);
    }

    void own_packed(const Keys<float>& keys, long block, long member, long offset, int rows) {
        const long dim = shape.dim, slot = block * shape.block + offset, document = shape.first_block[block];
        T* sums = sums_of(member, slot);
        for (int r = 0; r < rows; ++r) put_packed(r, member, slot + r);
        packed.pack(rows);
        packed_scratch.clear(dim);
        const auto attend = [&](const Keys<float>& tile, const Band& band, long from) {
            attend_packed_backward(packed, tile, band, scale, CloseNothing{}, key_sums(from),
                                   value_sums(from), packed_scratch);
        };
        attend(keys, this->own_band(offset), block);
        if (block > document) attend(this->sink_keys(document), Band{}, document);
        add_row<T>(sums, packed_scratch.gradients(dim), T(1), rows * dim);
        if (!far.width) return;
        const S* queries = this->query + (member * shape.slots + slot) * dim;
        for (int r = 0; r < rows; ++r)
            this->put_far_query(queries + r * dim, packed.rows.data() + r * far.width);
        packed.pack_features(rows, far.width);
        packed_scratch.clear(far.width);
        this->for_far(block, [&](const Keys<float>& tile, long tile_begin) {
            const long column = tile_begin - this->start;
            attend_packed_backward(packed, tile, Band{}, scale,
                                   this->close_far_turned(slot, rows, tile_begin),
                                   summaries.keys.data() + column * far.width,
                                   summaries.values.data() + column * dim, packed_scratch);
        });
        scale_row<T>(scratch.output.data(), queries, scale, rows * dim);
        this->add_far_features(packed_scratch.gradients(far.width), scratch.output.data(), rows, T(1), sums);
    }

    // They have read all.
    void finish(long block, long member, long offset, int rows) {
        const long slot = block * shape.block + offset;
        put_numbers(to_query + (member * shape.slots + slot) * shape.dim, sums_of(member, slot),
                    rows * shape.dim);
    }

    // The summaries; the scaled queries are in the scratch.
    void read_far(long block, long member, long offset, int rows, const T* row_grad, T* sums) {
        const long dim = shape.dim, slot = block * shape.block + offset, row = member * shape.slots + slot;
        const T* delta = deltas.data() + member * slots + slot - begin;
        T *query = scratch.query.data(), *collected = scratch.to_query.data();
        T* scaled = scratch.output.data();
        std::copy_n(query, rows * dim, scaled);
        this->far_features(scaled, rows, query);
        std::fill_n(collected, rows * far.width, T(0));
        this->for_far(block, [&](const Keys<T>& tile, long tile_begin) {
            const long column = tile_begin - this->start;
            attend_tile_backward<T>(query, far.width, row_grad, rows, tile, dim, Band{},
                                    this->close_far(slot, tile_begin), lse + row, delta, collected,
                                    summaries.keys.data() + column * far.width,
                                    summaries.values.data() + column * dim, scratch);
        });
        this->add_far_features(collected, scaled, rows, scale, sums);
    }
};

template <class T, class S>
void routed_backward(const RoutedProblem<T, S>& problem, const S* grad, const S* out, const T* lse,
                     const RoutedGradients<T, S>& to) {
    const Shape& shape = problem.shape;
    const long dim = shape.dim, blocks = shape.blocks(), width = problem.far.width;
    const Pieces pieces(shape);
    std::vector<Sums<T>> outside(shape.kv_heads * pieces.count), summaries(shape.kv_heads * pieces.count);
    for_pieces(shape, [&](long piece, long kv, long first, long last) {
        const long place = kv * pieces.count + piece;
        const Tiles held(shape.packs);
        RoutedBackward<T, S>(problem, kv, first, last, grad, out, lse, to, outside[place], summaries[place])
            .run();
    });
    if (width) {
        std::fill_n(to.far_keys, shape.kv_heads * blocks * width, T(0));
        std::fill_n(to.far_values, shape.kv_heads * blocks * dim, T(0));
    }
#pragma omp parallel for num_threads(shape.threads)
    for (long kv = 0; kv < shape.kv_heads; ++kv)
        for (long piece = 0; piece < pieces.count; ++piece) {
            const long first = piece * pieces.blocks, last = std::min(blocks, first + pieces.blocks);
            const long start = shape.first_block[first], size = shape.block * dim;
            const Sums<T>&others = outside[kv * pieces.count + piece],
                  &far = summaries[kv * pieces.count + piece];
            // `count` numbers of `sums`, from place `from` of them, to those of the head from block `block`
            // on
            const auto add = [&](T* to, long block, long size, const std::vector<T>& sums, long from,
                                 long count) {
                if (count > 0) add_row<T>(to + (kv * blocks + block) * size, sums.data() + from, T(1), count);
            };
            const long past = (first - start) * size;
            for (const auto& [gradient, sums] :
                 {std::pair{to.key, &others.keys}, std::pair{to.value, &others.values}}) {
                add(gradient, start, size, *sums, 0, past);
                add(gradient, last, size, *sums, past, long(sums->size()) - past);
            }
            add(to.far_keys, start, width, far.keys, 0, far.keys.size());
            add(to.far_values, start, dim, far.values, 0, far.values.size());
        }
}
