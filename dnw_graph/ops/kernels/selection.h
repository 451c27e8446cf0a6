// Selects the numbers of largest magnitude, given two guesses around the smallest of them.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <new>

#include "sparse.h"

namespace {

// The bits of |w| as an integer: they have the order of |w|, and values that are not finite come last.
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

// Converts eight bytes of 0 or 1 to the indices of the ones, without a branch for each.
struct Ones {
  typedef uint16_t Places __attribute__((vector_size(16)));
  static constexpr int64_t bytes = 8;
  Places places[1 << bytes] = {};

  Ones() {
    for (int mask = 0; mask < 1 << bytes; ++mask)
      for (int i = 0, n = 0; i < bytes; ++i)
        if (mask >> i & 1) places[mask][n++] = i;
  }
  // Returns the end of the valid indices; up to eight entries starting at `to` are overwritten.
  uint16_t *write(uint64_t ones, int64_t from, uint16_t *to) const {
    const uint64_t mask = ones * 0x0102040810204080 >> 56;
    const Places found = places[mask] + uint16_t(from);
    std::memcpy(to, &found, sizeof found);
    return to + __builtin_popcountll(ones);
  }
};

// Per part: how many values reach the upper guess, how many lie between the guesses, and how many indices are written.
struct Counts {
  int64_t sure, band, out;
};

// Writes the indices, ascending, of the k largest |w|, ties to the lower index, if `low` and `high` are good guesses of
// the k-th magnitude: fewer than k values reach `high`, which are chosen without ranking, and at least k reach `low`.
// `found` receives how many reach `low` and `high`, how many are not finite, and the k-th magnitude.
template <class T>
int largest(
    int64_t threads, int64_t count, int64_t k, int64_t low, int64_t high, const T *weight, int64_t *out, int64_t *found) {
  using Bits = typename Magnitude<T>::Bits;
  using Place = uint16_t;  // Within a part.
  constexpr int64_t part = 1 << 14, room = part + Ones::bytes;
  constexpr uint64_t lowest_bits = 0x0101010101010101;
  static const Ones table;
  const int64_t parts = (count + part - 1) / part;
  const int workers = team(threads, count);
  const std::unique_ptr<Place[]> sure(new (std::nothrow) Place[parts * room]);
  const std::unique_ptr<Place[]> band(new (std::nothrow) Place[parts * room]);
  const std::unique_ptr<Counts[]> counts(new (std::nothrow) Counts[parts]);
  if (!sure || !band || !counts) return NO_MEMORY;
  int64_t not_finite = 0;
#pragma omp parallel for num_threads(workers) reduction(+ : not_finite)
  for (int64_t n = 0; n < parts; ++n) {
    const int64_t from = n * part, size = std::min(part, count - from);
    uint8_t reach[part];
    int32_t bad = 0;
    for (int64_t i = 0; i < size; ++i) {
      const Bits bits = magnitude(weight[from + i]);
      reach[i] = uint8_t(bits >= Bits(low)) + uint8_t(bits >= Bits(high));
      bad += bits >= Magnitude<T>::infinity;
    }
    std::fill(reach + size, reach + round_up(size, Ones::bytes), 0);
    Place *const begin_sure = sure.get() + n * room, *const begin_band = band.get() + n * room;
    Place *end_sure = begin_sure, *end_band = begin_band;
    for (int64_t i = 0; i < size; i += Ones::bytes) {
      uint64_t bytes;  // The first one lowest: 0, 1 in the band, 2 above it.
      std::memcpy(&bytes, reach + i, sizeof bytes);
      end_sure = table.write(bytes >> 1 & lowest_bits, i, end_sure);
      end_band = table.write(bytes & lowest_bits, i, end_band);
    }
    counts[n] = {end_sure - begin_sure, end_band - begin_band, 0};
    not_finite += bad;
  }
  int64_t surely = 0, between = 0;
  for (int64_t n = 0; n < parts; ++n) surely += counts[n].sure, between += counts[n].band;
  found[0] = surely + between;
  found[1] = surely;
  found[2] = not_finite;
  if (surely >= k || surely + between < k) return OK;
  // Read once: weights that another thread changes must not make more than k pass.
  const std::unique_ptr<Bits[]> read(new (std::nothrow) Bits[between]), ranked(new (std::nothrow) Bits[between]);
  if (!read || !ranked) return NO_MEMORY;
  Bits *next = read.get();
  for (int64_t n = 0; n < parts; ++n)
    for (int64_t i = 0; i < counts[n].band; ++i) *next++ = magnitude(weight[n * part + band[n * room + i]]);
  std::copy_n(read.get(), between, ranked.get());
  Bits *const last = ranked.get() + k - surely - 1;
  std::nth_element(ranked.get(), last, ranked.get() + between, std::greater<Bits>());
  const Bits least = *last;
  found[3] = int64_t(least);
  int64_t ties = std::count(ranked.get(), last + 1, least);  // All larger values come before the last.
  int64_t start = 0;
  const Bits *in_band = read.get();
  for (int64_t n = 0; n < parts; ++n) {
    Place *const places = band.get() + n * room;
    int64_t kept = 0;
    for (int64_t i = 0; i < counts[n].band; ++i) {
      const Bits bits = *in_band++;
      places[kept] = places[i];
      kept += bits > least || (bits == least && ties-- > 0);
    }
    counts[n].band = kept;
    counts[n].out = start;
    start += counts[n].sure + kept;
  }
#pragma omp parallel for num_threads(workers)
  for (int64_t n = 0; n < parts; ++n) {
    const Place *const s = sure.get() + n * room, *const b = band.get() + n * room;
    int64_t *const begin = out + counts[n].out;
    int64_t *const end = std::merge(s, s + counts[n].sure, b, b + counts[n].band, begin);
    for (int64_t *place = begin; place < end; ++place) *place += n * part;
  }
  return OK;
}

}  // namespace
