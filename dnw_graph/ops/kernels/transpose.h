// The first and the last dimension of a tensor exchanged: [first, middle, last] to [last, middle, first].

#pragma once

#include <algorithm>
#include <cstdint>

#include "sparse.h"

namespace {

template <class T>
int exchanged(int64_t threads, int64_t first, int64_t middle, int64_t last, const T *from, T *to) {
  // Squares of one cache line's width, so that each line is read and written once.
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
