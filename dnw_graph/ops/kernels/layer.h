// Linear layers and convolutions over the edges alone. An edge is one weight, of an output channel, an input channel of
// its group, and a position in the kernel.

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

// Zeroed memory, aligned to a register.
template <class T>
Buffer<T> zeros(double count) {
  void *made = nullptr;
  if (count < double(int64_t(1) << 40)) made = std::aligned_alloc(BYTES, round_up(int64_t(count) * sizeof(T) + 1, BYTES));
  if (!made) throw std::bad_alloc();
  std::fill_n(static_cast<T *>(made), int64_t(count), T(0));
  return {static_cast<T *>(made), std::free};
}

// Copies a line of a map, which is too short for a call of memmove.
template <class T>
void copy_line(const T *from, int64_t count, T *to) {
  using S = Simd<T>;
  if (count < S::lanes) {
    for (int64_t i = 0; i < count; ++i) to[i] = from[i];
    return;
  }
#pragma GCC unroll 1
  for (int64_t i = 0; i < count - S::lanes; i += S::lanes) S::store(to + i, S::load(from + i));
  S::store(to + count - S::lanes, S::load(from + count - S::lanes));
}

// Finishes the sums of one output channel: adds a bias and another tensor, applies a ReLU.
template <class T>
struct Finish {
  const T *bias, *add;
  bool relu_after;

