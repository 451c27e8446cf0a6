// The entry points, called through ctypes: one for every combination of number and index types. Python checks all
// tensors against ../signatures.py; checks that depend on their values are here.

#include <new>
#include <stdexcept>

#include "combination.h"
#include "layer.h"
#include "layer_grad.h"
#include "node_function.h"
#include "selection.h"
#include "sparse.h"
#include "static.h"
#include "transpose.h"

namespace {

// An exception must not leave a function called from C.
template <class Work>
int guarded(Work work) {
  try {
    return work();
  } catch (const std::bad_alloc &) {
    return NO_MEMORY;
  } catch (const std::length_error &) {
    return NO_MEMORY;
  }
}

template <class T, class Index>
Convolution<T, Index> layer_convolution(
    int64_t batch, int64_t inputs, int64_t outputs, int64_t groups, const int64_t *from, const int64_t *to,
    const int64_t *window, const Edges<T, Index> &edges) {
  return {
      batch,
      inputs,
      outputs,
      groups,
      {from[0], to[0], window[0], window[2], window[4], window[6]},
      {from[1], to[1], window[1], window[3], window[5], window[7]},
      edges};
}

}  // namespace

#define SPARSE(T, Index, SUFFIX)                                                                                      \
  extern "C" int sparse_product_##SUFFIX(                                                                             \
      int64_t threads, int64_t targets, int64_t features, int64_t count, int64_t pieces, const int64_t *sizes,        \
      const T *const *z, const Index *rowptr, const Index *columns, const T *values, T *out) {                        \
    const Edges<T, Index> edges{rowptr, columns, values, count};                                                      \
    return guarded([&] {                                                                                              \
      return sparse_product(threads, targets, features, Rows<T>(pieces, sizes, z, features), edges, out);             \
    });                                                                                                               \
  }                                                                                                                   \
  extern "C" int sampled_product_##SUFFIX(                                                                            \
      int64_t threads, int64_t targets, int64_t features, int64_t count, int64_t pieces, const int64_t *sizes,        \
      const T *const *z, const Index *rowptr, const Index *columns, const T *received, T *out) {                      \
    const Edges<T, Index> edges{rowptr, columns, nullptr, count};                                                     \
    return guarded([&] {                                                                                              \
      return sampled_product(threads, targets, features, received, Rows<T>(pieces, sizes, z, features), edges, out);  \
    });                                                                                                               \
  }                                                                                                                   \
  extern "C" int static_plan_##SUFFIX(                                                                                 \
      int64_t, int64_t count, int64_t blocks, const int64_t *sizes, int64_t, const int64_t *strides, int64_t channels, \
      int64_t stem_stride, int64_t relu, int64_t pooled, int64_t classes, int64_t bits, const Index *rowptr,           \
      const Index *columns, const T *values, const T *scale, const T *shift, const T *kernel, const T *bias,           \
      const T *unit, const T *out_shift, const T *stem, const T *stem_bias, const T *weight, const T *classifier_bias,                \
      int64_t *plan) {                                                                                                 \
    return guarded([&] {                                                                                               \
      Graph<T> graph;                                                                                                  \
      graph.sizes.assign(sizes, sizes + blocks);                                                                       \
      graph.strides.assign(strides, strides + blocks);                                                                 \
      const int status = pack_edges(graph, Edges<T, Index>{rowptr, columns, values, count}, scale, shift, kernel, bias, unit); \
      if (status) return status;                                                                                       \
      const int64_t outputs = sizes[blocks - 1];                                                                       \
      if (out_shift) graph.out_shift.assign(out_shift, out_shift + outputs);                                           \
      if (stem) graph.stem = Stem<T>(channels, sizes[0], stem_stride, stem, stem_bias);                                \
      graph.relu = relu;                                                                                               \
      graph.pooled = pooled;                                                                                           \
      if (weight) graph.classifier = Classifier<T>(outputs, classes, weight, classifier_bias);                         \
      *plan = reinterpret_cast<int64_t>(new_plan(std::move(graph), bits));                                          \
      return OK;                                                                                                       \
    });                                                                                                                \
  }                                                                                                                    \
  extern "C" int sparse_linear_##SUFFIX(                                                                              \
      int64_t threads, int64_t batch, int64_t inputs, int64_t outputs, int64_t count, int64_t relu, const T *x,       \
      const Index *rowptr, const Index *columns, const T *values, const T *bias, T *out) {                            \
    const Edges<T, Index> edges{rowptr, columns, values, count};                                                      \
    return guarded([&] {                                                                                              \
      return sparse_linear(threads, batch, inputs, outputs, x, edges, Finish<T>{bias, nullptr, relu != 0}, out);      \
    });                                                                                                               \
  }                                                                                                                   \
  extern "C" int sparse_convolution_##SUFFIX(                                                                         \
      int64_t threads, int64_t batch, int64_t inputs, int64_t outputs, int64_t count, int64_t groups, int64_t relu,   \
      int64_t, const int64_t *from, int64_t, const int64_t *to, int64_t, const int64_t *window, const T *x,           \
      const Index *rowptr, const Index *columns, const T *values, const T *bias, const T *add, T *out) {              \
    const Edges<T, Index> edges{rowptr, columns, values, count};                                                      \
    return guarded([&] {                                                                                              \
      const auto layer = layer_convolution(batch, inputs, outputs, groups, from, to, window, edges);                  \
      return layer.forward(threads, x, Finish<T>{bias, add, relu != 0}, out);                                         \
    });                                                                                                               \
  }                                                                                                                   \
  extern "C" int sparse_convolution_grad_##SUFFIX(                                                                    \
      int64_t threads, int64_t batch, int64_t inputs, int64_t outputs, int64_t count, int64_t groups,                 \
      int64_t, const int64_t *from, int64_t, const int64_t *to, int64_t, const int64_t *window, const T *grad,        \
      const T *x, const Index *rowptr, const Index *columns, const T *values, T *x_grad, T *values_grad) {            \
    const Edges<T, Index> edges{rowptr, columns, values, count};                                                      \
    return guarded([&] {                                                                                              \
      const auto layer = layer_convolution(batch, inputs, outputs, groups, from, to, window, edges);                  \
      return convolution_grad(threads, layer, grad, x, x_grad, values_grad);                                          \
    });                                                                                                               \
  }                                                                                                                   \
  extern "C" int sampled_linear_##SUFFIX(                                                                             \
      int64_t threads, int64_t batch, int64_t sources, int64_t targets, int64_t count, const T *received,             \
      const T *sent, const Index *rowptr, const Index *columns, const Index *order, T *out) {                         \
    const Edges<T, Index> edges{rowptr, columns, nullptr, count};                                                     \
    return guarded([&] {                                                                                              \
      return sampled_linear(threads, batch, sources, targets, received, sent, edges, order, out);                     \
    });                                                                                                               \
  }

