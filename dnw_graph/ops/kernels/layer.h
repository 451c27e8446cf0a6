// Linear layers and convolutions over the edges alone, where an edge is one weight: of an output channel, an input
// channel of its group, and a place in the kernel.

#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "sparse.h"
#include "static.h"
#include "transpose.h"

namespace {

template <class T>
using Buffer = std::unique_ptr<T[], void (*)(void *)>;

// Memory of zeros that begins on a register's boundary.
template <class T>
Buffer<T> zeros(double count) {
  void *made = nullptr;
  if (count < double(int64_t(1) << 40)) made = std::aligned_alloc(BYTES, round_up(int64_t(count) * sizeof(T) + 1, BYTES));
  if (!made) throw std::bad_alloc();
  std::fill_n(static_cast<T *>(made), int64_t(count), T(0));
  return {static_cast<T *>(made), std::free};
}

// What a layer does with the sum of one output channel: a bias, another tensor, a ReLU.
template <class T>
struct Finish {
  const T *bias, *add;
  bool relu_after;

  void write(const T *sum, int64_t count, int64_t channel, int64_t at, T *out) const {
    using S = Simd<T>;
    const T shift = bias ? bias[channel] : T(0);
    int64_t i = 0;
    for (; i + S::lanes <= count; i += S::lanes) {
      typename S::Vector value = S::load(sum + i) + shift;
      if (add) value += S::load(add + at + i);
      if (relu_after) value = value < 0 ? typename S::Vector{} : value;
      S::store(out + at + i, value);
    }
    for (; i < count; ++i) {
      T value = sum[i] + shift;
      if (add) value += add[at + i];
      out[at + i] = relu_after ? relu(value) : value;
    }
  }
};

// One axis of a convolution. The place k of a kernel reads the input stride · (output + shift(k)) + phase(k): the input
// is laid apart by phases, so that neighbours among the outputs read neighbours.
struct Axis {
  int64_t input, output, kernel, stride, padding, dilation;
  int64_t low, high, stored, pitch;
  std::vector<int64_t> phases;

  Axis(int64_t input, int64_t output, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation)
      : input(input), output(output), kernel(kernel), stride(stride), padding(padding), dilation(dilation), low(0),
        high(0), stored(0) {
    for (int64_t k = 0; k < kernel; ++k) {
      low = std::min(low, shift(k));
      high = std::max(high, shift(k));
      if (std::find(phases.begin(), phases.end(), phase(k)) == phases.end()) phases.push_back(phase(k));
    }
    for (int64_t each : phases) stored = std::max(stored, values(each));
    // Zeros between two rows are the right border of one and the left border of the next.
    pitch = std::max(output + high, stored - low);
  }
  int64_t at(int64_t k) const { return k * dilation - padding; }
  int64_t shift(int64_t k) const { return (at(k) >= 0 ? at(k) : at(k) - stride + 1) / stride; }
  int64_t phase(int64_t k) const { return at(k) - shift(k) * stride; }
  int64_t number(int64_t k) const { return std::find(phases.begin(), phases.end(), phase(k)) - phases.begin(); }
  // How many inputs of a phase some output reads.
  int64_t values(int64_t phase) const {
    return std::min(phase < input ? (input - phase + stride - 1) / stride : 0, output + high);
  }
};

// Where the sources of a target lie: a table of distances from the first one of its group.
template <class T>
struct Places {
  const T *first;
  const uint32_t *starts;

  const T *row(int64_t source) const { return first + starts[source]; }
};

template <class T, class Index>
struct Convolution {
  int64_t batch, inputs, outputs, groups;
  Axis y, x;
  const T *in;
  Edges<T, Index> edges;
  Finish<T> finish;
  T *out;

  int64_t per_group() const { return inputs / groups; }
  int64_t sources() const { return per_group() * y.kernel * x.kernel; }
  int64_t planes() const { return y.phases.size() * x.phases.size(); }

