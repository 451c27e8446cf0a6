// States of nodes as inference keeps them: as they are, or rounded to bfloat16. Sums are formed in full precision.

#pragma once

#include <array>
#include <cstdint>
#include <utility>

#include "sparse.h"

namespace {

template <class T>
T relu(T value) {
  return value < 0 ? 0 : value;  // NaN stays NaN.
}

// A register of integers as wide as T, for masks.
template <class T>
using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;

template <class T>
struct Exact {
  using Number = T;
  using Stored = T;
  using Vector = typename Simd<T>::Vector;
  static constexpr int together = 1;  // Registers that are loaded and stored together, from together · lanes numbers.

  static void load(const T *from, Vector *to) { *to = Simd<T>::load(from); }
  static void store(T *to, const Vector *from) { Simd<T>::store(to, *from); }
};

// Two registers lie in one: the first in the lower halves of its lanes, the second in the upper ones.
struct Rounded {
  using Number = float;
  using Stored = uint16_t;
  using Vector = Simd<float>::Vector;
  using Words = Simd<uint32_t>;
  static constexpr int together = 2;

  static void load(const uint16_t *from, Vector *to) {
    const Words::Vector both = Words::load(reinterpret_cast<const uint32_t *>(from));
    to[0] = Vector(both << 16);
    to[1] = Vector(both & 0xffff0000u);
  }
  static void store(uint16_t *to, const Vector *from) {
    Words::store(reinterpret_cast<uint32_t *>(to), rounded(from[0]) >> 16 | (rounded(from[1]) & 0xffff0000u));
  }
  // To the nearest, ties to even, in the upper half; NaN stays NaN.
  static Words::Vector rounded(Vector value) {
    const Words::Vector bits = Words::Vector(value);
    return value == value ? bits + 0x7fffu + (bits >> 16 & 1u) : Words::Vector{} + 0x7fc00000u;
  }
};

template <class T>
struct Edge {
  int32_t source;
  T weight;
};

template <class T>
typename Simd<T>::Vector masked_relu(typename Simd<T>::Vector value, const Bits<T> *mask) {
  using Words = Simd<Bits<T>>;
  value = value < 0 ? typename Simd<T>::Vector{} : value;
  return typename Simd<T>::Vector(typename Words::Vector(value) & Words::load(mask));
}

constexpr int MOST = 14;  // Registers of a tile: with a weight and what is loaded, as many as AVX2 has.

// shift + Σ w z over the edges, for N registers of the sources' states, which lie N registers apart from `tile` on;
// with a mask relu of that, and zero outside it. With few registers several edges take turns, so that none waits.
template <int N, class State>
__attribute__((noinline)) void sum_tile(
    const Edge<typename State::Number> *edge, const Edge<typename State::Number> *end,
    const typename State::Stored *tile, typename State::Number shift, const Bits<typename State::Number> *mask,
    typename State::Number *out) {
  using S = Simd<typename State::Number>;
  using Vector = typename S::Vector;
  constexpr int turns = N > 4 ? 1 : N > 2 ? 2 : 4, together = State::together;
  Vector sum[turns][N] = {};
  const auto add = [&](const Edge<typename State::Number> &from, Vector *to) __attribute__((always_inline)) {
    const typename State::Stored *row = tile + from.source * int64_t(N * S::lanes);
#pragma GCC unroll 14
    for (int n = 0; n < N; n += together) {
      Vector values[together];
      State::load(row + n * S::lanes, values);
#pragma GCC unroll 2
      for (int i = 0; i < together; ++i) to[n + i] += from.weight * values[i];
    }
  };
  for (; edge + turns <= end; edge += turns)
#pragma GCC unroll 4
    for (int turn = 0; turn < turns; ++turn) add(edge[turn], sum[turn]);
  for (; edge < end; ++edge) add(*edge, sum[0]);
#pragma GCC unroll 14
  for (int n = 0; n < N; ++n) {
    Vector value = sum[0][n] + shift;
#pragma GCC unroll 4
    for (int turn = 1; turn < turns; ++turn) value += sum[turn][n];
    S::store(out + n * S::lanes, mask ? masked_relu<typename State::Number>(value, mask + n * S::lanes) : value);
  }
}

template <class State>
using SumTile = decltype(&sum_tile<2, State>);

template <class State, int... N>
constexpr std::array<SumTile<State>, sizeof...(N)> sum_tiles(std::integer_sequence<int, N...>) {
  return {&sum_tile<(N / State::together + 1) * State::together, State>...};
}

// The function for tiles of so many registers, a multiple of `together`.
template <class State>
SumTile<State> sum_tile_of(int64_t registers) {
  static constexpr auto tiles = sum_tiles<State>(std::make_integer_sequence<int, MOST>());
  return tiles[registers - 1];
}

}  // namespace
