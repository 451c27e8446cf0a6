// A dense linear layer at the end of a network.

#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "sparse.h"

namespace {

template <class T>
struct Classifier {
  int64_t inputs = 0, outputs = 0;
  std::vector<T> weight, bias;

  Classifier() = default;
  Classifier(int64_t inputs, int64_t outputs, const T *from, const T *shift) : inputs(inputs), outputs(outputs) {
    weight.assign(from, from + inputs * outputs);
    if (shift) bias.assign(shift, shift + outputs);
  }

  explicit operator bool() const { return outputs > 0; }

  void run(int64_t threads, int64_t batch, const T *x, T *out) const {
#pragma omp parallel for schedule(static) num_threads(team(threads, double(batch) * inputs * outputs))
    for (int64_t o = 0; o < outputs; o += 4) {
      int64_t n = 0;
      for (; n + 3 <= batch; n += 3) piece<3>(o, n, x, out);
      for (; n < batch; ++n) piece<1>(o, n, x, out);
    }
  }

 private:
  // Four outputs of N images.
  template <int N>
  void piece(int64_t o, int64_t n, const T *x, T *out) const {
    using S = Simd<T>;
    constexpr int together = 4;
    const int64_t count = std::min<int64_t>(together, outputs - o);
    const T *rows[together];
    for (int64_t i = 0; i < together; ++i) rows[i] = &weight[(o + std::min(i, count - 1)) * inputs];
    x += n * inputs;
    typename S::Vector sum[together][N] = {};
    int64_t f = 0;
    for (; f + S::lanes <= inputs; f += S::lanes) {
      typename S::Vector values[N];
      for (int j = 0; j < N; ++j) values[j] = S::load(x + j * inputs + f);
#pragma GCC unroll 4
      for (int i = 0; i < together; ++i) {
        const typename S::Vector row = S::load(rows[i] + f);
#pragma GCC unroll 3
        for (int j = 0; j < N; ++j) sum[i][j] += row * values[j];
      }
    }
    for (int64_t i = 0; i < count; ++i)
      for (int j = 0; j < N; ++j) {
        T total = bias.empty() ? T(0) : bias[o + i];
        for (int64_t lane = 0; lane < S::lanes; ++lane) total += sum[i][j][lane];
        for (int64_t rest = f; rest < inputs; ++rest) total += rows[i][rest] * x[j * inputs + rest];
        out[(n + j) * outputs + o + i] = total;
      }
  }
};

}  // namespace
