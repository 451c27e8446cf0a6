// The states of nodes as stored in inference, and the sums over edges of these states.

#pragma once

#include <array>
#include <cmath>
#include <cstdint>
#include <utility>

#if defined(__SSSE3__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#include "sparse.h"

namespace {

template <class T>
T relu(T value) {
  return value < 0 ? 0 : value;  // NaN stays NaN.
}

// A register of integers as wide as T, for masks.
template <class T>
using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;

template <class Weight>
struct Edge {
  int32_t source;
  Weight weight;
};

// Every storage format of states defines: the numbers of node functions, of which `together` registers are stored as
// one; the weights of edges; and sums, `terms` of which come from one stored register. The sum of a target is `factor`
// times the result of `numbers`. `MOST` registers of numbers are summed at a time: with a weight and the loaded states,
// all registers of AVX2.

// Unrounded.
template <class T>
struct Exact {
  using Number = T;
  using Stored = T;
  using Weight = T;
  using Vector = typename Simd<T>::Vector;
  using Sum = Vector;
  static constexpr int together = 1, terms = 1, MOST = 14;

  static void load(const T *from, Sum *to) { *to = Simd<T>::load(from); }
  static void store(T *to, const Vector *from) { Simd<T>::store(to, *from); }
  static void add(T weight, Sum value, Sum *sum) { *sum += weight * value; }
  static void numbers(const Sum *sum, Vector *to) { *to = *sum; }
};

// Rounded to bfloat16, sums in float32. Two registers are stored in one: the first in the lower halves of its lanes,
// the second in the upper halves.
struct Rounded {
  using Number = float;
  using Stored = uint16_t;
  using Weight = float;
  using Vector = Simd<float>::Vector;
  using Sum = Vector;
  using Words = Simd<uint32_t>;
  static constexpr int together = 2, terms = 2, MOST = 14;

  static void load(const uint16_t *from, Sum *to) {
    const Words::Vector both = Words::load(reinterpret_cast<const uint32_t *>(from));
    to[0] = Vector(both << 16);
    to[1] = Vector(both & 0xffff0000u);
  }
  static void store(uint16_t *to, const Vector *from) {
    Words::store(reinterpret_cast<uint32_t *>(to), rounded(from[0]) >> 16 | (rounded(from[1]) & 0xffff0000u));
  }
  static void add(float weight, Sum value, Sum *sum) { *sum += weight * value; }
  static void numbers(const Sum *sum, Vector *to) {
    to[0] = sum[0];
    to[1] = sum[1];
  }
  // To the nearest, ties to even, in the upper half; NaN stays NaN.
  static Words::Vector rounded(Vector value) {
    const Words::Vector bits = Words::Vector(value);
    return value == value ? bits + 0x7fffu + (bits >> 16 & 1u) : Words::Vector{} + 0x7fc00000u;
  }
};

// Rounded to integers from -127 to 127, in the unit of the node, by which its kernel has been divided. Weights and sums
// are 16-bit integers with a factor for each target, chosen so that no sum can overflow, whatever the states are. Four
// registers are stored in one, byte n of each lane from register n, with 1 and 2 exchanged.
struct Bytes {
  using Number = float;
  using Stored = int8_t;
  using Weight = int32_t;  // The same 16 bits twice, as needed for multiplication.
  using Vector = Simd<float>::Vector;
  using Sum = Simd<int16_t>::Vector;
  using Words = Simd<int32_t>::Vector;
  static constexpr int together = 4, terms = 2, MOST = 24;

  // Each value times 256.
  static void load(const int8_t *from, Sum *to) {
    const Sum both = Simd<int16_t>::load(reinterpret_cast<const int16_t *>(from));
    to[0] = both << 8;
    to[1] = both & int16_t(0xff00);
  }
  static void store(int8_t *to, const Vector *from) {
    const Words word = byte(from[0]) | byte(from[2]) << 8 | byte(from[1]) << 16 | byte(from[3]) << 24;
    Simd<int32_t>::store(reinterpret_cast<int32_t *>(to), word);
  }
  static void add(int32_t weight, Sum value, Sum *sum) { *sum += product(Sum(Words{} + weight), value); }
  static void numbers(const Sum *sum, Vector *to) {
    for (int i = 0; i < 2; ++i) {
      const Words words = Words(sum[i]);
      to[2 * i] = __builtin_convertvector(words << 16 >> 16, Vector);
      to[2 * i + 1] = __builtin_convertvector(words >> 16, Vector);
    }
  }

  static constexpr int64_t LARGEST = 32767;
  // Weights in a unit such that Σ |127 · weight / 128| and half for each of two roundings stay below the largest sum.
  // Returns the factor.
  static float pack(const Edge<float> *from, const Edge<float> *end, Edge<int32_t> *to) {
    float total = 0;
    for (const Edge<float> *edge = from; edge < end; ++edge) total += std::fabs(edge->weight);
    const float unit = total > 0 ? total / (LARGEST - (end - from)) : 1;
    for (; from < end; ++from, ++to) {
      const int32_t weight = std::lrint(from->weight / unit);
      *to = {from->source, int32_t(uint32_t(weight) << 16 | (uint32_t(weight) & 0xffffu))};
    }
    return 128 * unit;
  }

