// Normalisation → ReLU → 3×3 single-channel convolution, each optional, and its gradients, in one pass.
// Maps are node-major with the images last, [nodes, height, width, batch]: a register holds one pixel of several
// images, so that borders and small maps cost nothing extra, and the input of a node is one row in memory.

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

// One double per value of a register of T, for long sums.
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

  // The number of images in use in a register; FULL: all of them.
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
  // Σ f(value) over a node's row, in pieces of moderate length, so that no low-precision sum grows long.
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

  // For the images of one register, starting at image `first`.
  struct Affine {
    Vector scale, shift, mean, rstd;  // For a I + b, and for (I - mean) · rstd.
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
    const int64_t rows = height, columns = width, pitch = batch;
    const bool positive = relu;
    const Vector factor = a.scale, offset = a.shift;
    const T *from = x + node * places() * batch + first;
    T *to = map + padded_at(0, 0) * S::lanes;
    for (int64_t y = 0; y < rows; ++y, to += 2 * S::lanes)
      for (int64_t xx = 0; xx < columns; ++xx, from += pitch, to += S::lanes) {
        const Vector value = factor * load<FULL>(from, count) + offset;
        S::store(to, positive ? (value < 0 ? Vector{} : value) : value);
      }
  }

  // Work for the images of one register, group by group.
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
      T *to = out + node * out_height() * out_width() * batch + first;
      if (stride)
        convolve_map<FULL>(Kernel(kernel + 9 * node), map, to, count);
      else
        for (int64_t y = 0; y < height; ++y)
          for (int64_t xx = 0; xx < width; ++xx, to += batch) store<FULL>(to, S::load(map + padded_at(y, xx) * S::lanes), count);
    });
  }

  // The weights of a convolution, each in a register.
  struct Kernel {
    Vector k[9];

    explicit Kernel(const T *from, bool flipped = false) {
      for (int n = 0; n < 9; ++n) k[n] = Vector{} + from[flipped ? 8 - n : n];
    }
    // The sum over 3 × 3 pixels starting at `from`, in rows of `row` values.
    Vector at(const T *from, int64_t row) const {
      const T *second = from + row, *third = second + row;
      const Vector sums[3] = {
          k[0] * S::load(from) + k[1] * S::load(from + S::lanes) + k[2] * S::load(from + 2 * S::lanes),
          k[3] * S::load(second) + k[4] * S::load(second + S::lanes) + k[5] * S::load(second + 2 * S::lanes),
          k[6] * S::load(third) + k[7] * S::load(third + S::lanes) + k[8] * S::load(third + 2 * S::lanes)};
      return sums[0] + sums[1] + sums[2];
    }
  };

  template <bool FULL>
  void convolve_map(const Kernel &given, const T *map, T *to, int64_t count) const {
    const Kernel weights = given;
    const int64_t rows = out_height(), columns = out_width(), pitch = batch, row = (width + 2) * S::lanes;
    const int64_t step = stride * S::lanes;
    for (int64_t y = 0; y < rows; ++y, map += stride * row) {
      const T *from = map;
      for (int64_t xx = 0; xx < columns; ++xx, to += pitch, from += step) store<FULL>(to, weights.at(from, row), count);
    }
  }

  // Sums over all images: the gradients of a node's parameters.
  struct Sums {
    Doubles kernel[9] = {}, shift{}, scale{};
  };

  // The gradient of the result, spread by the stride in the middle of a padded map, and that of the kernel.
  template <bool FULL>
  void spread(const T *from, int64_t count, const T *map, T *grads, Sums &sums) const {
    const int64_t rows = out_height(), columns = out_width(), pitch = batch, row = (width + 2) * S::lanes;
    const int64_t step = (stride ? stride : 1) * S::lanes, down = (stride ? stride : 1) * row;
    const bool convolved = stride;
    Vector sum[9] = {};
    for (int64_t y = 0; y < rows; ++y, map += down, grads += down) {
      const T *source = map;
      T *to = grads + row + S::lanes;
      for (int64_t xx = 0; xx < columns; ++xx, from += pitch, source += step, to += step) {
        const Vector grad = load<FULL>(from, count);
        S::store(to, grad);
        if (!convolved) continue;
#pragma GCC unroll 9
        for (int n = 0; n < 9; ++n) sum[n] += grad * S::load(source + n / 3 * row + n % 3 * S::lanes);
      }
    }
    for (int n = 0; n < 9; ++n) sums.kernel[n] += wide(sum[n]);
  }

  // Computes, for some images, the gradient after the norm (into x_grad) from the gradient of the result.
  template <bool FULL>
  void back(
      int64_t node, int64_t first, int64_t count, const Affine &a, const T *out_grad, T *map, T *grads, T *x_grad,
      Sums &sums) const {
    activate<FULL>(node, first, count, a, map);
    spread<FULL>(out_grad + node * out_height() * out_width() * batch + first, count, map, grads, sums);
    const T *const own = x + node * places() * batch + first;
    T *const to = x_grad ? x_grad + node * places() * batch + first : nullptr;
    Vector sum{}, moment{};
    if (stride)
      back_to_norm<FULL, true>(Kernel(kernel + 9 * node, true), a.mean, own, count, map, grads, to, sum, moment);
    else
      back_to_norm<FULL, false>(Kernel(grads), a.mean, own, count, map, grads, to, sum, moment);
    moment *= a.rstd;
    sums.shift += wide(sum);
    sums.scale += wide(moment);
    if (x_grad && norm == INSTANCE)
      normalise<FULL>(node, first, count, a, sum / T(places()), moment / T(places()), x_grad);
  }

  template <bool FULL, bool CONVOLVED>
  void back_to_norm(
      const Kernel &given, Vector mean, const T *own, int64_t count, const T *map, const T *grads, T *to, Vector &sum,
      Vector &moment) const {
    const Kernel weights = given;
    const int64_t rows = height, columns = width, pitch = batch, row = (width + 2) * S::lanes;
    const bool normed = norm, positive = relu;
    Vector total{}, product{};
    for (int64_t y = 0; y < rows; ++y, grads += 2 * S::lanes, map += 2 * S::lanes)
      for (int64_t xx = 0; xx < columns; ++xx, grads += S::lanes, map += S::lanes, own += pitch) {
        Vector grad = CONVOLVED ? weights.at(grads, row) : S::load(grads + row + S::lanes);
        if (positive) grad = S::load(map + row + S::lanes) <= 0 ? Vector{} : grad;
        if (normed) {
          total += grad;
          product += grad * (load<FULL>(own, count) - mean);
        }
        if (to) {
          store<FULL>(to, grad, count);
          to += pitch;
        }
      }
    sum = total;
    moment = product;
  }

  // Gradients of one node: of its input, x_grad, and of its parameters, each of which may be absent.
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

  // Computes the gradient before the norm from the one after it.
  template <bool FULL>
  void normalise(
      int64_t node, int64_t first, int64_t count, const Affine &a, Vector mean_grad, Vector mean_moment, T *x_grad) const {
    const int64_t count_of_places = places(), pitch = batch;
    const Vector factor = a.scale, mean = a.mean, rstd = a.rstd;
    const T *own = x + node * places() * batch + first;
    T *to = x_grad + node * places() * batch + first;
    for (int64_t p = 0; p < count_of_places; ++p, own += pitch, to += pitch) {
      const Vector whitened = (load<FULL>(own, count) - mean) * rstd;
      store<FULL>(to, factor * (load<FULL>(to, count) - mean_grad - whitened * mean_moment), count);
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
