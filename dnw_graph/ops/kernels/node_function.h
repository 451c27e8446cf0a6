// Normalisation → ReLU → 3×3 single-channel convolution, each of which may be left out, and its gradients in one pass.
//
// Maps lie node-major with the images last, [nodes, height, width, batch]: a register holds one place of as many
// images, so that borders and small maps cost nothing, and what a node receives is one row in memory.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <type_traits>

#include <omp.h>

#include "sparse.h"

namespace {

enum Norm { NO_NORM = 0, BATCH = 1, INSTANCE = 2, CONSTANT = 3 };  // CONSTANT: mean and variance are given.

// As many doubles as a register of T has values, for long sums.
template <class T>
struct Wide;
template <>
struct Wide<float> {
  typedef double Doubles __attribute__((vector_size(2 * BYTES)));
};
template <>
struct Wide<double> {
  typedef double Doubles __attribute__((vector_size(BYTES)));
};

template <class T>
struct TrainedFunction {
  using S = Simd<T>;
  using Vector = typename S::Vector;
  using Doubles = typename Wide<T>::Doubles;

  int64_t nodes, height, width, batch, norm, relu, stride;  // Stride 0: no convolution.
  double eps;
  const T *x, *scale, *shift, *kernel;
  T *mean, *variance;  // Per node, or per node and image; BATCH and INSTANCE write them.

  int64_t out_height() const { return stride == 2 ? (height + 1) / 2 : height; }
  int64_t out_width() const { return stride == 2 ? (width + 1) / 2 : width; }
  int64_t places() const { return height * width; }
  int64_t padded() const { return (height + 2) * (width + 2); }
  int64_t padded_at(int64_t y, int64_t xx) const { return (y + 1) * (width + 2) + xx + 1; }

  // So many of the images that a register holds; FULL, all of them.
  template <bool FULL>
  static Vector load(const T *from, int64_t count) {
    if (FULL) return S::load(from);
    Vector value{};
    std::memcpy(&value, from, count * sizeof(T));
    return value;
  }
  template <bool FULL>
  static void store(T *to, Vector value, int64_t count) {
    if (FULL)
      S::store(to, value);
    else
      std::memcpy(to, &value, count * sizeof(T));
  }
  static Doubles wide(Vector value) { return __builtin_convertvector(value, Doubles); }
  static double total(const Doubles &value) {
    double sum = 0;
    for (int64_t lane = 0; lane < S::lanes; ++lane) sum += value[lane];
    return sum;
  }
  // Σ f(value) over a node's row: registers of moderate length, so that no sum of few digits grows long.
  template <class Term>
  double sum_of_row(const T *row, Term term) const {
    constexpr int64_t chains = 4, piece = 256;
    const int64_t count = places() * batch, step = chains * S::lanes;
    double sum = 0;
    int64_t at = 0;
    while (at + step <= count) {
      Vector sums[chains] = {};
      for (int64_t turn = 0; turn < piece && at + step <= count; ++turn, at += step)
        for (int64_t n = 0; n < chains; ++n) sums[n] += term(S::load(row + at + n * S::lanes));
      sum += total(wide((sums[0] + sums[1]) + (sums[2] + sums[3])));
    }
    for (; at < count; ++at) sum += term(Vector{} + row[at])[0];
    return sum;
  }

  void statistics_of_node(int64_t node) const {
    const T *row = x + node * places() * batch;
    const double count = double(places()) * batch;
    const T centre = mean[node] = T(sum_of_row(row, [](Vector value) { return value; }) / count);
    variance[node] = T(sum_of_row(row, [=](Vector value) { return (value - centre) * (value - centre); }) / count);
  }

  // Of as many images as a register holds, from image `first` on.
  struct Affine {
    Vector scale, shift, mean, rstd;  // a I + b, and what (I - mean) · rstd makes of I.
  };

  template <bool FULL>
  void statistics_of_images(int64_t node, int64_t first, int64_t count) const {
    const T *row = x + node * places() * batch + first;
    Vector sum{}, squares{};
    for (int64_t p = 0; p < places(); ++p) sum += load<FULL>(row + p * batch, count);
    const Vector centre = sum / T(places());
    for (int64_t p = 0; p < places(); ++p) {
      const Vector value = load<FULL>(row + p * batch, count) - centre;
      squares += value * value;
    }
    store<FULL>(mean + node * batch + first, centre, count);
    store<FULL>(variance + node * batch + first, squares / T(places()), count);
  }

