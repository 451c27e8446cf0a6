// A static graph, block by block: sparse product, scale and shift, ReLU, 3×3 convolution, while a map is in cache.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <vector>

#include <omp.h>

#include "sparse.h"

namespace {

template <class T>
T relu(T value) {
  return value < 0 ? 0 : value;  // NaN stays NaN.
}

template <class T>
struct Map {
  int64_t height, width;

  int64_t size() const { return height * width; }
  Map<T> strided(int64_t stride) const {
    return stride == 2 ? Map<T>{(height + 1) / 2, (width + 1) / 2} : *this;
  }
  // Distance of two maps in memory: the last row may be written a whole number of vectors wide.
  int64_t pitch() const {
    constexpr int64_t lanes = Simd<T>::lanes;
    return round_up((height - 1) * width + round_up(width, lanes), lanes);
  }
  // Length of a row with its borders of zero, and room for the vectors that begin in it.
  int64_t padded_row() const {
    return round_up(width + 2, Simd<T>::lanes) + 2 * Simd<T>::lanes;
  }
};

template <class T>
struct NodeFunction {
  T scale, shift, kernel[9], bias;
  bool second_relu;

  typename Simd<T>::Vector finish(typename Simd<T>::Vector value) const {
    if (!second_relu) return value;
    value += bias;
    return value < 0 ? typename Simd<T>::Vector{} : value;
  }

  // out = k * relu(scale · in + shift); `padded` is scratch. Rows are written whole vectors wide, one after the other,
  // each over what the one before wrote too much.
  void stride1(const T *in, Map<T> map, T *padded, T *out) const {
    using S = Simd<T>;
    const int64_t row = map.padded_row();
    std::fill(padded, padded + row, T(0));
    std::fill(padded + (map.height + 1) * row, padded + (map.height + 2) * row, T(0));
    for (int64_t y = 0; y < map.height; ++y) {
      T *to = padded + (y + 1) * row;
      to[0] = 0;
      for (int64_t x = 0; x < map.width; x += S::lanes) {
        const typename S::Vector value = scale * S::load(in + y * map.width + x) + shift;
        S::store(to + 1 + x, value < 0 ? typename S::Vector{} : value);
      }
      to[map.width + 1] = 0;
    }
    for (int64_t y = 0; y < map.height; ++y)
      for (int64_t x = 0; x < map.width; x += S::lanes) {
        const T *from = padded + y * row + x;
        typename S::Vector sum[3];
        for (int dy = 0; dy < 3; ++dy, from += row)
          sum[dy] = kernel[3 * dy] * S::load(from) + kernel[3 * dy + 1] * S::load(from + 1) +
                    kernel[3 * dy + 2] * S::load(from + 2);
        S::store(out + y * map.width + x, finish(sum[0] + sum[1] + sum[2]));
      }
  }

  // The same with stride 2. Even and odd columns of the padded map lie apart, so that neighbours are neighbours.
  void stride2(const T *in, Map<T> map, T *padded, T *out) const {
    using S = Simd<T>;
    const Map<T> to = map.strided(2);
    const int64_t row = to.padded_row(), rows = map.height + 2;
    T *even = padded, *odd = padded + rows * row;
    for (int64_t y = 0; y < rows; ++y) {
      T *e = even + y * row, *o = odd + y * row;
      if (y == 0 || y > map.height) {
        std::fill(e, e + row, T(0));
        std::fill(o, o + row, T(0));
        continue;
      }
      const T *from = in + (y - 1) * map.width;
      e[0] = 0;
      for (int64_t x = 0; x < map.width / 2; ++x) {
        o[x] = relu(scale * from[2 * x] + shift);
        e[x + 1] = relu(scale * from[2 * x + 1] + shift);
      }
      if (map.width % 2) {
        o[to.width - 1] = relu(scale * from[map.width - 1] + shift);
        e[to.width] = 0;
      }
    }
    for (int64_t y = 0; y < to.height; ++y)
      for (int64_t x = 0; x < to.width; x += S::lanes) {
        typename S::Vector sum[3];
        for (int dy = 0; dy < 3; ++dy) {
          const T *e = even + (2 * y + dy) * row + x, *o = odd + (2 * y + dy) * row + x;
          sum[dy] = kernel[3 * dy] * S::load(e) + kernel[3 * dy + 1] * S::load(o) + kernel[3 * dy + 2] * S::load(e + 1);
        }
        S::store(out + y * to.width + x, finish(sum[0] + sum[1] + sum[2]));
      }
  }
};

template <class T, class Index>
struct StaticGraph {
  int64_t num_blocks;
  const int64_t *sizes, *strides;
  Map<T> map;
  const T *x;
  Edges<T, Index> edges;
  const T *scale, *shift, *kernel, *bias;
  T *out;

  bool valid() const {
    int64_t nodes = 0, first = 0;
    for (int64_t b = 0; b < num_blocks; nodes += sizes[b++]) {
      if (b && !edges.sources_within(nodes - sizes[0], nodes - sizes[0] + sizes[b], first, nodes)) return false;
      if (strides[b] == 2) first = nodes;
    }
    return true;
  }

  // Values that hold all states between two changes of the map's size; two such rooms take turns.
  int64_t room() const {
    int64_t largest = 0, held = 0;
    Map<T> now = map;
    for (int64_t b = 0; b < num_blocks; ++b) {
      if (strides[b] == 2) held = 0;
      now = now.strided(strides[b]);
      held += sizes[b] * now.pitch();
      largest = std::max(largest, held);
    }
    return round_up(largest, BYTES);
  }

