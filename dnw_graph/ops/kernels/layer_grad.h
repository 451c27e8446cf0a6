// Gradients of linear layers and convolutions over the edges alone: for the inputs over reversed edges, for the weights
// with one product of two rows per edge.

#pragma once

#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <utility>
#include <vector>

#include "layer.h"

namespace {

// The sums of all lanes of four registers. Registers are interleaved and halves added, so that few lanes remain.
template <class T>
void add_lanes(const typename Simd<T>::Vector (&sums)[4], T *out) {
  constexpr int64_t lanes = Simd<T>::lanes;
  if constexpr (lanes < 4) {
    for (int n = 0; n < 4; ++n)
      for (int64_t lane = 0; lane < lanes; ++lane) out[n] += sums[n][lane];
  } else {
    constexpr std::make_index_sequence<lanes> all{};
    const auto halved = [&](auto a, auto b) { return zipped<false>(a, b, all) + zipped<true>(a, b, all); };
    const auto both = halved(halved(sums[0], sums[1]), halved(sums[2], sums[3]));
    constexpr int places[] = {0, 2, 1, 3};  // The order after interleaving twice.
    for (int64_t lane = 0; lane < lanes; ++lane) out[places[lane % 4]] += both[lane];
  }
}

// Adds ⟨row, source_e⟩ to out[order[e]], or out[e], for the edges begin … end - 1: four at a time, so that each value
// of the row is loaded once for four.
template <class T, class Index, class Source>
void add_products(
    const T *row, int64_t length, const Index *columns, int64_t begin, int64_t end, const Source &source, T *out,
    const Index *order) {
  using S = Simd<T>;
  for (int64_t e = begin; e < end; e += 4) {
    const int64_t last = end - 1;
    const T *rows[4];
    for (int64_t n = 0; n < 4; ++n) rows[n] = source.row(columns[std::min(e + n, last)]);
    typename S::Vector even[4] = {}, odd[4] = {};
    int64_t i = 0;
    for (; i + 2 * S::lanes <= length; i += 2 * S::lanes) {
      const typename S::Vector a = S::load(row + i), b = S::load(row + i + S::lanes);
#pragma GCC unroll 4
      for (int n = 0; n < 4; ++n) {
        even[n] += a * S::load(rows[n] + i);
        odd[n] += b * S::load(rows[n] + i + S::lanes);
      }
    }
    for (; i + S::lanes <= length; i += S::lanes)
      for (int n = 0; n < 4; ++n) even[n] += S::load(row + i) * S::load(rows[n] + i);
    for (int n = 0; n < 4; ++n) even[n] += odd[n];
    T sums[4] = {};
    add_lanes<T>(even, sums);
    for (; i < length; ++i)
      for (int n = 0; n < 4; ++n) sums[n] += row[i] * rows[n][i];
    for (int64_t n = 0; n < std::min<int64_t>(4, end - e); ++n) out[order ? order[e + n] : e + n] += sums[n];
  }
}

// Reversed edges, ordered by source.
template <class T>
struct Turned {
  std::vector<int64_t> rowptr, columns;
  std::vector<T> values;

