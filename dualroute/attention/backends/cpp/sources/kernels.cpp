// What Python calls by ctypes: see operators.py for the shapes. T is computed in, S how rows are stored.
#include "local.h"
#include "routed_backward.h"
#include "routed_forward.h"
#include "select.h"
#include "torch_ops.h"

// The arguments of both directions of the routed route, and the problem that they make.
#define DUALROUTE_PROBLEM(T, S)                                                                          \
    const long *shape, const int32_t *first_block, double scale, const S *query, const S *key,           \
        const S *value, const T *far_keys, const T *far_values, long far_width, const int32_t *selected, \
        int columns
#define DUALROUTE_AS_PROBLEM(T, S)                                                                         \
    RoutedProblem<T, S> {                                                                                  \
        make_shape<S>(shape, first_block), T(scale), query, key, value, {far_keys, far_values, far_width}, \
            selected, columns                                                                              \
    }

#define DUALROUTE_KERNELS(T, S, NAME)                                                                        \
    DUALROUTE_CALLED void local_forward_##NAME(const long* shape, const int32_t* first_block, long window,   \
                                               double scale, const S* query, const S* key, const S* value,   \
                                               S* out, T* lse) {                                             \
        local_forward<T>(make_shape<S>(shape, first_block), window, T(scale), query, key, value, out, lse);  \
    }                                                                                                        \
    DUALROUTE_CALLED void local_backward_##NAME(const long* shape, const int32_t* first_block, long window,  \
                                                double scale, const S* grad, const S* query, const S* key,   \
                                                const S* value, const S* out, const T* lse, S* to_query,     \
                                                T* to_key, T* to_value) {                                    \
        local_backward<T>(make_shape<S>(shape, first_block), window, T(scale), grad, query, key, value, out, \
                          lse, to_query, to_key, to_value);                                                  \
    }                                                                                                        \
    DUALROUTE_CALLED void select_##NAME(const long* shape, const int32_t* first_block, int router,           \
                                        double scale, const S* query, const T* features, int parts,          \
                                        int columns, int top_k, int32_t* selected) {                         \
        select_blocks<T>(make_shape<S>(shape, first_block), Router(router), T(scale), query, features,       \
                         parts, columns, top_k, selected);                                                   \
    }                                                                                                        \
    DUALROUTE_CALLED void similar_order_##NAME(const S* keys, long spans, long size, long dim, long cell,    \
                                               long threads, int32_t* order) {                               \
        similar_order<T>(keys, spans, size, dim, cell, int(threads), order);                                 \
    }                                                                                                        \
    DUALROUTE_CALLED void summarise_##NAME(const long* shape, const int32_t* first_block, const S* key,      \
                                           const S* value, bool second_order, T* far_keys, T* far_values) {  \
        summarise<T>(make_shape<S>(shape, first_block), key, value, second_order, far_keys, far_values);     \
    }                                                                                                        \
    DUALROUTE_CALLED bool routed_forward_##NAME(DUALROUTE_PROBLEM(T, S), S* out, T* lse) {                   \
        return routed_forward(DUALROUTE_AS_PROBLEM(T, S), out, lse);                                         \
    }                                                                                                        \
    DUALROUTE_CALLED void routed_backward_##NAME(DUALROUTE_PROBLEM(T, S), const S* grad, const S* out,       \
                                                 const T* lse, S* to_query, T* to_key, T* to_value,          \
                                                 T* to_far_keys, T* to_far_values) {                         \
        routed_backward(DUALROUTE_AS_PROBLEM(T, S), grad, out, lse,                                          \
                        {to_query, to_key, to_value, to_far_keys, to_far_values});                           \
    }

template <class S>
static Shape make_shape(const long* sizes, const int32_t* first_block) {
    const long blocks = sizes[2] / sizes[3];
    const bool causal = sizes[6] != 3, hides = sizes[6] > 3;  // tables of blocks
    const auto table = [&](bool there, int number) {
        return there ? first_block + number * blocks : nullptr;
    };
    return {sizes[0],
            sizes[1],
            sizes[2],
            sizes[3],
            sizes[4],
            int(sizes[5]),
            first_block,
            table(!causal, 1),
            table(!causal, 2),
            table(hides, 1),
            table(hides, 2),
            hides ? int(sizes[6] - 2) / 2 : 0,
            std::is_same_v<S, BFloat16> && unit_in_use() != Unit::FLOATS && sizes[3] % SIDE == 0};
}

DUALROUTE_KERNELS(float, float, float32)
DUALROUTE_KERNELS(float, BFloat16, bfloat16)
DUALROUTE_KERNELS(double, double, float64)

DUALROUTE_CALLED int vector_bytes() { return VECTOR_BYTES; }

// What multiplies bfloat16, a number of `Unit`.
DUALROUTE_CALLED int unit_number() { return int(unit_in_use().load()); }

// Has that one do it from now on, the best there is for -1. False, and nothing changes, if it is not there.
DUALROUTE_CALLED bool use_unit(int wanted) {
    if (wanted == int(Unit::TILES) && best_unit() != Unit::TILES) return false;
    unit_in_use() = wanted < 0 ? best_unit() : Unit(wanted);
    return true;
}