  int run(int64_t threads) const {
    constexpr int64_t lanes = Simd<T>::lanes;
    if (!edges.pointers_valid(outputs)) return WRONG_EDGES;
    if (!batch) return edges.sources_within(0, outputs, 0, sources()) ? OK : WRONG_EDGES;
    const int64_t maps = y.output * x.output;
    const bool pointwise = y.kernel * x.kernel * y.stride * x.stride == 1 && !y.padding && !x.padding;
    // Maps that begin on a boundary are read where they are, and others where copying them would cost more.
    const bool whole = maps % lanes == 0 || double(edges.count) < 16.0 * double(inputs);
    const bool direct = pointwise && maps >= (batch == 1 ? lanes : 4 * lanes) && whole;
    // A set of images is laid out as one row of places for each input channel and phase.
    const double image = double(y.pitch) * double(x.pitch);
    const double before = -double(y.low) * double(x.pitch) - double(x.low);
    const double after = double(y.high) * double(x.pitch) + double(x.high) + double(lanes);
    const double rows = double(inputs) * double(planes());
    const double fitting = (double(CACHE) / sizeof(T) / std::max(rows, 1.0) - before - after) / image;
    const int64_t set = direct ? 1 : std::max<int64_t>(1, int64_t(std::min(fitting, double(batch))));
    const double size = direct ? double(maps) : std::ceil((before + double(set) * image + after) / lanes) * lanes;
    if (rows * size > double(UINT32_MAX)) return NO_MEMORY;
    const int64_t plane = int64_t(size), lead = direct ? 0 : int64_t(before);
    const auto packed = zeros<T>(direct ? 0 : rows * size);
    std::vector<int64_t> within;
    for (int64_t i = 0; i < y.kernel; ++i)
      for (int64_t j = 0; j < x.kernel; ++j)
        within.push_back(
            (y.number(i) * int64_t(x.phases.size()) + x.number(j)) * plane + lead + y.shift(i) * x.pitch + x.shift(j));
    std::vector<uint32_t> starts;
    starts.reserve(sources());
    for (int64_t c = 0; c < per_group(); ++c)
      for (int64_t each : within) starts.push_back(uint32_t(c * planes() * plane + each));
    const double work = double(edges.count) * double(maps) * double(set);
    std::atomic<bool> wrong{false};
    for (int64_t first = 0; first < batch; first += set) {
      const int64_t images = std::min(set, batch - first);
      const int64_t places = ((images - 1) * y.pitch + y.output - 1) * x.pitch + x.output;
      const int64_t features = std::max(places, lanes);
      const int64_t step = REGISTERS * lanes;
      const int64_t fits = CACHE / int64_t(sizeof(T)) / std::max<int64_t>(inputs * planes(), 1);
      const int64_t tile = std::max(fits / step * step, step), tiles = (features + tile - 1) / tile;
      constexpr int64_t group = 8;
#pragma omp parallel num_threads(team(threads, work))
      {
        if (!direct)
#pragma omp for schedule(static)
          for (int64_t c = 0; c < inputs; ++c) pack(first, images, c, packed.get() + c * planes() * plane + lead, plane);
#pragma omp for collapse(2) schedule(dynamic)
        for (int64_t t = 0; t < tiles; ++t)
          for (int64_t o = 0; o < outputs; o += group) {
            const int64_t width = std::max(std::min(tile, features - t * tile), lanes);
            const int64_t at = std::min(t * tile, features - width);
            for (int64_t v = o; v < std::min(o + group, outputs); ++v) {
              if (!edges.sources_within(v, v + 1, 0, sources())) {
                wrong = true;
                continue;
              }
              const int64_t channel = v / (outputs / groups) * per_group();
              const T *own = direct ? in + (first * inputs + channel) * maps : packed.get() + channel * planes() * plane;
              target(v, {own, starts.data()}, at, width, first, places, direct);
            }
          }
      }
      if (wrong) return WRONG_EDGES;
    }
    return OK;
  }

  // One input channel of some images, a plane for each phase; what lies between stays zero.
  void pack(int64_t first, int64_t images, int64_t channel, T *to, int64_t plane) const {
    for (int64_t py : y.phases)
      for (int64_t px : x.phases) {
        for (int64_t b = 0; b < images; ++b)
          for (int64_t i = 0; i < y.values(py); ++i) {
            const T *row = in + (((first + b) * inputs + channel) * y.input + i * y.stride + py) * x.input + px;
            T *place = to + (b * y.pitch + i) * x.pitch;
            if (x.stride == 1)
              std::copy_n(row, x.values(px), place);
            else
              for (int64_t j = 0; j < x.values(px); ++j) place[j] = row[j * x.stride];
          }
        to += plane;
      }
  }

  // The places at … at + width - 1 of one output channel.
  void target(
      int64_t v, const Places<T> &z, int64_t at, int64_t width, int64_t first, int64_t places, bool direct) const {
    constexpr int64_t lanes = Simd<T>::lanes;
    T sums[REGISTERS * lanes];
    const int64_t vectors = (width + lanes - 1) / lanes, passes = (vectors + REGISTERS - 1) / REGISTERS;
    const int64_t per_pass = (vectors + passes - 1) / passes;
    for (int64_t vector = 0; vector < vectors; vector += per_pass) {
      const int64_t n = std::min(per_pass, vectors - vector), from = vector * lanes;
      const int64_t own = std::min(n * lanes, width - from), shift = std::max<int64_t>(lanes - own, 0);
      sum_upto<REGISTERS>(
          n, edges, edges.rowptr[v], edges.rowptr[v + 1], z, at + from - shift, own + shift, sums);
      write(v, sums + shift, at + from, std::min(own, places - at - from), first, direct);
    }
  }

