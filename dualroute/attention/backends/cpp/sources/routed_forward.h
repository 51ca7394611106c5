// Routed attention, forward: output (heads, slots, dim) and log-sum-exp (heads, slots).
#pragma once

#include "routed.h"

// to (dim,) = the mean of f(number, channel) over `count` stored rows; dim a multiple of the lanes.
template <class T, class S, class F>
void mean_of_rows(const S* rows, int count, long dim, T* to, F f) {
    for (long j = 0; j < dim; j += LANES<T>) {
        Vector<T> sum{};
        for (int i = 0; i < count; ++i) sum += f(load_stored<T>(rows + i * dim + j), j);
        store<T>(to + j, sum / T(count));
    }
}

// The far summary of all blocks, see core/far_summary.py: mean and, of second order, variance of their keys,
// (kv_heads, blocks, width), and the mean of their values, (kv_heads, blocks, dim).
template <class T, class S>
void summarise(const Shape& shape, const S* key, const S* value, bool second_order, T* far_keys,
               T* far_values) {
    const long dim = shape.dim, width = second_order ? 2 * dim : dim;
#pragma omp parallel for num_threads(shape.threads)
    for (long row = 0; row < shape.kv_heads * shape.blocks(); ++row) {
        const int count = shape.tokens(row % shape.blocks());
        const S* keys = key + row * shape.block * dim;
        T* mean = far_keys + row * width;
        const auto same = [](Vector<T> x, long) { return x; };
        mean_of_rows<T>(keys, count, dim, mean, same);
        mean_of_rows<T>(value + row * shape.block * dim, count, dim, far_values + row * dim, same);
        if (second_order)
            mean_of_rows<T>(keys, count, dim, mean + dim, [&](Vector<T> x, long j) {
                const Vector<T> off = x - load<T>(mean + j);
                return off * off;
            });
    }
}

// While a piece is worked on, `sums` holds sums of exp(logit - peak) * value and `lse` the peaks.
template <class T, class S>
struct RoutedForward : Routed<T, S> {
    using Base = Routed<T, S>;
    using Base::shape, Base::far, Base::scratch, Base::scale, Base::begin, Base::slots;
    S* out;    // of the first head of the group
    T* peaks;  // likewise
    std::vector<T> norms;
    Buffer<T> sums;

    RoutedForward(const RoutedProblem<T, S>& problem, long kv, long first, long last, S* out, T* lse)
        : Base(problem, kv, first, last, false),
          out(out + kv * shape.group() * shape.slots * shape.dim),
          peaks(lse + kv * shape.group() * shape.slots),
          norms(shape.group() * slots, T(0)),
          sums(std::is_same_v<T, S> ? 0 : norms.size() * shape.dim) {
        for (long member = 0; member < shape.group(); ++member) {
            std::fill_n(sums_of(member, begin), slots * shape.dim, T(0));
            std::fill_n(peaks + member * shape.slots + begin, slots, T(UNSEEN));
        }
    }

    T* sums_of(long member, long token) {
        return in_place(out + (member * shape.slots + token) * shape.dim,
                        sums.data() + (member * slots + token - begin) * shape.dim);
    }

    void run() {
        this->for_blocks([this](auto... part) { read(part...); }, [this](auto... part) { own(part...); },
                         [this](auto... part) { finish(part...); });
    }

    // Tokens that chose the block read it.
    void read(const Keys<T>& keys, long, long member, const int32_t* tokens, int rows) {
        const long dim = shape.dim;
        const S* query = this->query + member * shape.slots * dim;
        T* peak = peaks + member * shape.slots;
        T* norm = norms.data() + member * slots - begin;
        std::fill_n(scratch.peak, TILE, T(UNSEEN));
        this->for_next_readers(tokens, rows, [&](long token) {
            fetch_row(query + token * dim, dim);
            fetch_row(sums_of(member, token), dim);
            fetch_row(peak + token, 1);
            fetch_row(norm + token, 1);
        });
        // Queries first: a product should not wait for what was only just stored.
        for (int i = 0; i < rows; ++i) scratch.put_queries(i, query + tokens[i] * dim, 1, scale);
        for (int i = 0; i < rows; ++i) {
            copy_row(scratch.output.data() + i * dim, sums_of(member, tokens[i]), dim);
            scratch.peak[i] = peak[tokens[i]];
            scratch.norm[i] = norm[tokens[i]];
        }
        attend_tile<T>(scratch.queries(scale), rows, keys, dim, Band{}, CloseNothing{}, scratch.output.data(),
                       scratch);
        for (int i = 0; i < rows; ++i) {
            copy_row(sums_of(member, tokens[i]), scratch.output.data() + i * dim, dim);
            peak[tokens[i]] = scratch.peak[i];
            norm[tokens[i]] = scratch.norm[i];
        }
    }

    // The block's own tokens read it, the sink and the summaries.
    void own(const Keys<T>& keys, long block, long member, long offset, int rows) {
        const long dim = shape.dim, slot = block * shape.block + offset, document = shape.first_block[block],
                   row = member * shape.slots + slot;
        T *sums = sums_of(member, slot), *peak = peaks + row,
          *norm = norms.data() + member * slots + slot - begin;
        std::fill_n(scratch.peak, TILE, T(UNSEEN));
        std::copy_n(peak, rows, scratch.peak);
        std::copy_n(norm, rows, scratch.norm);
        const Queries<T> query = scratch.queries(scale);
        scratch.put_queries(0, this->query + row * dim, rows, scale);
        attend_tile<T>(query, rows, keys, dim, this->own_band(offset), CloseNothing{}, sums, scratch);
        if (block > document)
            attend_tile<T>(query, rows, this->sink_keys(document), dim, Band{}, CloseNothing{}, sums,
                           scratch);
        if (!far.width) return keep(peak, norm, rows);
        const Queries<T> far_query = this->summary_queries(rows);
        this->for_far(block, [&](const Keys<T>& tile, long tile_begin) {
            attend_tile<T>(far_query, rows, tile, dim, Band{}, this->close_far(slot, tile_begin), sums,
                           scratch);
        });
        keep(peak, norm, rows);
    }

    void keep(T* peak, T* norm, int rows) {
        std::copy_n(scratch.peak, rows, peak);
        std::copy_n(scratch.norm, rows, norm);
    }

    // They have read all, and divide by the sum of their weights.
    void finish(long block, long member, long offset, int rows) {
        const long dim = shape.dim, slot = block * shape.block + offset, row = member * shape.slots + slot;
        T *sums = sums_of(member, slot), *norm = norms.data() + member * slots + slot - begin;
        for (int i = 0; i < rows; ++i) {
            scale_row<T>(sums + i * dim, sums + i * dim, 1 / norm[i], dim);
            peaks[row + i] += std::log(norm[i]);
        }
        put_numbers(out + row * dim, sums, rows * dim);
    }
};

// False, and nothing is done, where a token would read what it may not: memory beyond its piece.
template <class T, class S>
bool routed_forward(const RoutedProblem<T, S>& problem, S* out, T* lse) {
    if (!readable(problem.shape, problem.selected, problem.columns)) return false;
    for_pieces(problem.shape, [&](long, long kv, long first, long last) {
        const Tiles held(problem.shape.packs);
        RoutedForward<T, S>(problem, kv, first, last, out, lse).run();
    });
    return true;
}