 private:
  // The lowest 8 bits of the nearest integer, 127 for NaN: those of a number near 3 · 2²², whose last place is 1.
  static Words byte(Vector value) {
    const Vector most = Vector{} + 127, least = Vector{} - 127;
#if defined(__AVX512F__)
    value = Vector(_mm512_max_ps(_mm512_min_ps(__m512(value), __m512(most)), __m512(least)));
#else
    value = value < most ? value : most;
    value = value > least ? value : least;
#endif
    return Words(value + 12582912.0f) & 0xff;
  }
  // a b / 2¹⁵, rounded.
  static Sum product(Sum a, Sum b) {
#if defined(__AVX512BW__)
    return Sum(_mm512_mulhrs_epi16(__m512i(a), __m512i(b)));
#elif defined(__AVX2__) && !defined(__AVX512F__)
    return Sum(_mm256_mulhrs_epi16(__m256i(a), __m256i(b)));
#elif defined(__SSSE3__) && !defined(__AVX__)
    return Sum(_mm_mulhrs_epi16(__m128i(a), __m128i(b)));
#elif defined(__ARM_NEON)
    return Sum(vqrdmulhq_s16(int16x8_t(a), int16x8_t(b)));
#else
    Sum result;
    for (int i = 0; i < Simd<int16_t>::lanes; ++i) result[i] = (int32_t(a[i]) * b[i] + (1 << 14)) >> 15;
    return result;
#endif
  }
};

template <class T>
typename Simd<T>::Vector masked_relu(typename Simd<T>::Vector value, const Bits<T> *mask) {
  using Words = Simd<Bits<T>>;
  value = value < 0 ? typename Simd<T>::Vector{} : value;
  return typename Simd<T>::Vector(typename Words::Vector(value) & Words::load(mask));
}

// factor · Σ w z + shift over the edges, for N registers of numbers from the sources' states, which are N registers
// apart, starting at `tile`; with a mask, its relu, and zero outside the mask. With few registers, several edges are
// interleaved, so that none waits.
template <int N, class State>
__attribute__((noinline)) void sum_tile(
    const Edge<typename State::Weight> *edge, const Edge<typename State::Weight> *end,
    const typename State::Stored *tile, typename State::Number factor, typename State::Number shift,
    const Bits<typename State::Number> *mask, typename State::Number *out) {
  using S = Simd<typename State::Number>;
  using Vector = typename S::Vector;
  constexpr int together = State::together, terms = State::terms, sums = N / together * terms;
  constexpr int turns = sums > 4 ? 1 : sums > 2 ? 2 : 4;
  typename State::Sum sum[turns][sums] = {};
  const auto add = [&](const Edge<typename State::Weight> &from, typename State::Sum *to) __attribute__((always_inline)) {
    const typename State::Stored *row = tile + from.source * int64_t(N * S::lanes);
#pragma GCC unroll 14
    for (int n = 0; n < N / together; ++n) {
      typename State::Sum values[terms];
      State::load(row + n * together * S::lanes, values);
#pragma GCC unroll 2
      for (int i = 0; i < terms; ++i) State::add(from.weight, values[i], &to[n * terms + i]);
    }
  };
  for (; edge + turns <= end; edge += turns)
#pragma GCC unroll 4
    for (int turn = 0; turn < turns; ++turn) add(edge[turn], sum[turn]);
  for (; edge < end; ++edge) add(*edge, sum[0]);
#pragma GCC unroll 14
  for (int n = 0; n < N / together; ++n) {
#pragma GCC unroll 4
    for (int turn = 1; turn < turns; ++turn)
#pragma GCC unroll 2
      for (int i = 0; i < terms; ++i) sum[0][n * terms + i] += sum[turn][n * terms + i];
    Vector values[together];
    State::numbers(&sum[0][n * terms], values);
#pragma GCC unroll 4
    for (int i = 0; i < together; ++i) {
      const int64_t at = (n * together + i) * S::lanes;
      const Vector value = factor * values[i] + shift;
      S::store(out + at, mask ? masked_relu<typename State::Number>(value, mask + at) : value);
    }
  }
}

template <class State>
using SumTile = decltype(&sum_tile<State::together, State>);

template <class State, int... N>
constexpr std::array<SumTile<State>, sizeof...(N)> sum_tiles(std::integer_sequence<int, N...>) {
  return {&sum_tile<(N + 1) * State::together, State>...};
}

// The function for tiles of a number of registers, a multiple of `together`.
template <class State>
SumTile<State> sum_tile_of(int64_t registers) {
  static constexpr auto tiles = sum_tiles<State>(std::make_integer_sequence<int, State::MOST / State::together>());
  return tiles[registers / State::together - 1];
}

}  // namespace
