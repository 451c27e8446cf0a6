// The first convolution of a network, 3×3 with a padding of 1, row by row: a register holds adjacent pixels of a row.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#include "sparse.h"

namespace {

// The even and odd values of two registers.
template <class V, int... I>
void take_apart(V a, V b, V *even, V *odd, std::integer_sequence<int, I...>) {
#if defined(__clang__)
  *even = __builtin_shufflevector(a, b, (2 * I)...);
  *odd = __builtin_shufflevector(a, b, (2 * I + 1)...);
#else
  using Whole = std::conditional_t<sizeof(V) / sizeof...(I) == 4, int32_t, int64_t>;
  typedef Whole Mask __attribute__((vector_size(sizeof(V))));
  *even = __builtin_shuffle(a, b, Mask{Whole(2 * I)...});
  *odd = __builtin_shuffle(a, b, Mask{Whole(2 * I + 1)...});
#endif
}

template <class T>
struct Stem {
  static constexpr int64_t CHANNELS = 4;  // That are computed together.
  int64_t inputs = 0, outputs = 0, stride = 1;
  std::vector<T> weight;  // By CHANNELS outputs, then input, row and column, then output.
  std::vector<T> bias;

  Stem() = default;
  Stem(int64_t inputs, int64_t outputs, int64_t stride, const T *from, const T *shift)
      : inputs(inputs), outputs(outputs), stride(stride) {
    const int64_t whole = round_up(outputs, CHANNELS), taps = 9 * inputs;
    weight.resize(whole * taps);
    bias.resize(whole);
    for (int64_t v = 0; v < outputs; ++v) {
      bias[v] = shift ? shift[v] : T(0);
      for (int64_t tap = 0; tap < taps; ++tap)
        weight[(v / CHANNELS * taps + tap) * CHANNELS + v % CHANNELS] = from[v * taps + tap];
    }
  }

  explicit operator bool() const { return outputs > 0; }
  int64_t output(int64_t side) const { return (side - 1) / stride + 1; }
  // A line holds the columns of a row with one parity, with room around them.
  static int64_t line(int64_t width) { return round_up(width, Simd<T>::lanes) + 4 * Simd<T>::lanes; }
  int64_t bytes(int64_t width) const { return (8 * inputs + 1) * line(width) * sizeof(T) + 9 * inputs * sizeof(T *); }
};

// The output rows of a stem for an image, in ascending order.
template <class T>
class StemRows {
  using S = Simd<T>;
  using Vector = typename S::Vector;

 public:
  StemRows(const Stem<T> &stem, const T *image, int64_t height, int64_t width, T *lines)
      : stem(stem), image(image), height(height), width(width), line(Stem<T>::line(width)), lines(lines) {
    std::fill_n(lines, (8 * stem.inputs + 1) * line, T(0));
    taps = reinterpret_cast<const T **>(lines + (8 * stem.inputs + 1) * line);
  }

  // Row y of the channels from … to - 1; `from` is a multiple of CHANNELS.
  template <class To>
  void compute(int64_t y, int64_t from, int64_t to, To row_of) {
    for (next = std::max(next, y * stem.stride - 1); next <= y * stem.stride + 1; ++next) fetch(next);
    for (int64_t c = 0; c < stem.inputs; ++c)
      for (int64_t ky = 0; ky < 3; ++ky)
        for (int64_t kx = 0; kx < 3; ++kx) {
          const int64_t row = y * stem.stride + ky - 1;
          const T *even = row < 0 || row >= height ? zeros() : line_of(c, row, 0);
          const T *odd = row < 0 || row >= height ? zeros() : line_of(c, row, 1);
          const T *found = stem.stride == 1 ? even + kx - 1 : kx == 1 ? even : odd + kx / 2 - 1;
          taps[(c * 3 + ky) * 3 + kx] = found;
        }
    const int64_t count = stem.output(width);
    for (int64_t v = from; v < to; v += CHANNELS) {
      T *rows[CHANNELS];
      for (int64_t n = 0; n < CHANNELS; ++n) rows[n] = v + n < to ? row_of(v + n) : nullptr;
      int64_t x = 0;
      for (; x + S::lanes < count; x += 2 * S::lanes) places<2>(v, x, count, rows);
      if (x < count) places<1>(v, x, count, rows);
    }
  }

 private:
  static constexpr int64_t CHANNELS = Stem<T>::CHANNELS;
  const Stem<T> &stem;
  const T *image;
  const int64_t height, width, line;
  T *lines;
  int64_t next = -1;  // Next row of the image to fetch.
  const T **taps;  // Addresses for the kernel's positions, at x = 0.

  const T *zeros() const { return lines + 8 * stem.inputs * line + S::lanes; }
  T *line_of(int64_t c, int64_t row, int64_t part) const {
    return lines + ((c * 4 + row % 4) * 2 + part) * line + S::lanes;
  }

  // A row of the image; with a stride of 2, split into even and odd columns.
  void fetch(int64_t row) {
    if (row < 0 || row >= height) return;
    for (int64_t c = 0; c < stem.inputs; ++c) {
      const T *from = image + (c * height + row) * width;
      T *even = line_of(c, row, 0), *odd = line_of(c, row, 1);
      if (stem.stride == 1) {
        std::memcpy(even, from, width * sizeof(T));
        continue;
      }
      int64_t x = 0;
      for (; x + 2 * S::lanes <= width; x += 2 * S::lanes) {
        Vector e, o;
        take_apart(
            S::load(from + x), S::load(from + x + S::lanes), &e, &o, std::make_integer_sequence<int, S::lanes>());
        S::store(even + x / 2, e);
        S::store(odd + x / 2, o);
      }
      for (; x < width; ++x) (x % 2 ? odd : even)[x / 2] = from[x];
    }
  }

  // Not inlined, and every loop unrolled: all sums stay in registers.
  template <int N>
  __attribute__((noinline)) void places(int64_t v, int64_t x, int64_t count, T *const *rows) const {
    Vector sum[CHANNELS][N];
    const T *weight = &stem.weight[v * 9 * stem.inputs];
#pragma GCC unroll 4
    for (int64_t n = 0; n < CHANNELS; ++n)
#pragma GCC unroll 2
      for (int i = 0; i < N; ++i) sum[n][i] = Vector{} + stem.bias[v + n];
    const T **const end = taps + 9 * stem.inputs;
    for (const T **tap = taps; tap < end; ++tap, weight += CHANNELS) {
      Vector values[N];
#pragma GCC unroll 2
      for (int i = 0; i < N; ++i) values[i] = S::load(*tap + x + i * S::lanes);
#pragma GCC unroll 4
      for (int64_t n = 0; n < CHANNELS; ++n)
#pragma GCC unroll 2
        for (int i = 0; i < N; ++i) sum[n][i] += weight[n] * values[i];
    }
#pragma GCC unroll 4
    for (int64_t n = 0; n < CHANNELS; ++n)
#pragma GCC unroll 2
      for (int i = 0; i < N; ++i) {
        const int64_t at = x + i * S::lanes;
        const Vector value = sum[n][i];
        if (!rows[n]) continue;
        if (at + S::lanes <= count)
          S::store(rows[n] + at, value);
        else if (at < count)
          std::memcpy(rows[n] + at, &value, (count - at) * sizeof(T));
      }
  }
};

}  // namespace
