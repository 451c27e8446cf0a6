// Products with a sparse matrix in CSR. A Vector is one register of the target machine.

#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <memory>
#include <numeric>
#include <type_traits>
#include <vector>

#include <omp.h>

namespace {

#if defined(__AVX512F__)
constexpr int BYTES = 64, REGISTERS = 16;  // Accumulators of one target; as many registers remain.
#elif defined(__AVX__)
constexpr int BYTES = 32, REGISTERS = 8;
#else
constexpr int BYTES = 16, REGISTERS = 8;
#endif
constexpr int OK = 0, WRONG_EDGES = 1, NO_MEMORY = 2;  // Status codes of the entry points.
constexpr int64_t CACHE = 1 << 19;  // Bytes of source states that stay in a core's second-level cache.
constexpr int64_t COPIED = 8;       // Registers of each source that are copied before summation.

template <class T>
struct Simd {
  typedef T Vector __attribute__((vector_size(BYTES)));
  typedef T Unaligned __attribute__((vector_size(BYTES), aligned(alignof(T)), may_alias));
  static constexpr int64_t lanes = BYTES / sizeof(T);
  static Vector load(const T *from) { return *reinterpret_cast<const Unaligned *>(from); }
  static void store(T *to, Vector value) { *reinterpret_cast<Unaligned *>(to) = value; }
};

int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

template <class T, class Index>
struct Edges {  // CSR
  const Index *rowptr, *columns;
  const T *values;
  int64_t count;

  bool pointers_valid(int64_t targets) const {
    if (rowptr[0] != 0 || rowptr[targets] != count) return false;
    bool ascending = true;
    for (int64_t v = 0; v < targets; ++v) ascending &= rowptr[v] <= rowptr[v + 1];
    return ascending;
  }

  // Whether all sources of the targets from … to - 1 lie in lowest … highest - 1.
  bool sources_within(int64_t from, int64_t to, int64_t lowest, int64_t highest) const {
    using Unsigned = std::make_unsigned_t<Index>;  // Values below `lowest` wrap to very large ones.
    Unsigned furthest = 0;
    for (int64_t e = rowptr[from]; e < rowptr[to]; ++e)
      furthest = std::max(furthest, Unsigned(Unsigned(columns[e]) - Unsigned(lowest)));
    const int64_t end = std::min<int64_t>(highest, std::numeric_limits<Index>::max());
    return rowptr[from] == rowptr[to] || (lowest < end && furthest < Unsigned(end - lowest));
  }
};

// Contiguous states, starting with source `first`.
template <class T>
struct Matrix {
  const T *z;
  int64_t pitch, first;

  const T *row(int64_t source) const { return z + (source - first) * pitch; }
};

template <class T>
struct Pointers {
  const T *const *rows;

  const T *row(int64_t source) const { return rows[source]; }
};

// States in several pieces, consecutive in the numbering of the sources.
template <class T>
struct Rows {
  std::vector<const T *> rows;

  Rows(int64_t pieces, const int64_t *sizes, const T *const *pointers, int64_t pitch) {
    rows.reserve(std::accumulate(sizes, sizes + pieces, int64_t(0)));
    for (int64_t piece = 0; piece < pieces; ++piece)
      for (int64_t i = 0; i < sizes[piece]; ++i) rows.push_back(pointers[piece] + i * pitch);
  }
  int64_t size() const { return rows.size(); }
  const T *row(int64_t source) const { return rows[source]; }
  Pointers<T> pointers() const { return {rows.data()}; }
};

// The weighted sum over the edges begin … end - 1 of the sources' values starting at `at`, in N registers for
// (N - 1) · lanes < width <= N · lanes values. If necessary, the last register overlaps the one before it; both then
// hold equal values. With few registers, several edges are interleaved, so that none waits for the previous one. Not
// inlined: in a function with all sixteen, no register is left for the pointers.
template <int N, class T, class Index, class Source>
__attribute__((noinline)) void sum_registers(
    const Edges<T, Index> &edges, int64_t begin, int64_t end, const Source &z, int64_t at, int64_t width, T *out) {
  using S = Simd<T>;
  constexpr int turns = N > 4 ? 1 : N > 2 ? 2 : 4;
  const int64_t last = width - S::lanes;
  const Index *columns = edges.columns;
  const T *values = edges.values;
  const Source source = z;
  typename S::Vector sum[turns][N] = {};
  int64_t e = begin;
  for (; e + turns <= end; e += turns)
#pragma GCC unroll 4
    for (int turn = 0; turn < turns; ++turn) {
      const T *row = source.row(columns[e + turn]) + at;
      const T weight = values[e + turn];
#pragma GCC unroll 16
      for (int n = 0; n < N; ++n) sum[turn][n] += weight * S::load(row + (n < N - 1 ? n * S::lanes : last));
    }
  for (; e < end; ++e) {
    const T *row = source.row(columns[e]) + at;
    const T weight = values[e];
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) sum[0][n] += weight * S::load(row + (n < N - 1 ? n * S::lanes : last));
  }
#pragma GCC unroll 16
  for (int n = 0; n < N; ++n) {
#pragma GCC unroll 4
    for (int turn = 1; turn < turns; ++turn) sum[0][n] += sum[turn][n];
    S::store(out + (n < N - 1 ? n * S::lanes : last), sum[0][n]);
  }
}