SPARSE(float, int32_t, float32_int32)
SPARSE(float, int64_t, float32_int64)
SPARSE(double, int32_t, float64_int32)
SPARSE(double, int64_t, float64_int64)

extern "C" int static_free_int64(int64_t, const int64_t *plan) {
  delete reinterpret_cast<AnyPlan *>(*plan);
  return OK;
}

#define INDICES(Index, SUFFIX)                                                                                        \
  extern "C" int by_source_##SUFFIX(                                                                                  \
      int64_t, int64_t targets, int64_t sources, int64_t count, const Index *rowptr, const Index *columns,            \
      Index *out_rowptr, Index *order) {                                                                              \
    const Edges<void, Index> edges{rowptr, columns, nullptr, count};                                                  \
    return guarded([&] { return by_source(targets, sources, edges, out_rowptr, order); });                            \
  }

INDICES(int32_t, int32)
INDICES(int64_t, int64)

#define NUMBERS(T, SUFFIX)                                                                                            \
  extern "C" int static_run_##SUFFIX(                                                                                  \
      int64_t threads, int64_t plan, int64_t batch, int64_t, int64_t height, int64_t width, int64_t,                   \
      const int64_t *, const T *x, T *out) {                                                                           \
    return guarded([&] { return static_cast<PlanOf<T> *>(reinterpret_cast<AnyPlan *>(plan))->run(threads, batch, height, width, x, out); }); \
  }                                                                                                                    \
  extern "C" int largest_##SUFFIX(                                                                                    \
      int64_t threads, int64_t count, int64_t k, int64_t low, int64_t high, const T *weight, int64_t *out,            \
      int64_t *found) {                                                                                               \
    return largest(threads, count, k, low, high, weight, out, found);                                                 \
  }                                                                                                                   \
  extern "C" int node_function_##SUFFIX(                                                                              \
      int64_t threads, int64_t nodes, int64_t height, int64_t width, int64_t batch, int64_t norm, int64_t relu,       \
      int64_t stride, double eps, const T *x, const T *scale, const T *shift, const T *kernel, T *mean, T *variance,  \
      T *out) {                                                                                                       \
    const TrainedFunction<T> f{nodes, height, width, batch, norm,   relu, stride,                                     \
                               eps,   x,      scale, shift, kernel, mean, variance};                                  \
    return f.each_node(                                                                                               \
        threads, f.forward_room(), [&](int64_t node, T *scratch) { f.forward(node, scratch, out); });                 \
  }                                                                                                                   \
  extern "C" int node_function_grad_##SUFFIX(                                                                         \
      int64_t threads, int64_t nodes, int64_t height, int64_t width, int64_t batch, int64_t norm, int64_t relu,       \
      int64_t stride, double eps, const T *x, const T *scale, const T *shift, const T *kernel, T *mean, T *variance,  \
      const T *out_grad, T *x_grad, T *scale_grad, T *shift_grad, T *kernel_grad) {                                   \
    const TrainedFunction<T> f{nodes, height, width, batch, norm,   relu, stride,                                     \
                               eps,   x,      scale, shift, kernel, mean, variance};                                  \
    return f.each_node(threads, f.backward_room(), [&](int64_t node, T *scratch) {                                    \
      f.backward(node, out_grad, scratch, x_grad, scale_grad, shift_grad, kernel_grad);                               \
    });                                                                                                               \
  }                                                                                                                   \
  extern "C" int combination_##SUFFIX(                                                                                \
      int64_t threads, int64_t count, int64_t terms, const T *base, const T *c, const T *const *x, T *out) {          \
    return combination(threads, count, terms, base, c, x, out);                                                       \
  }                                                                                                                   \
  extern "C" int error_squares_##SUFFIX(                                                                              \
      int64_t threads, int64_t count, int64_t terms, double rtol, double atol, const T *c, const T *const *x,         \
      const T *y, const T *z, double *squares) {                                                                      \
    return error_squares(threads, count, terms, rtol, atol, c, x, y, z, squares);                                     \
  }                                                                                                                   \
  extern "C" int exchanged_##SUFFIX(                                                                                  \
      int64_t threads, int64_t first, int64_t middle, int64_t last, const T *from, T *to) {                           \
    return exchanged(threads, first, middle, last, from, to);                                                         \
  }

NUMBERS(float, float32)
NUMBERS(double, float64)
