// Linear combinations of tensors of equal size, and the error norm for a solver's step control, each in a single pass.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "sparse.h"

namespace {

constexpr int64_t PIECE = 1024;  // Values that stay in the first-level cache while all terms are added.

// Work for each piece: its first value and its number of values.
template <class Work>
void each_piece(int64_t threads, int64_t count, Work work) {
#pragma omp parallel for schedule(static) num_threads(team(threads, double(count)))
  for (int64_t piece = 0; piece < (count + PIECE - 1) / PIECE; ++piece)
    work(piece, piece * PIECE, std::min(PIECE, count - piece * PIECE));
}

// The values of base + Σ c_n x_n starting at `first`; base is optional.
template <class T>
void combine_piece(
    int64_t first, int64_t size, const T *base, int64_t terms, const T *c, const T *const *x, T *__restrict out) {
  if (base)
    std::copy_n(base + first, size, out);
  else
    std::fill_n(out, size, T(0));
  for (int64_t n = 0; n < terms; ++n) {
    const T factor = c[n], *from = x[n] + first;
    if (factor == 0) continue;
    for (int64_t i = 0; i < size; ++i) out[i] += factor * from[i];
  }
}

template <class T>
int combination(
    int64_t threads, int64_t count, int64_t terms, const T *base, const T *c, const T *const *x, T *out) {
  each_piece(threads, count, [&](int64_t, int64_t first, int64_t size) {
    combine_piece(first, size, base, terms, c, x, out + first);
  });
  return OK;
}

// For every piece Σ (e / (atol + rtol max(|y|, |z|)))² with the error estimate e = Σ c_n x_n.
template <class T>
int error_squares(
    int64_t threads, int64_t count, int64_t terms, double rtol, double atol, const T *c, const T *const *x, const T *y,
    const T *z, double *squares) {
  each_piece(threads, count, [&](int64_t piece, int64_t first, int64_t size) {
    T error[PIECE];
    combine_piece<T>(first, size, nullptr, terms, c, x, error);
    double sum = 0;
    for (int64_t i = 0; i < size; ++i) {
      const T larger = std::max(std::abs(y[first + i]), std::abs(z[first + i]));
      error[i] /= T(atol) + T(rtol) * larger;
    }
    for (int64_t i = 0; i < size; ++i) sum += double(error[i]) * error[i];
    squares[piece] = sum;
  });
  return OK;
}

}  // namespace