template <int N, class T, class Index, class Source>
void sum_upto(
    int64_t n, const Edges<T, Index> &edges, int64_t begin, int64_t end, const Source &z, int64_t at, int64_t width,
    T *out) {
  if constexpr (N > 1) {
    if (n < N) return sum_upto<N - 1>(n, edges, begin, end, z, at, width, out);
  }
  sum_registers<N>(edges, begin, end, z, at, width, out);
}

// The input of one target, Σ w z over its edges, for the features starting at `from`: at least one register of them.
template <class T, class Index, class Source>
void weighted_sum(
    const Edges<T, Index> &edges, int64_t target, const Source &z, int64_t from, int64_t features, T *out) {
  constexpr int64_t lanes = Simd<T>::lanes;
  const int64_t vectors = (features + lanes - 1) / lanes, passes = (vectors + REGISTERS - 1) / REGISTERS;
  const int64_t per_pass = (vectors + passes - 1) / passes;
  for (int64_t vector = 0; vector < vectors; vector += per_pass) {
    const int64_t n = std::min(per_pass, vectors - vector), at = vector * lanes;
    const int64_t width = std::min(n * lanes, features - at), shift = std::max<int64_t>(lanes - width, 0);
    sum_upto<REGISTERS>(
        n, edges, edges.rowptr[target], edges.rowptr[target + 1], z, from + at - shift, width + shift,
        out + at - shift);
  }
}

// The number of threads worth waking for a number of multiply-adds; a product of sizes may exceed an integer.
int team(int64_t threads, double multiply_adds) { return multiply_adds < 1 << 17 ? 1 : int(threads); }

// The product of many sources. Their rows usually lie a power of two apart, so a cache of low associativity cannot hold
// a tile of all of them: the tile is copied to contiguous memory, which all targets then use in turn.
template <class T, class Index>
int product_of_copies(
    int64_t threads, int64_t targets, int64_t features, const Rows<T> &z, const Edges<T, Index> &edges, T *out) {
  const int64_t sources = z.size(), tile = std::min(COPIED * Simd<T>::lanes, features);
  const int64_t tiles = (features + tile - 1) / tile;
  // With fewer tiles than threads, several threads share the targets of a tile, each with its own copy.
  const int64_t members = team(threads, double(edges.count) * features), shares = (members + tiles - 1) / tiles;
  std::unique_ptr<T[]> copies(new T[members * sources * tile]);
#pragma omp parallel for collapse(2) schedule(dynamic) num_threads(int(members))
  for (int64_t t = 0; t < tiles; ++t)
    for (int64_t share = 0; share < shares; ++share) {
      const int64_t at = std::min(t * tile, features - tile);
      T *copy = copies.get() + omp_get_thread_num() * sources * tile;
      for (int64_t u = 0; u < sources; ++u) std::copy_n(z.row(u) + at, tile, copy + u * tile);
      for (int64_t v = targets * share / shares; v < targets * (share + 1) / shares; ++v)
        weighted_sum(edges, v, Matrix<T>{copy, tile, 0}, 0, tile, out + v * features + at);
    }
  return OK;
}

