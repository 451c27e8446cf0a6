// Exchanges the first and last dimensions of a tensor: [first, middle, last] to [last, middle, first].

#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "sparse.h"

namespace {

// Interleaves the lower or upper halves of two registers: a0 b0 a1 b1 ….
template <bool upper, class Vector, size_t... i>
Vector zipped(Vector a, Vector b, std::index_sequence<i...>) {
  constexpr size_t n = sizeof...(i), start = upper ? n / 2 : 0;
#if defined(__clang__)
  return __builtin_shufflevector(a, b, (start + i / 2 + i % 2 * n)...);
#else
  using Whole = std::conditional_t<sizeof(Vector) / n == 4, int32_t, int64_t>;
  typedef Whole Mask __attribute__((vector_size(sizeof(Vector))));
  return __builtin_shuffle(a, b, Mask{Whole(start + i / 2 + i % 2 * n)...});
#endif
}

// Transposes a square with the side of a register: `finish` gets each column with its number.
template <class T, class Finish>
void transposed_square(const T *from, int64_t pitch, Finish finish) {
  using S = Simd<T>;
  constexpr std::make_index_sequence<S::lanes> all{};
  typename S::Vector rows[2][S::lanes];
#pragma GCC unroll 16
  for (int64_t i = 0; i < S::lanes; ++i) rows[0][i] = S::load(from + i * pitch);
  int now = 0;
#pragma GCC unroll 4
  for (int64_t done = 1; done < S::lanes; done *= 2, now ^= 1)
#pragma GCC unroll 8
    for (int64_t i = 0; i < S::lanes / 2; ++i) {
      rows[now ^ 1][2 * i] = zipped<false>(rows[now][i], rows[now][i + S::lanes / 2], all);
      rows[now ^ 1][2 * i + 1] = zipped<true>(rows[now][i], rows[now][i + S::lanes / 2], all);
    }
#pragma GCC unroll 16
  for (int64_t i = 0; i < S::lanes; ++i) finish(i, rows[now][i]);
}

template <class T>
int exchanged(int64_t threads, int64_t first, int64_t middle, int64_t last, const T *from, T *to) {
  // Squares as wide as a cache line, so that each line is read and written once.
  constexpr int64_t side = 64 / sizeof(T);
  if (!first || !middle || !last) return OK;
  const int64_t strips = (last + side - 1) / side;
#pragma omp parallel for collapse(2) schedule(static) num_threads(team(threads, double(first) * middle * last))
  for (int64_t strip = 0; strip < strips; ++strip)
    for (int64_t m = 0; m < middle; ++m) {
      const int64_t l0 = strip * side, l1 = std::min(l0 + side, last);
      for (int64_t f0 = 0; f0 < first; f0 += side) {
        const int64_t f1 = std::min(f0 + side, first);
        if (f1 - f0 == side && l1 - l0 == side) {
          T square[side][side];
          for (int64_t f = 0; f < side; ++f)
            std::copy_n(from + ((f0 + f) * middle + m) * last + l0, side, square[f]);
          for (int64_t l = 0; l < side; ++l) {
            T line[side];
            for (int64_t f = 0; f < side; ++f) line[f] = square[f][l];
            std::copy_n(line, side, to + ((l0 + l) * middle + m) * first + f0);
          }
          continue;
        }
        for (int64_t l = l0; l < l1; ++l)
          for (int64_t f = f0; f < f1; ++f) to[(l * middle + m) * first + f] = from[(f * middle + m) * last + l];
      }
    }
  return OK;
}

}  // namespace
