// What Python calls, in float32 and float64: see operators.py for the shapes.
#include "decode.h"
#include "local.h"
#include "routed_backward.h"
#include "routed_forward.h"
#include "select.h"

// The arguments of both directions of the routed route, and the problem that they make.
#define DUALROUTE_PROBLEM(T)                                                                             \
    const long *shape, const int32_t *first_block, double scale, const T *query, const T *key,           \
        const T *value, const T *far_keys, const T *far_values, long far_width, const int32_t *selected, \
        int columns
#define DUALROUTE_AS_PROBLEM(T)                                                                         \
    RoutedProblem<T> {                                                                                  \
        make_shape(shape, first_block), T(scale), query, key, value, {far_keys, far_values, far_width}, \
            selected, columns                                                                           \
    }

#define DUALROUTE_KERNELS(T, NAME)                                                                           \
    extern "C" void local_forward_##NAME(const long* shape, const int32_t* first_block, long window,         \
                                         double scale, const T* query, const T* key, const T* value, T* out, \
                                         T* lse) {                                                           \
        local_forward<T>(make_shape(shape, first_block), window, T(scale), query, key, value, out, lse);     \
    }                                                                                                        \
    extern "C" void local_backward_##NAME(const long* shape, const int32_t* first_block, long window,        \
                                          double scale, const T* grad, const T* query, const T* key,         \
                                          const T* value, const T* out, const T* lse, T* to_query,           \
                                          T* to_key, T* to_value) {                                          \
        local_backward<T>(make_shape(shape, first_block), window, T(scale), grad, query, key, value, out,    \
                          lse, to_query, to_key, to_value);                                                  \
    }                                                                                                        \
    extern "C" void select_##NAME(const long* shape, const int32_t* first_block, int router, double scale,   \
                                  const T* query, const T* features, int parts, int columns, int top_k,      \
                                  int32_t* selected) {                                                       \
        select_blocks<T>(make_shape(shape, first_block), Router(router), T(scale), query, features, parts,   \
                         columns, top_k, selected);                                                          \
    }                                                                                                        \
    extern "C" void routed_forward_##NAME(DUALROUTE_PROBLEM(T), T* out, T* lse) {                            \
        routed_forward<T>(DUALROUTE_AS_PROBLEM(T), out, lse);                                                \
    }                                                                                                        \
    extern "C" void routed_backward_##NAME(DUALROUTE_PROBLEM(T), const T* grad, const T* out, const T* lse,  \
                                           T* to_query, T* to_key, T* to_value, T* to_far_keys,              \
                                           T* to_far_values) {                                               \
        routed_backward<T>(DUALROUTE_AS_PROBLEM(T), grad, out, lse,                                          \
                           {to_query, to_key, to_value, to_far_keys, to_far_values});                        \
    }

static Shape make_shape(const long* sizes, const int32_t* first_block) {
    return {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], int(sizes[5]), first_block};
}

DUALROUTE_KERNELS(float, float32)
DUALROUTE_KERNELS(double, float64)

// One array instead of two dozen arguments, which would take as long to hand over as a short text takes to
// read: the sizes of `Layer`, parts, far_width, router, and then the pointers.
template <class T, class A, class S>
static void decode_layer(const int64_t* a) {
    const auto pointer = [a](int i) { return reinterpret_cast<void*>(a[14 + i]); };
    const auto cache = [&](int i) {
        return Cache<S>{(S*)pointer(i), (S*)pointer(i + 1), (float*)pointer(i + 2), (float*)pointer(i + 3)};
    };
    const Layer layer{a[0], a[1],      a[2],       int(a[3]), a[4],  a[5],
                      a[6], int(a[7]), bool(a[8]), a[9],      a[10], *(const int64_t*)pointer(0)};
    const Statistics<A> statistics{(A*)pointer(9), (A*)pointer(10), (A*)pointer(11),
                                   a[11],          a[12],           Router(a[13])};
    decode_layer<T, A, S>(layer, (const T*)pointer(1), (const T*)pointer(2), (const A*)pointer(3),
                          (const A*)pointer(4), cache(5), statistics, cache(12), (A*)pointer(16));
}

extern "C" {
void decode_layer_float32_float32(const int64_t* a) { decode_layer<float, float, float>(a); }
void decode_layer_float32_int8(const int64_t* a) { decode_layer<float, float, int8_t>(a); }
void decode_layer_bfloat16_bfloat16(const int64_t* a) { decode_layer<float, BFloat16, BFloat16>(a); }
void decode_layer_bfloat16_int8(const int64_t* a) { decode_layer<float, BFloat16, int8_t>(a); }
void decode_layer_float64_float64(const int64_t* a) { decode_layer<double, double, double>(a); }
}