  Affine affine(int64_t node, Vector centre, Vector spread) const {
    Affine a{Vector{} + T(1), Vector{}, Vector{}, Vector{} + T(1)};
    if (norm == NO_NORM) return a;
    T roots[S::lanes];
    S::store(roots, spread + T(eps));
    for (T &root : roots) root = std::sqrt(root);
    a.mean = centre;
    a.rstd = T(1) / S::load(roots);
    a.scale = a.rstd * (scale ? scale[node] : T(1));
    a.shift = (shift ? shift[node] : T(0)) - a.mean * a.scale;
    return a;
  }
  Affine affine_of_node(int64_t node) const {
    const bool known = norm == BATCH || norm == CONSTANT;
    return affine(node, Vector{} + (known ? mean[node] : T(0)), Vector{} + (known ? variance[node] : T(0)));
  }
  template <bool FULL>
  Affine affine_of_images(int64_t node, int64_t first, int64_t count) const {
    const int64_t at = node * batch + first;
    return affine(node, load<FULL>(mean + at, count), load<FULL>(variance + at, count));
  }

  // relu(a I + b) for some images, in the middle of a padded map.
  template <bool FULL>
  void activate(int64_t node, int64_t first, int64_t count, const Affine &a, T *map) const {
    const T *from = x + node * places() * batch + first;
    for (int64_t y = 0; y < height; ++y)
      for (int64_t xx = 0; xx < width; ++xx, from += batch) {
        const Vector value = a.scale * load<FULL>(from, count) + a.shift;
        S::store(map + padded_at(y, xx) * S::lanes, relu ? (value < 0 ? Vector{} : value) : value);
      }
  }

  // Work for as many images as a register holds, one such group after the other.
  template <class Work>
  void each_group(Work work) const {
    int64_t first = 0;
    for (; first + S::lanes <= batch; first += S::lanes) work(std::true_type(), first, S::lanes);
    if (first < batch) work(std::false_type(), first, batch - first);
  }

  void forward(int64_t node, T *map, T *out) const {
    if (norm == BATCH) statistics_of_node(node);
    const Affine whole = affine_of_node(node);
    each_group([&](auto full, int64_t first, int64_t count) {
      constexpr bool FULL = decltype(full)::value;
      if (norm == INSTANCE) statistics_of_images<FULL>(node, first, count);
      activate<FULL>(node, first, count, norm == INSTANCE ? affine_of_images<FULL>(node, first, count) : whole, map);
      const int64_t row = width + 2, step = stride ? stride : 1;
      T *to = out + node * out_height() * out_width() * batch + first;
      for (int64_t y = 0; y < out_height(); ++y)
        for (int64_t xx = 0; xx < out_width(); ++xx, to += batch) {
          const T *from = map + (stride ? y * step * row + xx * step : padded_at(y, xx)) * S::lanes;
          store<FULL>(to, stride ? convolve(from, kernel + 9 * node, row) : S::load(from), count);
        }
    });
  }

  static Vector convolve(const T *from, const T *k, int64_t row) {
    Vector sum[3];
    for (int64_t dy = 0; dy < 3; ++dy, from += row * S::lanes)
      sum[dy] = k[3 * dy] * S::load(from) + k[3 * dy + 1] * S::load(from + S::lanes) +
                k[3 * dy + 2] * S::load(from + 2 * S::lanes);
    return sum[0] + sum[1] + sum[2];
  }

  // Sums over all images: the gradients of a node's parameters.
  struct Sums {
    Doubles kernel[9] = {}, shift{}, scale{};
  };

