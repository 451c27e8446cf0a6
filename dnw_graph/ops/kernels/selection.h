// The numbers of largest magnitude, among those that reach a guess.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <new>

#include "sparse.h"

namespace {

// The bits of |w| as an integer: they have the order of |w|, and what is not finite comes last.
template <class T>
struct Magnitude;
template <>
struct Magnitude<float> {
  using Bits = uint32_t;
  static constexpr Bits infinity = Bits(0xff) << 23;
};
template <>
struct Magnitude<double> {
  using Bits = uint64_t;
  static constexpr Bits infinity = Bits(0x7ff) << 52;
};

template <class T>
typename Magnitude<T>::Bits magnitude(T weight) {
  typename Magnitude<T>::Bits bits;
  std::memcpy(&bits, &weight, sizeof bits);
  return bits & (~decltype(bits)(0) >> 1);
}

// Writes the places, ascending, of the k largest |w|, ties to the lower place, if as many reach the guess. `found` gets
// how many reach it and, if something was written, the magnitude of the k-th and how many are not finite.
template <class T>
int largest(int64_t threads, int64_t count, int64_t k, int64_t guess, const T *weight, int64_t *out, int64_t *found) {
  using Bits = typename Magnitude<T>::Bits;
  constexpr int64_t part = 1 << 14, word = sizeof(uint64_t);
  const int64_t parts = (count + part - 1) / part;
  std::unique_ptr<uint8_t[]> reaches(new (std::nothrow) uint8_t[parts * part]);
  std::unique_ptr<int64_t[]> starts(new (std::nothrow) int64_t[parts + 1]());
  if (!reaches || !starts) return NO_MEMORY;
#pragma omp parallel for num_threads(team(threads, count))
  for (int64_t n = 0; n < parts; ++n) {
    const int64_t from = n * part, size = std::min(part, count - from);
    uint8_t *const reach = reaches.get() + from;
    int32_t reaching = 0;
    for (int64_t i = 0; i < size; ++i) {
      const Bits bits = magnitude(weight[from + i]);
      reach[i] = bits >= Bits(guess);
      reaching += bits >= Bits(guess);
    }
    std::fill(reach + size, reach + part, 0);
    starts[n + 1] = reaching;
  }
  for (int64_t n = 0; n < parts; ++n) starts[n + 1] += starts[n];
  const int64_t size = starts[parts];
  found[0] = size;
  if (size < k) return OK;
  std::unique_ptr<int64_t[]> places(new (std::nothrow) int64_t[size]);
  std::unique_ptr<Bits[]> ranked(new (std::nothrow) Bits[size]);
  if (!places || !ranked) return NO_MEMORY;
#pragma omp parallel for num_threads(team(threads, count))
  for (int64_t n = 0; n < parts; ++n) {
    int64_t next = starts[n];
    for (int64_t from = n * part; from < (n + 1) * part; from += word) {
      uint64_t ones;  // Eight bytes of 0 or 1, the first one lowest: few of them are 1.
      std::memcpy(&ones, reaches.get() + from, word);
      for (; ones; ones &= ones - 1) {
        const int64_t i = from + __builtin_ctzll(ones) / 8;
        places[next] = i;
        ranked[next++] = magnitude(weight[i]);
      }
    }
  }
  std::nth_element(ranked.get(), ranked.get() + k - 1, ranked.get() + size, std::greater<Bits>());
  const Bits least = ranked[k - 1];
  int64_t ties = std::count(ranked.get(), ranked.get() + k, least);  // All that is larger lies before the k-th.
  for (int64_t i = 0; i < size; ++i) {
    const Bits bits = magnitude(weight[places[i]]);
    if (bits > least || (bits == least && ties-- > 0)) *out++ = places[i];
  }
  found[1] = int64_t(least);
  found[2] = std::count_if(ranked.get(), ranked.get() + size, [](Bits bits) { return bits >= Magnitude<T>::infinity; });
  return OK;
}

}  // namespace