  // Whether the sizes below may be larger than an integer: more than any memory holds.
  bool too_large(int64_t threads) const {
    double nodes = 0;
    for (int64_t b = 0; b < num_blocks; ++b) nodes += double(sizes[b]);
    const double places = (map.height + 2.0) * (map.width + 4.0 * BYTES);
    return (nodes + 1) * places * threads * 16 * sizeof(T) > double(int64_t(1) << 62);
  }

  // One thread's room for what a node receives, its state, and the padded map.
  int64_t scratch() const {
    return round_up(2 * (map.pitch() + Simd<T>::lanes) + 2 * (map.height + 2) * map.padded_row(), BYTES);
  }

  NodeFunction<T> function(int64_t number) const {
    NodeFunction<T> f{scale[number], shift[number], {}, bias ? bias[number] : T(0), bias != nullptr};
    std::copy_n(kernel + 9 * number, 9, f.kernel);
    return f;
  }

  // Nodes from … to - 1 of a block, for one image.
  struct Place {
    int64_t block, nodes, first, functions;  // Nodes before the block; first node with maps of this size.
    Map<T> map, next;
    T *sources, *states;  // Of node `first`; of the block's first node.
  };

  void nodes(const Place &at, int64_t from, int64_t to, const T *image, T *result, T *scratch) const {
    const int64_t pitch = at.map.pitch(), size = at.map.size(), stride = strides[at.block];
    const bool last = at.block == num_blocks - 1;
    T *received = scratch, *own = received + map.pitch() + Simd<T>::lanes;
    T *padded = own + map.pitch() + Simd<T>::lanes;
    for (int64_t v = from; v < to; ++v) {
      T *state = last ? own : at.states + v * at.next.pitch();
      T *input = stride ? received : state;
      if (at.block == 0)
        std::copy_n(image + v * size, size, input);
      else
        weighted_sum(
            edges, at.nodes - sizes[0] + v, Matrix<T>{at.sources, pitch, at.first}, 0,
            round_up(size, Simd<T>::lanes), input);
      if (stride == 1)
        function(at.functions + v).stride1(input, at.map, padded, state);
      else if (stride == 2)
        function(at.functions + v).stride2(input, at.map, padded, state);
      const int64_t outputs = at.next.size();
      if (last)
        std::copy_n(state, outputs, result + v * outputs);
      else  // The last register of a map is read in full: no slow or stray numbers behind the map.
        std::fill(state + outputs, state + at.next.pitch(), T(0));
    }
  }

  // All blocks for one image. With a team, its threads share each block's nodes; all of them must call this.
  void image(int64_t number, T *rooms, T *scratch, std::atomic<int64_t> *team) const {
    Map<T> end = map;
    for (int64_t b = 0; b < num_blocks; ++b) end = end.strided(strides[b]);
    const T *image = x + number * sizes[0] * map.size();
    T *result = out + number * sizes[num_blocks - 1] * end.size();
    T *room[2] = {rooms, rooms + this->room()};
    Place at{0, 0, 0, 0, map, map, room[0], room[0]};
    for (; at.block < num_blocks; ++at.block) {
      const int64_t size = sizes[at.block];
      at.next = at.map.strided(strides[at.block]);
      if (strides[at.block] == 2) {
        std::swap(room[0], room[1]);
        at.states = room[0];
      }
      if (team) {
        constexpr int64_t group = 4;
        for (int64_t from; (from = team[at.block].fetch_add(group)) < size;)
          nodes(at, from, std::min(from + group, size), image, result, scratch);
#pragma omp barrier
      } else {
        nodes(at, 0, size, image, result, scratch);
      }
      if (strides[at.block] == 2) at.first = at.nodes, at.sources = room[0];
      at.states += size * at.next.pitch();
      at.nodes += size;
      at.functions += strides[at.block] ? size : 0;
      at.map = at.next;
    }
  }

  // Images are dealt out to the threads; what is left over, less than one for each, all threads share.
  int run(int64_t threads, int64_t batch) const {
    int64_t targets = -sizes[0];
    for (int64_t b = 0; b < num_blocks; ++b) targets += sizes[b];
    if (!edges.pointers_valid(targets) || !valid()) return WRONG_EDGES;
    if (too_large(threads)) return NO_MEMORY;
    const int64_t per_thread = 2 * room() + scratch(), alone = batch / threads * threads;
    std::unique_ptr<T, decltype(&std::free)> memory(
        static_cast<T *>(std::aligned_alloc(BYTES, threads * per_thread * sizeof(T))), &std::free);
    if (!memory) return NO_MEMORY;
    std::vector<std::atomic<int64_t>> team((batch - alone) * num_blocks);
#pragma omp parallel num_threads(int(threads))
    {
      T *own = memory.get() + omp_get_thread_num() * per_thread;
#pragma omp for schedule(dynamic)
      for (int64_t n = 0; n < alone; ++n) image(n, own, own + 2 * room(), nullptr);
      for (int64_t n = alone; n < batch; ++n)
        image(n, memory.get(), own + 2 * room(), team.data() + (n - alone) * num_blocks);
    }
    return OK;
  }
};

}  // namespace