template <class T, class Index>
int sparse_product(
    int64_t threads, int64_t targets, int64_t features, const Rows<T> &z, const Edges<T, Index> &edges, T *out) {
  const int64_t sources = z.size();
  if (!edges.pointers_valid(targets) || !edges.sources_within(0, targets, 0, sources)) return WRONG_EDGES;
  constexpr int64_t lanes = Simd<T>::lanes, group = 8;
  if (!targets) return OK;  // Otherwise no memory would bound the number of features.
  if (features < lanes) {
#pragma omp parallel for schedule(dynamic, 64) num_threads(team(threads, double(edges.count) * features))
    for (int64_t v = 0; v < targets; ++v)
      for (int64_t f = 0; f < features; ++f) {
        T sum = 0;
        for (int64_t e = edges.rowptr[v]; e < edges.rowptr[v + 1]; ++e) sum += edges.values[e] * z.row(edges.columns[e])[f];
        out[v * features + f] = sum;
      }
    return OK;
  }
  if (edges.count >= 3 * sources && sources >= 384) return product_of_copies(threads, targets, features, z, edges, out);
  // Columns in tiles, so that a tile of all sources stays in cache for all targets.
  const int64_t fitting = CACHE / int64_t(sizeof(T)) / std::max<int64_t>(sources, 1);
  const int64_t step = REGISTERS * lanes;
  const int64_t tile = std::max(fitting / step * step, step);
  const int64_t tiles = (features - lanes) / tile + 1;  // The last one may be wider: no column belongs to two.
#pragma omp parallel for collapse(2) schedule(dynamic) num_threads(team(threads, double(edges.count) * features))
  for (int64_t t = 0; t < tiles; ++t)
    for (int64_t first = 0; first < targets; first += group) {
      const int64_t at = t * tile, width = t + 1 < tiles ? tile : features - at;
      for (int64_t v = first; v < std::min(first + group, targets); ++v)
        weighted_sum(edges, v, z.pointers(), at, width, out + v * features + at);
    }
  return OK;
}

// For every edge (u, v) the product of the rows ⟨received_v, z_u⟩: the gradient of the edges' weights.
template <class T, class Index>
int sampled_product(
    int64_t threads, int64_t targets, int64_t features, const T *received, const Rows<T> &z,
    const Edges<T, Index> &edges, T *out) {
  using S = Simd<T>;
  if (!edges.pointers_valid(targets) || !edges.sources_within(0, targets, 0, z.size())) return WRONG_EDGES;
#pragma omp parallel for schedule(dynamic, 8) num_threads(team(threads, double(edges.count) * features))
  for (int64_t v = 0; v < targets; ++v)
    for (int64_t e = edges.rowptr[v]; e < edges.rowptr[v + 1]; ++e) {
      const T *x = received + v * features, *y = z.row(edges.columns[e]);
      constexpr int chains = 4;
      typename S::Vector sums[chains] = {};
      int64_t f = 0;
      for (; f + chains * S::lanes <= features; f += chains * S::lanes)
        for (int n = 0; n < chains; ++n)
          sums[n] += S::load(x + f + n * S::lanes) * S::load(y + f + n * S::lanes);
      const typename S::Vector total = (sums[0] + sums[1]) + (sums[2] + sums[3]);
      T sum = 0;
      for (int64_t lane = 0; lane < S::lanes; ++lane) sum += total[lane];
      for (; f < features; ++f) sum += x[f] * y[f];
      out[e] = sum;
    }
  return OK;
}

// The order of the edges of Aᵀ, stably sorted by source, and where those of each source start.
template <class T, class Index>
int by_source(int64_t targets, int64_t sources, const Edges<T, Index> &edges, Index *rowptr, Index *order) {
  if (!edges.pointers_valid(targets) || !edges.sources_within(0, targets, 0, sources)) return WRONG_EDGES;
  std::fill(rowptr, rowptr + sources + 1, Index(0));
  for (int64_t e = 0; e < edges.count; ++e) ++rowptr[edges.columns[e] + 1];
  std::partial_sum(rowptr, rowptr + sources + 1, rowptr);
  std::vector<Index> next(rowptr, rowptr + sources);
  for (int64_t e = 0; e < edges.count; ++e) order[next[edges.columns[e]]++] = Index(e);
  return OK;
}

}  // namespace
