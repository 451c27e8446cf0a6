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

constexpr int64_t STAGED = 1 << 14;  // Bytes of a node's maps that fit into an L1 cache with their results.

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
  int64_t out_places() const { return out_height() * out_width(); }
  int64_t padded() const { return (height + 2) * (width + 2); }
  int64_t padded_at(int64_t y, int64_t xx) const { return (y + 1) * (width + 2) + xx + 1; }
  // Images of a node that are processed together: a multiple of a cache line.
  int64_t set() const {
    constexpr int64_t line = std::max<int64_t>(S::lanes, 64 / sizeof(T));
    const int64_t fitting = STAGED / int64_t(sizeof(T)) / std::max(places(), out_places()) / line * line;
    return std::min(std::max(fitting, line), round_up(batch, S::lanes));
  }
  // Scratch of the forward and of the backward pass, in values.
  int64_t forward_room() const { return set() * (places() + out_places()) + padded() * S::lanes; }
  int64_t backward_room() const { return set() * (2 * places() + out_places()) + 2 * padded() * S::lanes; }

  // One register with `count` images; the others are zero.
  static Vector load(const T *from, int64_t count) {
    if (count == S::lanes) return S::load(from);
    Vector value{};
    std::memcpy(&value, from, count * sizeof(T));
    return value;
  }
  static void store(T *to, Vector value, int64_t count) {
    if (count == S::lanes)
      S::store(to, value);
    else
      std::memcpy(to, &value, count * sizeof(T));
  }
  // Copies images of maps [pixel, image] to contiguous maps of one register's images each, and back. Without copies
  // a cache line that two registers share would be fetched twice: pixels lie a power of two apart, in few cache sets.
  void stage(const T *from, int64_t count_of_places, int64_t images, T *to) const {
    const int64_t pitch = batch, whole = images / S::lanes * S::lanes;
    for (int64_t p = 0; p < count_of_places; ++p, from += pitch) {
      T *place = to + p * S::lanes;
      int64_t b = 0;
      for (; b < whole; b += S::lanes, place += count_of_places * S::lanes) S::store(place, S::load(from + b));
      if (b < images) S::store(place, load(from + b, images - b));
    }
  }
  void unstage(const T *from, int64_t count_of_places, int64_t images, T *to) const {
    const int64_t pitch = batch, whole = images / S::lanes * S::lanes;
    for (int64_t p = 0; p < count_of_places; ++p, to += pitch) {
      const T *place = from + p * S::lanes;
      int64_t b = 0;
      for (; b < whole; b += S::lanes, place += count_of_places * S::lanes) S::store(to + b, S::load(place));
      if (b < images) store(to + b, S::load(place), images - b);
    }
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

  // For the images of one register.
  struct Affine {
    Vector scale, shift, mean, rstd;  // For a I + b, and for (I - mean) · rstd.
  };

  // Σ f(value) over the pixels of each image, in four independent sums, so that additions do not wait for each other.
  template <class Term>
  Vector sum_of_places(const T *own, Term term) const {
    const int64_t values = places() * S::lanes, step = 4 * S::lanes;
    Vector sums[4] = {};
    int64_t at = 0;
    for (; at + step <= values; at += step)
      for (int n = 0; n < 4; ++n) sums[n] += term(S::load(own + at + n * S::lanes));
    for (; at < values; at += S::lanes) sums[0] += term(S::load(own + at));
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
  }
  void statistics_of_images(int64_t node, int64_t first, int64_t count, const T *own) const {
    const Vector centre = sum_of_places(own, [](Vector value) { return value; }) / T(places());
    const Vector squares = sum_of_places(own, [=](Vector value) { return (value - centre) * (value - centre); });
    store(mean + node * batch + first, centre, count);
    store(variance + node * batch + first, squares / T(places()), count);
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
  Affine affine_of_images(int64_t node, int64_t first, int64_t count) const {
    const int64_t at = node * batch + first;
    return affine(node, load(mean + at, count), load(variance + at, count));
  }

  static Vector activated(Vector value, const Affine &a, bool positive) {
    value = a.scale * value + a.shift;
    return positive ? (value < 0 ? Vector{} : value) : value;
  }
  // relu(a I + b) of maps, in the middle of padded maps.
  void activate(const T *own, const Affine &given, T *map) const {
    const Affine a = given;
    const int64_t rows = height, columns = width;
    const bool positive = relu;
    T *to = map + padded_at(0, 0) * S::lanes;
    for (int64_t y = 0; y < rows; ++y, to += 2 * S::lanes)
      for (int64_t xx = 0; xx < columns; ++xx, own += S::lanes, to += S::lanes)
        S::store(to, activated(S::load(own), a, positive));
  }

  // Work for each set of images, and within a set for the images of each register.
  template <class Work>
  void each_set(Work work) const {
    const int64_t most = set();
    for (int64_t first = 0; first < batch; first += most) work(first, std::min(most, batch - first));
  }
  template <class Work>
  static void each_group(int64_t images, Work work) {
    for (int64_t b = 0; b < images; b += S::lanes) work(b, std::min<int64_t>(S::lanes, images - b));
  }

  void forward(int64_t node, T *scratch, T *out) const {
    T *const own = scratch, *const made = own + set() * places(), *const map = made + set() * out_places();
    if (norm == BATCH) statistics_of_node(node);
    const Affine whole = affine_of_node(node);
    each_set([&](int64_t first, int64_t images) {
      stage(x + node * places() * batch + first, places(), images, own);
      each_group(images, [&](int64_t b, int64_t count) {
        const T *from = own + b * places();
        T *to = made + b * out_places();
        if (norm == INSTANCE) statistics_of_images(node, first + b, count, from);
        const Affine a = norm == INSTANCE ? affine_of_images(node, first + b, count) : whole;
        if (stride) {
          activate(from, a, map);
          convolve_map(Kernel(kernel + 9 * node), map, to);
        } else {
          const bool positive = relu;
          for (int64_t at = 0; at < places() * S::lanes; at += S::lanes)
            S::store(to + at, activated(S::load(from + at), a, positive));
        }
      });
      unstage(made, out_places(), images, out + node * out_places() * batch + first);
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

  void convolve_map(const Kernel &given, const T *map, T *to) const {
    const Kernel weights = given;
    const int64_t rows = out_height(), columns = out_width(), row = (width + 2) * S::lanes, step = stride * S::lanes;
    for (int64_t y = 0; y < rows; ++y, map += stride * row) {
      const T *from = map;
      for (int64_t xx = 0; xx < columns; ++xx, to += S::lanes, from += step) S::store(to, weights.at(from, row));
    }
  }

  // Sums over all images: the gradients of a node's parameters.
  struct Sums {
    Doubles kernel[9] = {}, shift{}, scale{};
  };

  // The gradient of the result, spread by the stride in the middle of a padded map, and that of the kernel.
  void spread(const T *from, const T *map, T *grads, Sums &sums) const {
    const int64_t rows = out_height(), columns = out_width(), row = (width + 2) * S::lanes;
    const int64_t step = stride * S::lanes, down = stride * row;
    Vector sum[9] = {};
    for (int64_t y = 0; y < rows; ++y, map += down, grads += down) {
      const T *source = map;
      T *to = grads + row + S::lanes;
      for (int64_t xx = 0; xx < columns; ++xx, from += S::lanes, source += step, to += step) {
        const Vector grad = S::load(from);
        S::store(to, grad);
#pragma GCC unroll 9
        for (int n = 0; n < 9; ++n) sum[n] += grad * S::load(source + n / 3 * row + n % 3 * S::lanes);
      }
    }
    for (int n = 0; n < 9; ++n) sums.kernel[n] += wide(sum[n]);
  }

  // Computes, for the images of one register, the gradient after the norm (before it, if INSTANCE) into `to`.
  void back(int64_t node, const Affine &a, const T *own, const T *given, T *to, T *map, T *grads, Sums &sums) const {
    Vector sum{}, moment{};
    if (stride) {
      activate(own, a, map);
      spread(given, map, grads, sums);
      const Kernel weights(kernel + 9 * node, true);
      const int64_t row = (width + 2) * S::lanes;
      back_to_norm(a, own, 2 * S::lanes, to, sum, moment, grads, [&](const T *from) { return weights.at(from, row); });
    } else {
      back_to_norm(a, own, 0, to, sum, moment, given, [](const T *from) { return S::load(from); });
    }
    moment *= a.rstd;
    sums.shift += wide(sum);
    sums.scale += wide(moment);
    if (norm == INSTANCE) normalise(a, own, sum / T(places()), moment / T(places()), to);
  }

  // `gap` is the distance between two rows of the gradients.
  template <class Grad>
  void back_to_norm(
      const Affine &given, const T *own, int64_t gap, T *to, Vector &sum, Vector &moment, const T *grads,
      Grad grad_at) const {
    const Affine a = given;
    const int64_t rows = height, columns = width;
    const bool positive = relu;
    Vector total{}, product{};
    for (int64_t y = 0; y < rows; ++y, grads += gap)
      for (int64_t xx = 0; xx < columns; ++xx, grads += S::lanes, own += S::lanes, to += S::lanes) {
        const Vector value = S::load(own);
        Vector grad = grad_at(grads);
        if (positive) grad = a.scale * value + a.shift <= 0 ? Vector{} : grad;
        total += grad;
        product += grad * (value - a.mean);
        S::store(to, grad);
      }
    sum = total;
    moment = product;
  }

  // Gradients of one node: of its input, x_grad, and of its parameters, each of which may be absent.
  void backward(
      int64_t node, const T *out_grad, T *scratch, T *x_grad, T *scale_grad, T *shift_grad, T *kernel_grad) const {
    T *const own = scratch, *const made = own + set() * places(), *const given = made + set() * places();
    T *const map = given + set() * out_places(), *const grads = map + padded() * S::lanes;
    const T *const received = x + node * places() * batch;
    T *const to = x_grad ? x_grad + node * places() * batch : nullptr;
    const Affine whole = affine_of_node(node);
    Sums sums;
    each_set([&](int64_t first, int64_t images) {
      stage(received + first, places(), images, own);
      stage(out_grad + node * out_places() * batch + first, out_places(), images, given);
      each_group(images, [&](int64_t b, int64_t count) {
        const Affine a = norm == INSTANCE ? affine_of_images(node, first + b, count) : whole;
        back(node, a, own + b * places(), given + b * out_places(), made + b * places(), map, grads, sums);
      });
      if (to) unstage(made, places(), images, to + first);
    });
    if (kernel_grad)
      for (int n = 0; n < 9; ++n) kernel_grad[9 * node + n] = T(total(sums.kernel[n]));
    if (scale_grad) scale_grad[node] = T(total(sums.scale));
    if (shift_grad) shift_grad[node] = T(total(sums.shift));
    if (!to || norm == NO_NORM || norm == INSTANCE) return;
    const double count = norm == BATCH ? double(places()) * batch : INFINITY;
    const Vector mean_grad = Vector{} + T(total(sums.shift) / count);
    const Vector mean_moment = Vector{} + T(total(sums.scale) / count);
    each_set([&](int64_t first, int64_t images) {
      stage(received + first, places(), images, own);
      stage(to + first, places(), images, made);
      each_group(images, [&](int64_t b, int64_t) {
        normalise(whole, own + b * places(), mean_grad, mean_moment, made + b * places());
      });
      unstage(made, places(), images, to + first);
    });
  }

  // Computes the gradient before the norm from the one after it.
  void normalise(const Affine &given, const T *own, Vector mean_grad, Vector mean_moment, T *to) const {
    const Affine a = given;
    const int64_t values = places() * S::lanes;
    for (int64_t at = 0; at < values; at += S::lanes) {
      const Vector whitened = (S::load(own + at) - a.mean) * a.rstd;
      S::store(to + at, a.scale * (S::load(to + at) - mean_grad - whitened * mean_moment));
    }
  }

  // Calls `work` for every node, with scratch per thread that is zero at first: the borders of padded maps stay zero.
  template <class Work>
  int each_node(int64_t threads, int64_t room, Work work) const {
    const int members = int(std::min<int64_t>(team(threads, double(nodes) * places() * batch), nodes));
    std::unique_ptr<T[]> scratch(new (std::nothrow) T[members * room]());
    if (!scratch) return NO_MEMORY;
#pragma omp parallel for schedule(dynamic) num_threads(members)
    for (int64_t node = 0; node < nodes; ++node) work(node, scratch.get() + omp_get_thread_num() * room);
    return OK;
  }
};

}  // namespace