  void write(int64_t v, const T *sums, int64_t at, int64_t count, int64_t first, bool direct) const {
    const int64_t maps = y.output * x.output;
    if (direct) return finish.write(sums, count, v, (first * outputs + v) * maps + at, out);
    int64_t line = at / x.pitch, column = at % x.pitch;
    for (int64_t done = 0; done < count; ++line, column = 0) {
      const int64_t length = std::min(x.pitch - column, count - done);
      const int64_t image = line / y.pitch, row = line % y.pitch;
      if (row < y.output && column < x.output)
        finish.write(
            sums + done, std::min(length, x.output - column), v,
            (((first + image) * outputs + v) * y.output + row) * x.output + column, out);
      done += length;
    }
  }
};

// y = relu(x Aᵀ + bias), images in rows.
template <class T, class Index>
int sparse_linear(
    int64_t threads, int64_t batch, int64_t inputs, int64_t outputs, const T *x, const Edges<T, Index> &edges,
    const Finish<T> &finish, T *out) {
  using S = Simd<T>;
  constexpr int64_t lanes = S::lanes;
  if (!edges.pointers_valid(outputs)) return WRONG_EDGES;
  if (!batch) return edges.sources_within(0, outputs, 0, inputs) ? OK : WRONG_EDGES;
  std::atomic<bool> wrong{false};
  if (batch == 1) {
#pragma omp parallel for schedule(static) num_threads(team(threads, double(edges.count)))
    for (int64_t v = 0; v < outputs; ++v) {
      if (!edges.sources_within(v, v + 1, 0, inputs)) {
        wrong = true;
        continue;
      }
      const Index *columns = edges.columns;
      const T *values = edges.values;
      T a = 0, b = 0, c = 0, d = 0;
      int64_t e = edges.rowptr[v];
      for (; e + 4 <= edges.rowptr[v + 1]; e += 4) {
        a += values[e] * x[columns[e]];
        b += values[e + 1] * x[columns[e + 1]];
        c += values[e + 2] * x[columns[e + 2]];
        d += values[e + 3] * x[columns[e + 3]];
      }
      for (; e < edges.rowptr[v + 1]; ++e) a += values[e] * x[columns[e]];
      const T sum = (a + c) + (b + d);
      finish.write(&sum, 1, v, v, out);
    }
    return wrong ? WRONG_EDGES : OK;
  }
  // Images side by side, so many that all inputs of them stay in cache.
  const int64_t fitting = CACHE / int64_t(sizeof(T)) / std::max<int64_t>(inputs, 1);
  const int64_t most = std::clamp<int64_t>(fitting / lanes, 4, REGISTERS) * lanes;
  const int64_t sets = (batch + most - 1) / most, set = round_up((batch + sets - 1) / sets, lanes);
  const auto packed = zeros<T>(double(inputs) * double(set));
  for (int64_t first = 0; first < batch; first += set) {
    const int64_t images = std::min(set, batch - first), width = round_up(images, lanes);
#pragma omp parallel num_threads(team(threads, double(edges.count) * double(width)))
    {
#pragma omp for schedule(static)
      for (int64_t i = 0; i < inputs; i += lanes)
        for (int64_t b = 0; b < images; b += lanes) {
          const T *from = x + (first + b) * inputs + i;
          T *to = packed.get() + i * width + b;
          if (i + lanes <= inputs && b + lanes <= images)
            transposed_square(from, inputs, [&](int64_t n, typename S::Vector column) { S::store(to + n * width, column); });
          else
            for (int64_t n = 0; n < std::min(lanes, images - b); ++n)
              for (int64_t m = 0; m < std::min(lanes, inputs - i); ++m) to[m * width + n] = from[n * inputs + m];
        }
#pragma omp for schedule(dynamic)
      for (int64_t o = 0; o < outputs; o += lanes) {
        T sums[lanes][REGISTERS * lanes];
        const int64_t count = std::min(lanes, outputs - o);
        if (!edges.sources_within(o, o + count, 0, inputs)) {
          wrong = true;
          continue;
        }
        for (int64_t v = 0; v < count; ++v)
          sum_upto<REGISTERS>(
              width / lanes, edges, edges.rowptr[o + v], edges.rowptr[o + v + 1], Matrix<T>{packed.get(), width, 0},
              0, width, sums[v]);
        for (int64_t b = 0; b < images; b += lanes) {
          T *to = out + (first + b) * outputs + o;
          if (count == lanes && b + lanes <= images)
            transposed_square(&sums[0][b], REGISTERS * lanes, [&](int64_t n, typename S::Vector column) {
              if (finish.bias) column += S::load(finish.bias + o);
              if (finish.relu_after) column = column < 0 ? typename S::Vector{} : column;
              S::store(to + n * outputs, column);
            });
          else
            for (int64_t n = 0; n < std::min(lanes, images - b); ++n)
              for (int64_t v = 0; v < count; ++v)
                finish.write(&sums[v][b + n], 1, o + v, (first + b + n) * outputs + o + v, out);
        }
      }
    }
    if (wrong) return WRONG_EDGES;
  }
  return OK;
}

}  // namespace