  void write(const T *sum, int64_t count, int64_t channel, int64_t at, T *out) const {
    using S = Simd<T>;
    if (!bias && !add && !relu_after) return copy_line(sum, count, out + at);
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

// Addresses of the sources of a target: a table of offsets from the first one of its group.
template <class T>
struct Places {
  const T *first;
  const uint32_t *starts;

  const T *row(int64_t source) const { return first + starts[source]; }
};

// One side of maps, split into phases: element i of a phase is pixel stride · i + phase.
struct Side {
  int64_t size, stride;
  std::vector<int64_t> phases;

  int64_t within(int64_t phase) const { return phase < size ? (size - phase + stride - 1) / stride : 0; }
};

// One axis of a convolution. For each output, position k of a kernel reads element output + shifts[k] of phase
// numbers[k]: the input is split into phases so that adjacent outputs read adjacent elements.
struct Axis : Side {
  int64_t output, low = 0, high = 0, pitch = 0;
  std::vector<int64_t> shifts, numbers;

  Axis(int64_t input, int64_t output, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation)
      : Side{input, stride, {}}, output(output) {
    for (int64_t k = 0; k < kernel; ++k) {
      const int64_t at = k * dilation - padding, shift = (at >= 0 ? at : at - stride + 1) / stride;
      const auto found = std::find(phases.begin(), phases.end(), at - shift * stride);
      shifts.push_back(shift);
      numbers.push_back(found - phases.begin());
      if (found == phases.end()) phases.push_back(at - shift * stride);
    }
    measure();
  }
  // The axis along which the gradients of the inputs of one phase read those of the outputs.
  Axis transposed() const {
    Axis other = *this;
    static_cast<Side &>(other) = {output, 1, {0}};
    other.output = (size + stride - 1) / stride;
    for (int64_t &each : other.shifts) each = -each;
    std::fill(other.numbers.begin(), other.numbers.end(), 0);
    other.measure();
    return other;
  }
  int64_t kernel() const { return shifts.size(); }
  // Number of inputs of a phase that any output reads.
  int64_t values(int64_t phase) const { return std::min(within(phase), output + high); }
  bool pointwise() const { return kernel() == 1 && stride == 1 && !shifts[0] && size == output; }

 private:
  void measure() {
    low = std::min<int64_t>(0, *std::min_element(shifts.begin(), shifts.end()));
    high = std::max<int64_t>(0, *std::max_element(shifts.begin(), shifts.end()));
    int64_t stored = 0;
    for (int64_t each : phases) stored = std::max(stored, values(each));
    // Zeros between two rows are the right border of one and the left border of the next.
    pitch = std::max(output + high, stored - low);
  }
};

// Input maps of a convolution, for a set of images at a time, as one row for each channel and phase. Maps of a
// pointwise convolution are read in place, unless many edges would read them unaligned.
template <class T>
struct Planes {
  const Axis &y, &x;
  int64_t batch, channels, per_group;
  const T *in;
  bool direct;
  int64_t set, plane, lead, first = 0, images = 0;
  Buffer<T> packed{nullptr, std::free};
  std::vector<uint32_t> starts;

  Planes(const Axis &y, const Axis &x, int64_t batch, int64_t channels, int64_t groups, int64_t edges, const T *in)
      : y(y), x(x), batch(batch), channels(channels), per_group(channels / groups), in(in) {
    constexpr int64_t lanes = Simd<T>::lanes;
    const int64_t maps = y.output * x.output;
    const bool whole = maps % lanes == 0 || double(edges) < 16.0 * double(channels);
    direct = y.pointwise() && x.pointwise() && maps >= (batch == 1 ? lanes : 4 * lanes) && whole;
    const double image = double(y.pitch) * double(x.pitch);
    const double before = -double(y.low) * double(x.pitch) - double(x.low);
    const double after = double(y.high) * double(x.pitch) + double(x.high) + double(lanes);
    const double rows = double(channels) * double(phases());
    const double fitting = (double(CACHE) / sizeof(T) / std::max(rows, 1.0) - before - after) / image;
    set = direct ? 1 : std::max<int64_t>(1, int64_t(std::min(fitting, double(batch))));
    const double size = direct ? double(maps) : std::ceil((before + double(set) * image + after) / lanes) * lanes;
    if (rows * size > double(UINT32_MAX)) throw std::bad_alloc();
    plane = int64_t(size);
    lead = direct ? 0 : int64_t(before);
    if (!direct) packed = zeros<T>(rows * size);
    starts.reserve(per_group * y.kernel() * x.kernel());
    for (int64_t c = 0; c < per_group; ++c)
      for (int64_t i = 0; i < y.kernel(); ++i)
        for (int64_t j = 0; j < x.kernel(); ++j) {
          const int64_t phase = y.numbers[i] * int64_t(x.phases.size()) + x.numbers[j];
          starts.push_back(uint32_t((c * phases() + phase) * plane + lead + y.shifts[i] * x.pitch + x.shifts[j]));
        }
  }

  int64_t phases() const { return y.phases.size() * x.phases.size(); }
  // Length of a row of outputs for the set.
  int64_t places() const { return direct ? plane : ((images - 1) * y.pitch + y.output - 1) * x.pitch + x.output; }
  void begin(int64_t image) {
    first = image;
    images = std::min(set, batch - first);
  }
  // The sources of the edges of a group.
  Places<T> group(int64_t number) const {
    const int64_t channel = number * per_group;
    return {direct ? in + (first * channels + channel) * plane : packed.get() + channel * phases() * plane, starts.data()};
  }
  // Packs the set, each thread of a team its share of the channels, a plane for each phase; gaps stay zero. Images come
  // first, so that maps are read in the order of memory.
  void pack() const {
    const int64_t members = omp_get_num_threads(), member = omp_get_thread_num();
    for (int64_t b = 0; b < images; ++b)
      for (int64_t c = channels * member / members; c < channels * (member + 1) / members; ++c) {
        T *to = packed.get() + c * phases() * plane + lead + b * y.pitch * x.pitch;
        for (int64_t py : y.phases)
          for (int64_t px : x.phases) {
            const T *row = in + (((first + b) * channels + c) * y.size + py) * x.size + px;
            for (int64_t i = 0; i < y.values(py); ++i, row += y.stride * x.size)
              if (x.stride == 1)
                copy_line(row, x.values(px), to + i * x.pitch);
              else
                for (int64_t j = 0; j < x.values(px); ++j) to[i * x.pitch + j] = row[j * x.stride];
            to += plane;
          }
      }
#pragma omp barrier
  }
};

// A place in the maps of planes.
struct Cursor {
  int64_t column, row, image;
};

// Output maps of a convolution: `channels` of them, each split into phases.
template <class T>
struct Written {
  const Side y, x;
  int64_t channels;
  Finish<T> finish;
  T *out;

  int64_t phases() const { return y.phases.size() * x.phases.size(); }
  // Whether the outputs of an image lie as its sums: as one line.
  bool in_order(const Planes<T> &from) const { return from.direct && y.stride * x.stride == 1; }
  Cursor cursor(const Planes<T> &from, int64_t at) const {
    if (in_order(from)) return {at, 0, 0};
    return {at % from.x.pitch, at / from.x.pitch % from.y.pitch, at / from.x.pitch / from.y.pitch};
  }
  // Writes sums of a target (a phase of a channel): `count` of them from `at` on, which moves on.
  void write(int64_t target, const Planes<T> &from, const T *sums, int64_t count, Cursor &at) const {
    const int64_t channel = target / phases(), py = y.phases[target % phases() / x.phases.size()];
    const int64_t px = x.phases[target % x.phases.size()], rows = y.within(py), columns = x.within(px);
    if (in_order(from)) {
      finish.write(sums, count, channel, (from.first * channels + channel) * rows * columns + at.column, out);
      at.column += count;
      return;
    }
    const int64_t pitch = from.x.pitch;
    for (int64_t done = 0; done < count;) {
      const int64_t length = std::min(pitch - at.column, count - done);
      if (at.row < rows && at.column < columns) {
        const int64_t own = std::min(length, columns - at.column);
        const int64_t first = (((from.first + at.image) * channels + channel) * y.size + at.row * y.stride + py) * x.size;
        if (x.stride == 1)
          finish.write(sums + done, own, channel, first + px + at.column, out);
        else
          for (int64_t j = 0; j < own; ++j)
            finish.write(sums + done + j, 1, channel, first + px + (at.column + j) * x.stride, out);
      }
      done += length;
      at.column += length;
      if (at.column < pitch) continue;
      at.column = 0;
      if (++at.row < from.y.pitch) continue;
      at.row = 0;
      ++at.image;
    }
  }
};

// Computes every target, that is, each phase of each output channel, from the sources of its edges.
template <class T, class Index>
int convolution(
    int64_t threads, int64_t groups, const Edges<T, Index> &edges, Planes<T> &from, const Written<T> &to) {
  constexpr int64_t lanes = Simd<T>::lanes, group = 8;
  const int64_t targets = to.channels * to.phases(), sources = from.starts.size();
  std::atomic<bool> wrong{false};
  for (int64_t first = 0; first < from.batch; first += from.set) {
    from.begin(first);
    const int64_t places = from.places(), features = std::max(places, lanes), step = REGISTERS * lanes;
    const int64_t fits = CACHE / int64_t(sizeof(T)) / std::max<int64_t>(from.channels * from.phases(), 1);
    const int64_t tile = std::max(fits / step * step, step);
    const int64_t tiles = (features - lanes) / tile + 1;  // The last one may be wider: no place belongs to two.
#pragma omp parallel num_threads(team(threads, double(edges.count) * double(places)))
    {
      if (!from.direct) from.pack();
#pragma omp for collapse(2) schedule(dynamic)
      for (int64_t t = 0; t < tiles; ++t)
        for (int64_t o = 0; o < targets; o += group) {
          const int64_t at = t * tile, width = t + 1 < tiles ? tile : features - at;
          const Cursor start = to.cursor(from, at);
          for (int64_t v = o; v < std::min(o + group, targets); ++v) {
            if (!edges.sources_within(v, v + 1, 0, sources)) {
              wrong = true;
              continue;
            }
            const Places<T> own = from.group(v / (targets / groups));
            T sums[REGISTERS * lanes];
            Cursor cursor = start;
            const int64_t vectors = (width + lanes - 1) / lanes, passes = (vectors + REGISTERS - 1) / REGISTERS;
            const int64_t per_pass = (vectors + passes - 1) / passes;
            for (int64_t vector = 0; vector < vectors; vector += per_pass) {
              const int64_t n = std::min(per_pass, vectors - vector), begin = vector * lanes;
              const int64_t count = std::min(n * lanes, width - begin), shift = std::max<int64_t>(lanes - count, 0);
              sum_upto<REGISTERS>(
                  n, edges, edges.rowptr[v], edges.rowptr[v + 1], own, at + begin - shift, count + shift, sums);
              to.write(v, from, sums + shift, std::min(count, places - at - begin), cursor);
            }
          }
        }
    }
    if (wrong) return WRONG_EDGES;
  }
  return OK;
}

// A convolution over its edges: out = relu(conv(in) + bias + add).
template <class T, class Index>
struct Convolution {
  int64_t batch, inputs, outputs, groups;
  Axis y, x;
  Edges<T, Index> edges;

  int64_t sources() const { return inputs / groups * y.kernel() * x.kernel(); }
  bool valid() const { return edges.pointers_valid(outputs) && edges.sources_within(0, outputs, 0, sources()); }

  int forward(int64_t threads, const T *in, const Finish<T> &finish, T *out) const {
    if (!edges.pointers_valid(outputs)) return WRONG_EDGES;
    if (!batch) return valid() ? OK : WRONG_EDGES;
    Planes<T> from(y, x, batch, inputs, groups, edges.count, in);
    return convolution(threads, groups, edges, from, Written<T>{{y.output, 1, {0}}, {x.output, 1, {0}}, outputs, finish, out});
  }
};

// Σ w x over the edges of a target, in registers that are filled number by number.
template <class T, class Index>
T product_of_row(const Edges<T, Index> &edges, int64_t target, const T *x) {
  using S = Simd<T>;
  const Index *columns = edges.columns;
  const T *values = edges.values;
  int64_t e = edges.rowptr[target];
  const int64_t end = edges.rowptr[target + 1];
  T sum = 0, other = 0;
  if (e + S::lanes <= end) {
    typename S::Vector sums{};
    for (; e + S::lanes <= end; e += S::lanes) {
      typename S::Vector sources;
#pragma GCC unroll 16
      for (int64_t i = 0; i < S::lanes; ++i) sources[i] = x[columns[e + i]];
      sums += S::load(values + e) * sources;
    }
    for (int64_t i = 0; i < S::lanes; i += 2) {
      sum += sums[i];
      other += sums[i + 1];
    }
  }
  for (; e + 2 <= end; e += 2) {
    sum += values[e] * x[columns[e]];
    other += values[e + 1] * x[columns[e + 1]];
  }
  return e < end ? sum + other + values[e] * x[columns[e]] : sum + other;
}

// y = relu(x Aᵀ + bias), images in rows.
template <class T, class Index>
int sparse_linear(
    int64_t threads, int64_t batch, int64_t inputs, int64_t outputs, const T *x, const Edges<T, Index> &edges,
    const Finish<T> &finish, T *out) {
  using S = Simd<T>;
  constexpr int64_t lanes = S::lanes;
  if (!edges.pointers_valid(outputs)) return WRONG_EDGES;
  if (!batch) return edges.sources_within(0, outputs, 0, inputs) ? OK : WRONG_EDGES;
  if (batch == 1) {
    // Checked in one pass, not row by row: most rows are short.
    if (!edges.sources_within(0, outputs, 0, inputs)) return WRONG_EDGES;
#pragma omp parallel for schedule(static) num_threads(team(threads, double(edges.count)))
    for (int64_t v = 0; v < outputs; ++v) {
      const T sum = product_of_row(edges, v, x);
      finish.write(&sum, 1, v, v, out);
    }
    return OK;
  }
  std::atomic<bool> wrong{false};
  // Images side by side, as many as have all their inputs in cache.
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
