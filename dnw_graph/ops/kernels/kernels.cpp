// The entry points, called through ctypes: one of each for every pair of number and index type.

#include "sparse.h"
#include "static.h"

#define ENTRY(T, Index, SUFFIX)                                                                                       \
  extern "C" int sparse_product_##SUFFIX(                                                                             \
      int64_t threads, int64_t targets, int64_t sources, int64_t features, int64_t count, const T *z,                 \
      const Index *rowptr, const Index *columns, const T *values, T *out) {                                           \
    return sparse_product(threads, targets, sources, features, count, z, rowptr, columns, values, out);               \
  }                                                                                                                   \
  extern "C" int sampled_product_##SUFFIX(                                                                            \
      int64_t threads, int64_t targets, int64_t sources, int64_t features, int64_t count, const T *received,          \
      const T *z, const Index *rowptr, const Index *columns, T *out) {                                                \
    return sampled_product(threads, targets, sources, features, count, received, z, rowptr, columns, out);            \
  }                                                                                                                   \
  extern "C" int static_graph_##SUFFIX(                                                                               \
      int64_t threads, int64_t batch, int64_t height, int64_t width, int64_t blocks, const int64_t *sizes,            \
      const int64_t *strides, int64_t count, const T *x, const Index *rowptr, const Index *columns, const T *values,  \
      const T *scale, const T *shift, const T *kernel, const T *bias, T *out) {                                       \
    const Edges<T, Index> edges{rowptr, columns, values, count};                                                      \
    const Map<T> map{height, width};                                                                                  \
    return StaticGraph<T, Index>{blocks, sizes, strides, map, x, edges, scale, shift, kernel, bias, out}.run(         \
        threads, batch);                                                                                              \
  }

ENTRY(float, int32_t, float32_int32)
ENTRY(float, int64_t, float32_int64)
ENTRY(double, int32_t, float64_int32)
ENTRY(double, int64_t, float64_int64)