  // `row` and `column` return the new target and source of an edge from its target and its position.
  template <class Index, class Row, class Column>
  Turned(const Edges<T, Index> &edges, int64_t targets, int64_t rows, Row row, Column column)
      : rowptr(rows + 1), columns(edges.count), values(edges.count) {
    for (int64_t v = 0; v < targets; ++v)
      for (int64_t e = edges.rowptr[v]; e < edges.rowptr[v + 1]; ++e) ++rowptr[row(v, edges.columns[e]) + 1];
    std::partial_sum(rowptr.begin(), rowptr.end(), rowptr.begin());
    std::vector<int64_t> next(rowptr.begin(), rowptr.end() - 1);
    for (int64_t v = 0; v < targets; ++v)
      for (int64_t e = edges.rowptr[v]; e < edges.rowptr[v + 1]; ++e) {
        const int64_t at = next[row(v, edges.columns[e])]++;
        columns[at] = column(v, edges.columns[e]);
        values[at] = edges.values[e];
      }
  }
  Edges<T, int64_t> edges() const { return {rowptr.data(), columns.data(), values.data(), int64_t(columns.size())}; }
};

// The gradient of a convolution's inputs: each phase of each channel sums over the outputs that read it.
template <class T, class Index>
int convolution_input_grad(int64_t threads, const Convolution<T, Index> &layer, const T *grad, T *x_grad) {
  const Axis &y = layer.y, &x = layer.x;
  const int64_t places = y.kernel() * x.kernel(), per_group = layer.inputs / layer.groups;
  const int64_t targets = layer.outputs / layer.groups;
  const Written<T> to{y, x, layer.inputs, {nullptr, nullptr, false}, x_grad};
  const auto row = [&](int64_t v, int64_t place) {
    const int64_t channel = v / targets * per_group + place / places, i = place % places / x.kernel();
    return (channel * int64_t(y.phases.size()) + y.numbers[i]) * int64_t(x.phases.size()) + x.numbers[place % x.kernel()];
  };
  const auto column = [&](int64_t v, int64_t place) { return v % targets * places + place % places; };
  const Turned<T> turned(layer.edges, layer.outputs, layer.inputs * to.phases(), row, column);
  if (to.phases() < y.stride * x.stride) std::fill_n(x_grad, layer.batch * layer.inputs * y.size * x.size, T(0));
  const Axis from_y = y.transposed(), from_x = x.transposed();
  Planes<T> from(from_y, from_x, layer.batch, layer.outputs, layer.groups, layer.edges.count, grad);
  return convolution(threads, layer.groups, turned.edges(), from, to);
}

// The gradient of a convolution's weights.
template <class T, class Index>
void convolution_weight_grad(
    int64_t threads, const Convolution<T, Index> &layer, const T *grad, const T *in, T *values_grad) {
  const Axis &y = layer.y, &x = layer.x;
  const int64_t maps = y.output * x.output;
  Planes<T> from(y, x, layer.batch, layer.inputs, layer.groups, layer.edges.count, in);
  from.begin(0);
  const int members = team(threads, double(layer.edges.count) * double(maps) * double(layer.batch));
  const int64_t room = from.direct ? 0 : round_up(from.places(), Simd<T>::lanes);
  const auto scratch = zeros<T>(double(room) * double(members));  // Zeros between lines and between images stay.
  for (int64_t first = 0; first < layer.batch; first += from.set) {
    from.begin(first);
    const int64_t length = from.direct ? maps : from.places();  // Beyond lie images of an earlier, larger set.
#pragma omp parallel num_threads(members)
    {
      T *row = scratch.get() + omp_get_thread_num() * room;
      if (!from.direct) from.pack();
#pragma omp for schedule(dynamic)
      for (int64_t v = 0; v < layer.outputs; ++v) {
        const T *own = grad + (first * layer.outputs + v) * maps;
        for (int64_t b = 0; !from.direct && b < from.images; ++b)
          for (int64_t i = 0; i < y.output; ++i)
            copy_line(own + (b * layer.outputs * y.output + i) * x.output, x.output, row + (b * y.pitch + i) * x.pitch);
        add_products(
            from.direct ? own : row, length, layer.edges.columns, layer.edges.rowptr[v], layer.edges.rowptr[v + 1],
            from.group(v / (layer.outputs / layer.groups)), values_grad, static_cast<const Index *>(nullptr));
      }
    }
  }
}

template <class T, class Index>
int convolution_grad(
    int64_t threads, const Convolution<T, Index> &layer, const T *grad, const T *x, T *x_grad, T *values_grad) {
  if (!layer.valid()) return WRONG_EDGES;
  if (values_grad) std::fill_n(values_grad, layer.edges.count, T(0));
  if (!layer.batch) return OK;
  if (values_grad) convolution_weight_grad(threads, layer, grad, x, values_grad);
  return x_grad ? convolution_input_grad(threads, layer, grad, x_grad) : OK;
}

// Images side by side: rows [batch, features] starting at `first` as columns [features, width]; the rest of a register
// is zero.
template <class T>
void pack_images(int64_t threads, const T *rows, int64_t features, int64_t images, int64_t width, T *columns) {
  using S = Simd<T>;
#pragma omp parallel for schedule(static) num_threads(team(threads, double(features) * double(width)))
  for (int64_t i = 0; i < features; i += S::lanes)
    for (int64_t b = 0; b < images; b += S::lanes) {
      const T *from = rows + b * features + i;
      T *to = columns + i * width + b;
      if (i + S::lanes <= features && b + S::lanes <= images)
        transposed_square(from, features, [&](int64_t n, typename S::Vector column) { S::store(to + n * width, column); });
      else
        for (int64_t n = 0; n < std::min(S::lanes, features - i); ++n)
          for (int64_t m = 0; m < S::lanes; ++m) to[n * width + m] = b + m < images ? from[m * features + n] : T(0);
    }
}

// The gradient of a linear layer's weights: for every edge the product of its target's and its source's row, images
// side by side. As many images of all sources are packed as stay in cache for all targets.
template <class T, class Index>
int sampled_linear(
    int64_t threads, int64_t batch, int64_t sources, int64_t targets, const T *received, const T *sent,
    const Edges<T, Index> &edges, const Index *order, T *out) {
  constexpr int64_t lanes = Simd<T>::lanes;
  if (!edges.pointers_valid(targets) || !edges.sources_within(0, targets, 0, sources)) return WRONG_EDGES;
  for (int64_t e = 0; order && e < edges.count; ++e)
    if (order[e] < 0 || order[e] >= edges.count) return WRONG_EDGES;
  std::fill_n(out, edges.count, T(0));
  if (!batch || !sources || !targets) return OK;
  const int64_t fitting = CACHE / int64_t(sizeof(T)) / sources / lanes;
  const int64_t set = std::min(std::max<int64_t>(fitting, 16) * lanes, round_up(batch, lanes));
  const auto from = zeros<T>(double(sources) * double(set)), to = zeros<T>(double(targets) * double(set));
  for (int64_t first = 0; first < batch; first += set) {
    const int64_t images = std::min(set, batch - first), width = round_up(images, lanes);
    pack_images(threads, sent + first * sources, sources, images, width, from.get());
    pack_images(threads, received + first * targets, targets, images, width, to.get());
#pragma omp parallel for schedule(dynamic, 8) num_threads(team(threads, double(edges.count) * double(width)))
    for (int64_t v = 0; v < targets; ++v)
      add_products(
          to.get() + v * width, width, edges.columns, edges.rowptr[v], edges.rowptr[v + 1],
          Matrix<T>{from.get(), width, 0}, out, order);
  }
  return OK;
}

}  // namespace