  // From the gradient of the result to that behind the norm, which x_grad gets, for some images.
  template <bool FULL>
  void back(
      int64_t node, int64_t first, int64_t count, const Affine &a, const T *out_grad, T *map, T *grads, T *x_grad,
      Sums &sums) const {
    const int64_t row = width + 2, step = stride ? stride : 1;
    activate<FULL>(node, first, count, a, map);
    // The gradient of the result, spread out by the stride.
    const T *from = out_grad + node * out_height() * out_width() * batch + first;
    Vector kernel_sum[9] = {};
    for (int64_t y = 0; y < out_height(); ++y)
      for (int64_t xx = 0; xx < out_width(); ++xx, from += batch) {
        const Vector grad = load<FULL>(from, count);
        S::store(grads + padded_at(y * step, xx * step) * S::lanes, grad);
        if (!stride) continue;
        const T *source = map + (y * step * row + xx * step) * S::lanes;
        for (int dy = 0; dy < 3; ++dy)
          for (int dx = 0; dx < 3; ++dx)
            kernel_sum[3 * dy + dx] += grad * S::load(source + (dy * row + dx) * S::lanes);
      }
    for (int n = 0; n < 9; ++n) sums.kernel[n] += wide(kernel_sum[n]);
    T flipped[9];
    for (int n = 0; n < 9; ++n) flipped[n] = stride ? kernel[9 * node + 8 - n] : T(0);
    Vector sum{}, moment{};
    const int64_t own = node * places() * batch + first;
    for (int64_t y = 0; y < height; ++y)
      for (int64_t xx = 0; xx < width; ++xx) {
        T *here = grads + padded_at(y, xx) * S::lanes;
        Vector grad = stride ? convolve(here - (row + 1) * S::lanes, flipped, row) : S::load(here);
        if (relu) grad = S::load(map + padded_at(y, xx) * S::lanes) <= 0 ? Vector{} : grad;
        const int64_t at = own + (y * width + xx) * batch;
        if (norm) {
          sum += grad;
          moment += grad * (load<FULL>(x + at, count) - a.mean);
        }
        if (x_grad) store<FULL>(x_grad + at, grad, count);
      }
    moment *= a.rstd;
    sums.shift += wide(sum);
    sums.scale += wide(moment);
    if (x_grad && norm == INSTANCE)
      normalise<FULL>(node, first, count, a, sum / T(places()), moment / T(places()), x_grad);
  }

  // Gradients of one node: of what it received, x_grad, and of its parameters, each of which may be left out.
  void backward(
      int64_t node, const T *out_grad, T *map, T *grads, T *x_grad, T *scale_grad, T *shift_grad, T *kernel_grad) const {
    const Affine whole = affine_of_node(node);
    Sums sums;
    each_group([&](auto full, int64_t first, int64_t count) {
      constexpr bool FULL = decltype(full)::value;
      const Affine a = norm == INSTANCE ? affine_of_images<FULL>(node, first, count) : whole;
      back<FULL>(node, first, count, a, out_grad, map, grads, x_grad, sums);
    });
    if (kernel_grad)
      for (int n = 0; n < 9; ++n) kernel_grad[9 * node + n] = T(total(sums.kernel[n]));
    if (scale_grad) scale_grad[node] = T(total(sums.scale));
    if (shift_grad) shift_grad[node] = T(total(sums.shift));
    if (!x_grad || norm == NO_NORM || norm == INSTANCE) return;
    const double count = norm == BATCH ? double(places()) * batch : INFINITY;
    const Vector mean_grad = Vector{} + T(total(sums.shift) / count);
    const Vector mean_moment = Vector{} + T(total(sums.scale) / count);
    each_group([&](auto full, int64_t first, int64_t count) {
      normalise<decltype(full)::value>(node, first, count, whole, mean_grad, mean_moment, x_grad);
    });
  }

  // From the gradient behind the norm to the one before it.
  template <bool FULL>
  void normalise(
      int64_t node, int64_t first, int64_t count, const Affine &a, Vector mean_grad, Vector mean_moment, T *x_grad) const {
    for (int64_t p = 0; p < places(); ++p) {
      const int64_t at = (node * places() + p) * batch + first;
      const Vector whitened = (load<FULL>(x + at, count) - a.mean) * a.rstd;
      store<FULL>(x_grad + at, a.scale * (load<FULL>(x_grad + at, count) - mean_grad - whitened * mean_moment), count);
    }
  }

  // Every node, with `maps` padded maps of scratch for each thread.
  template <class Work>
  int each_node(int64_t threads, int64_t maps, Work work) const {
    const int64_t room = maps * padded() * S::lanes;
    const int members = int(std::min<int64_t>(team(threads, double(nodes) * places() * batch), nodes));
    std::unique_ptr<T[]> scratch(new (std::nothrow) T[members * room]());
    if (!scratch) return NO_MEMORY;
#pragma omp parallel for schedule(dynamic) num_threads(members)
    for (int64_t node = 0; node < nodes; ++node) work(node, scratch.get() + omp_get_thread_num() * room);
    return OK;
  }
};

}  // namespace
