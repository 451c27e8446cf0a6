// Static graphs for inference, from an image to the states of the last block or to logits. A plan holds the graph with
// checked and packed edges, and runs it for any number and size of images.
//
// All maps of one size are stored in tiles: some registers of the first map, as many of the second, and so on, then the
// next registers of each. The inputs of a block's nodes are computed tile by tile, so that the states that are read
// stay in cache; node functions follow as soon as enough inputs are available.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include <omp.h>

#include "classifier.h"
#include "memory.h"
#include "sparse.h"
#include "states.h"
#include "stem.h"

namespace {

// Where the states of a node are stored: `tile` registers, then those of the other nodes, then its next registers.
template <class Stored>
struct Place {
  Stored *room;
  int64_t tile, nodes, node, registers;

  int64_t end_of(int64_t n) const { return n / tile * tile + tile; }
  Stored *at(int64_t n, int64_t lanes) const {
    const int64_t first = n / tile * tile;
    return room + (first * nodes + node * std::min(tile, registers - first) + n - first) * lanes;
  }
};

// Maps of one size. The pitch is a row and at least one column of zeros, and even, so that rows can be split into even
// and odd columns; the zeros are the right border of a row and the left border of the next.
template <class State>
struct Maps {
  using T = typename State::Number;
  static constexpr int64_t lanes = Simd<T>::lanes, LINES = 2, SHARE = CACHE / 2;
  int64_t height, width, pitch, registers;  // Registers per map.
  int64_t tile, nodes;  // Registers of a tile; nodes with maps of this size.
  std::vector<Bits<T>> mask;  // Ones at the pixels of a map.

  Maps(int64_t height, int64_t width, int64_t nodes) : height(height), width(width), nodes(std::max<int64_t>(nodes, 1)) {
    pitch = round_up(width + 1, 2);
    registers = round_up((height * pitch + lanes - 1) / lanes, State::together);
    // The tiles of all sources fit in a core's second-level cache; at least two cache lines each.
    const int64_t fitting = SHARE / (this->nodes * lanes * int64_t(sizeof(typename State::Stored)));
    const int64_t least = LINES * 64 / int64_t(lanes * sizeof(typename State::Stored));
    const int64_t most = std::clamp<int64_t>(fitting, least, State::MOST);
    const int64_t tiles = (registers + most - 1) / most;
    tile = std::min<int64_t>(round_up((registers + tiles - 1) / tiles, std::max(State::together, 2)), State::MOST);
    mask.resize(registers * lanes);
    for (int64_t y = 0; y < height; ++y) std::fill_n(&mask[y * pitch], width, ~Bits<T>(0));
  }

  int64_t tiles() const { return (registers + tile - 1) / tile; }
  int64_t width_of(int64_t t) const { return std::min(tile, registers - t * tile); }
  int64_t values() const { return registers * lanes; }
  int64_t room() const { return nodes * values(); }
  Place<typename State::Stored> place(typename State::Stored *room, int64_t node) const {
    return {room, tile, nodes, node, registers};
  }
};

// Stores registers begin … end - 1 of a node's states, tile by tile.
template <class State, class Next>
inline __attribute__((always_inline)) void fill(
    int64_t begin, int64_t end, const Place<typename State::Stored> &place, Next next) {
  using S = Simd<typename State::Number>;
  while (begin < end) {
    typename State::Stored *to = place.at(begin, S::lanes);
    for (const int64_t stop = std::min(end, place.end_of(begin)); begin < stop;
         begin += State::together, to += State::together * S::lanes) {
      typename S::Vector values[State::together];
#pragma GCC unroll 4
      for (int64_t i = 0; i < State::together; ++i) values[i] = next();
      State::store(to, values);
    }
  }
}

// Three rows of a map, register by register, with their left and right neighbours: loaded, or, where a load that
// crosses a cache line costs more, shifted in registers. `next` takes the rows in turn.
template <class T>
struct Window {
  using S = Simd<T>;
#if defined(__AVX512F__)
  const T *from[3];
  typename S::Vector before[3], now[3];

  Window(const T *first, int64_t pitch) {
    for (int dy = 0; dy < 3; ++dy, first += pitch) {
      before[dy] = S::load(first + 1 - S::lanes);
      now[dy] = S::load(first + 1);
      from[dy] = first + 1;
    }
  }
  void next(int dy, typename S::Vector *left, typename S::Vector *middle, typename S::Vector *right) {
    const typename S::Vector after = S::load(from[dy] += S::lanes);
    *left = joined<S::lanes - 1>(before[dy], now[dy]);
    *middle = now[dy];
    *right = joined<1>(now[dy], after);
    before[dy] = now[dy];
    now[dy] = after;
  }
  // The lanes from N of a, then those of b.
  template <int N>
  static typename S::Vector joined(typename S::Vector a, typename S::Vector b) {
    if constexpr (sizeof(T) == 4)
      return (typename S::Vector)(_mm512_alignr_epi32(__m512i(b), __m512i(a), N));
    else
      return (typename S::Vector)(_mm512_alignr_epi64(__m512i(b), __m512i(a), N));
  }
#else
  const T *from;
  int64_t pitch;

  Window(const T *first, int64_t pitch) : from(first), pitch(pitch) {}
  void next(int dy, typename S::Vector *left, typename S::Vector *middle, typename S::Vector *right) {
    const T *row = from + dy * pitch;
    *left = S::load(row);
    *middle = S::load(row + 1);
    *right = S::load(row + 2);
    if (dy == 2) from += S::lanes;
  }
#endif
};

// A 3×3 kernel, and the bias of an optional second ReLU, in registers.
template <class T>
struct NodeFunction {
  using S = Simd<T>;
  typename S::Vector kernel[9], bias;
  bool second_relu;

  NodeFunction(const T *from, const T *shift) : bias(typename S::Vector{} + (shift ? *shift : T(0))), second_relu(shift) {
    for (int n = 0; n < 9; ++n) kernel[n] = typename S::Vector{} + from[n];
  }
  typename S::Vector finish(typename S::Vector value) const {
    if (!second_relu) return value;
    value += bias;
    return value < 0 ? typename S::Vector{} : value;
  }
  typename S::Vector at(Window<T> &window) const {
    typename S::Vector sum[3];
    for (int dy = 0; dy < 3; ++dy) {
      typename S::Vector left, middle, right;
      window.next(dy, &left, &middle, &right);
      sum[dy] = kernel[3 * dy] * left + kernel[3 * dy + 1] * middle + kernel[3 * dy + 2] * right;
    }
    return finish(sum[0] + sum[1] + sum[2]);
  }
  // With a stride of 2, from the even and the odd columns.
  typename S::Vector at(const T *even, const T *odd, int64_t pitch) const {
    typename S::Vector sum[3];
    for (int dy = 0; dy < 3; ++dy, even += pitch, odd += pitch)
      sum[dy] = kernel[3 * dy] * S::load(odd - 1) + kernel[3 * dy + 1] * S::load(even) + kernel[3 * dy + 2] * S::load(odd);
    return finish(sum[0] + sum[1] + sum[2]);
  }
};

// Registers begin … end - 1 of a node's states, tile by tile, for pixels that start one row and one column after
// `from`. Not inlined: a kernel fills the registers.
template <class State>
__attribute__((noinline)) void convolve(
    const typename State::Number *from, int64_t pitch, const typename State::Number *kernel,
    const typename State::Number *bias, int64_t begin, int64_t end, const Place<typename State::Stored> &place) {
  using S = Simd<typename State::Number>;
  const NodeFunction<typename State::Number> f(kernel, bias);
  Window<typename State::Number> window(from + begin * S::lanes, pitch);
  fill<State>(begin, end, place, [&] { return f.at(window); });
}

// Likewise, unchanged.
template <class State>
void keep(
    const typename State::Number *from, int64_t begin, int64_t end, const Place<typename State::Stored> &place) {
  using S = Simd<typename State::Number>;
  from += begin * S::lanes;
  fill<State>(begin, end, place, [&] { return S::load((from += S::lanes) - S::lanes); });
}

// The buffer for the inputs of a block's nodes, with zeros before, between and after: maps, or with strides of 2 their
// even, then odd columns.
template <class State>
struct Received {
  using T = typename State::Number;
  static constexpr int64_t lanes = Simd<T>::lanes;
  int64_t parts, values, border, pitch;  // Parts, their values, zeros after each, and the distance between nodes.

  Received(const Maps<State> &in, int64_t stride) : parts(stride == 2 ? 2 : 1) {
    values = round_up(in.values() / parts, lanes);
    border = round_up(in.pitch + lanes, lanes);
    pitch = parts * (values + border);
  }
  int64_t size(int64_t nodes) const { return border + nodes * pitch; }
  T *start(T *room, int64_t node) const { return room + border + node * pitch; }
  int64_t odd() const { return values + border; }
  void clear_borders(T *room, int64_t nodes) const {
    std::fill_n(room, border, T(0));
    for (int64_t part = 1; part <= parts * nodes; ++part) std::fill_n(room + part * odd(), border, T(0));
  }
};

// A block, for images of one size.
template <class State>
struct Step {
  int64_t size, stride, targets, functions;  // Nodes before it: with edges, and with functions.
  std::shared_ptr<const Maps<State>> in, out;
  int64_t from, to;  // Index of its first node among those with maps of its input and output size.
  Received<State> received;
  int room;  // Which of two buffers holds its sources; states with smaller maps go to the other one.
};

template <class T>
struct Graph {
  std::vector<int64_t> sizes, strides;
  std::vector<int64_t> rowptr;  // For all nodes except the inputs.
  std::vector<Edge<T>> edges;  // Sources counted from the first node with maps of this size; weights include the scale.
  std::vector<T> scale, shift, kernel, bias;  // By function; only the inputs still need the scale.
  std::vector<T> inverse;  // 1 / unit of the inputs, if states have units and the inputs no functions.
  std::vector<T> out_shift;  // Of the last block, or none.
  Stem<T> stem;
  Classifier<T> classifier;
  bool relu = false, pooled = false;  // After the last block.
};

// Returns a status; fills a graph from the tensors of `static_graph`. If states have units, the functions that compute
// them are divided by the unit, and weights are multiplied by that of the source.
template <class T, class Index>
int pack_edges(
    Graph<T> &graph, const Edges<T, Index> &edges, const T *scale, const T *shift, const T *kernel, const T *bias,
    const T *unit = nullptr) {
  int64_t nodes = 0, targets = 0, functions = 0;
  for (int64_t size : graph.sizes) nodes += size;
  targets = nodes - graph.sizes[0];
  if (!edges.pointers_valid(targets)) return WRONG_EDGES;
  if (nodes > std::numeric_limits<int32_t>::max()) return NO_MEMORY;
  graph.rowptr.assign(edges.rowptr, edges.rowptr + targets + 1);
  graph.edges.resize(edges.count);
  nodes = targets = 0;
  for (size_t b = 0, first = 0; b < graph.sizes.size(); ++b) {
    const int64_t size = graph.sizes[b];
    const bool has_function = graph.strides[b] != 0;
    if (b && !edges.sources_within(targets, targets + size, first, nodes)) return WRONG_EDGES;
    const auto unit_of = [&](int64_t node) { return unit ? unit[node] : T(1); };
    for (int64_t v = 0; v < size; ++v) {
      const T own = b + 1 < graph.sizes.size() ? 1 / unit_of(nodes + v) : T(1);
      const T factor = has_function ? scale[functions + v] : own;
      for (int64_t e = b ? edges.rowptr[targets + v] : 0; b && e < edges.rowptr[targets + v + 1]; ++e)
        graph.edges[e] = {int32_t(edges.columns[e] - first), edges.values[e] * factor * unit_of(edges.columns[e])};
      for (int64_t k = 0; has_function && k < 9; ++k) graph.kernel.push_back(kernel[9 * (functions + v) + k] * own);
      if (has_function && bias) graph.bias.push_back(bias[functions + v] * own);
      if (!has_function && !b && unit) graph.inverse.push_back(own);
    }
    if (graph.strides[b] == 2) first = nodes;
    targets += b ? size : 0;
    functions += has_function ? size : 0;
    nodes += size;
  }
  graph.scale.assign(scale, scale + functions);
  graph.shift.assign(shift, shift + functions);
  return OK;
}

struct AnyPlan {
  virtual ~AnyPlan() = default;
};

template <class T>
struct PlanOf : AnyPlan {
  virtual int run(int64_t threads, int64_t batch, int64_t height, int64_t width, const T *x, T *out) = 0;
};

template <class State>
class Plan : public PlanOf<typename State::Number> {
  using T = typename State::Number;
  using Stored = typename State::Stored;
  using Weight = typename State::Weight;
  using S = Simd<T>;
  using Vector = typename S::Vector;
  static constexpr int64_t lanes = S::lanes, together = State::together;
  static constexpr int64_t AT_ONCE = 32;  // Minimum number of registers per call of a node function.

 public:
  explicit Plan(Graph<T> &&from) : graph(std::move(from)) {
    if constexpr (std::is_same_v<Weight, T>) {
      edges = std::move(graph.edges);
    } else {
      edges.resize(graph.edges.size());
      const Edge<T> *const all = graph.edges.data();
      for (size_t v = 0; v + 1 < graph.rowptr.size(); ++v)
        factor.push_back(State::pack(all + graph.rowptr[v], all + graph.rowptr[v + 1], edges.data() + graph.rowptr[v]));
      graph.edges.clear();
    }
  }

  // Images are distributed over the threads; the remainder, less than one per thread, is shared by all threads.
  int run(int64_t threads, int64_t batch, int64_t height, int64_t width, const T *x, T *out) override {
    if (too_large(threads, height, width)) return NO_MEMORY;
    const std::shared_ptr<const Layout> layout = layout_of(height, width);
    const int64_t alone = batch / threads * threads, outputs = graph.sizes.back();
    std::vector<Memory> memories;
    for (int64_t n = 0; n < threads; ++n) memories.push_back(pool.take(layout->bytes));
    std::vector<std::atomic<int64_t>> team((batch - alone) * layout->steps.size());
    std::vector<T> features(graph.classifier ? batch * outputs : 0);
    const int64_t values = graph.pooled ? outputs : outputs * layout->steps.back().out->height * layout->steps.back().out->width;
    T *results = graph.classifier ? features.data() : out;
#pragma omp parallel num_threads(int(threads))
    {
      const int64_t number = omp_get_thread_num();
      Worker own(*this, *layout, memories[number].get(), memories[number].get());
#pragma omp for schedule(dynamic)
      for (int64_t n = 0; n < alone; ++n) own.image(x + n * graph_inputs(height, width), results + n * values, nullptr);
      Worker shared(*this, *layout, memories[number].get(), memories[0].get());
      for (int64_t n = alone; n < batch; ++n)
        shared.image(
            x + n * graph_inputs(height, width), results + n * values, &team[(n - alone) * layout->steps.size()]);
    }
    for (Memory &memory : memories) pool.give_back(std::move(memory));
    if (graph.classifier) graph.classifier.run(threads, batch, features.data(), out);
    return OK;
  }

 private:
  struct Layout {
    int64_t height, width, bytes, rooms, received, flat, raw;
    std::vector<Step<State>> steps;
  };

  Graph<T> graph;
  std::vector<Edge<Weight>> edges;  // Instead of those of the graph.
  std::vector<T> factor;  // For the sums of each target, or none.
  Pool pool;
  std::mutex mutex;
  std::shared_ptr<const Layout> last;

  int64_t graph_inputs(int64_t height, int64_t width) const {
    return (graph.stem ? graph.stem.inputs : graph.sizes[0]) * height * width;
  }

  // Whether the sizes below may exceed an integer: more than any memory.
  bool too_large(int64_t threads, int64_t height, int64_t width) const {
    double nodes = 1;
    for (int64_t size : graph.sizes) nodes += double(size);
    const double places = (height + 8.0) * (width + 8.0 * BYTES);
    return nodes * places * threads * 64 * sizeof(T) > double(int64_t(1) << 62);
  }

  std::shared_ptr<const Layout> layout_of(int64_t height, int64_t width) {
    const std::lock_guard<std::mutex> lock(mutex);
    if (!last || last->height != height || last->width != width) last = made_layout(height, width);
    return last;
  }

  std::shared_ptr<const Layout> made_layout(int64_t height, int64_t width) const {
    auto made = std::make_shared<Layout>();
    *made = {height, width, 0, 0, 0, 0, 0, {}};
    if (graph.stem) height = graph.stem.output(height), width = graph.stem.output(width);
    const auto &sizes = graph.sizes, &strides = graph.strides;
    const int64_t blocks = sizes.size();
    // Nodes whose states have the size that starts with a block; those of the last block are not stored.
    const auto nodes_from = [&](int64_t b) {
      int64_t nodes = sizes[b];
      while (++b < blocks - 1 && strides[b] != 2) nodes += sizes[b];
      return nodes;
    };
    auto maps = std::make_shared<const Maps<State>>(height, width, strides[0] == 2 ? 0 : nodes_from(0));
    int64_t targets = -sizes[0], functions = 0, number = 0;
    int room = 0;
    for (int64_t b = 0; b < blocks; ++b) {
      Step<State> step{sizes[b], strides[b], targets, functions, maps, maps, number, number,
                       {*maps, strides[b]}, room};
      made->received = std::max(made->received, step.received.size(sizes[b]));
      if (strides[b] == 2) {
        maps = std::make_shared<const Maps<State>>((maps->height + 1) / 2, (maps->width + 1) / 2, nodes_from(b));
        step.out = maps;
        step.to = number = 0;
        room = 1 - room;
      }
      number += sizes[b];
      made->rooms = std::max(made->rooms, maps->room());
      made->flat = std::max({made->flat, step.in->values() + lanes, maps->values() + lanes});
      targets += sizes[b];
      functions += strides[b] ? sizes[b] : 0;
      made->steps.push_back(std::move(step));
    }
    if (strides[0] == 2) made->raw = sizes[0] * made->steps[0].in->values();
    for (int64_t *part : {&made->rooms, &made->received, &made->flat, &made->raw}) *part = round_up(*part, 64);
    made->bytes = 2 * made->rooms * sizeof(Stored) + (made->received + made->flat + made->raw) * sizeof(T) +
                  graph.stem.bytes(made->width);
    return made;
  }

  // One thread at work on an image, alone or in a team that shares the states.
  struct Worker {
    const Plan &plan;
    const Graph<T> &graph;
    const Layout &layout;
    Stored *rooms[2];
    T *received, *flat, *raw, *lines;

    Worker(const Plan &plan, const Layout &layout, char *own, char *shared)
        : plan(plan), graph(plan.graph), layout(layout) {
      const int64_t both = 2 * layout.rooms * sizeof(Stored);
      rooms[0] = reinterpret_cast<Stored *>(shared);
      rooms[1] = rooms[0] + layout.rooms;
      received = reinterpret_cast<T *>(own + both);
      flat = received + layout.received;
      raw = flat + layout.flat;
      lines = raw + layout.raw;
    }

    // All blocks for one image. With a team, its threads share each block's nodes; all of them must call this.
    void image(const T *x, T *result, std::atomic<int64_t> *team) {
      for (const Step<State> &step : layout.steps) {
        if (!team) {
          nodes(step, 0, step.size, x, result);
          continue;
        }
        const int64_t group = std::max<int64_t>(round_up(step.size / (4 * omp_get_num_threads()), 4), 4);
        for (int64_t from; (from = team[&step - layout.steps.data()].fetch_add(group)) < step.size;)
          nodes(step, from, std::min(from + group, step.size), x, result);
#pragma omp barrier
      }
    }

    // Nodes from … to - 1 of a block.
    void nodes(const Step<State> &step, int64_t from, int64_t to, const T *x, T *result) {
      const Maps<State> &in = *step.in, &out = *step.out;
      const bool is_first = &step == layout.steps.data(), is_last = &step == &layout.steps.back();
      Stored *states = rooms[step.stride == 2 ? 1 - step.room : step.room];
      const auto own = [&](int64_t v) { return step.received.start(received, v - from); };
      step.received.clear_borders(received, to - from);
      std::optional<StemRows<T>> rows;
      if (is_first && graph.stem) rows.emplace(graph.stem, x, layout.height, layout.width, lines);
      for (int64_t t = 0, done = 0; t < in.tiles(); ++t) {
        if (is_first) inputs(step, t, from, to, x, rows);
        const Stored *const sources = in.place(rooms[step.room], 0).at(t * in.tile, lanes);
        for (int64_t v = from; v < to && !is_first; ++v) sum(step, t, sources, v, own(v));
        const bool complete = t + 1 == in.tiles();
        const int64_t ready = complete ? out.registers : ready_with(step, (t * in.tile + in.width_of(t)) * lanes);
        if (is_last || !(complete || ready - done >= AT_ONCE)) continue;
        for (int64_t v = from; v < to; ++v) apply(step, v, own(v), done, ready, states);
        done = ready;
      }
      for (int64_t v = from; is_last && v < to; ++v) {
        if (step.stride == 2) apply_stride2(step, v, own(v), 0, out.registers);
        if (step.stride == 1)
          convolve<Exact<T>>(
              own(v) - in.pitch - 1, in.pitch, kernel_of(step, v), bias_of(step, v), 0, out.registers,
              Place<T>{flat, out.registers, 1, 0, out.registers});
        leave(out, v, step.stride ? flat : own(v), result);
      }
    }

    // The states of a node, registers from … to - 1, tile by tile.
    void apply(const Step<State> &step, int64_t v, const T *own, int64_t from, int64_t to, Stored *states) {
      const Maps<State> &out = *step.out;
      const int64_t pitch = step.in->pitch;
      const Place<Stored> place = out.place(states, step.to + v);
      if (step.stride == 1)
        return convolve<State>(own - pitch - 1, pitch, kernel_of(step, v), bias_of(step, v), from, to, place);
      if (step.stride == 2) apply_stride2(step, v, own, from, to);
      keep<State>(step.stride ? flat : own, from, to, place);
    }

    // The number of registers of states that can be computed from a number of received values.
    static int64_t ready_with(const Step<State> &step, int64_t there) {
      const int64_t pitch = step.in->pitch;
      if (step.stride == 2) there = there / pitch / 2 * step.out->pitch;
      if (step.stride == 1) there = std::max<int64_t>(there - pitch - 1, 0);
      return there / lanes / together * together;
    }

    const T *kernel_of(const Step<State> &step, int64_t v) const { return &graph.kernel[9 * (step.functions + v)]; }
    const T *bias_of(const Step<State> &step, int64_t v) const {
      return graph.bias.empty() ? nullptr : &graph.bias[step.functions + v];
    }

    // A tile of a node's input from that of its sources, with relu and zeros around it if a function follows.
    void sum(const Step<State> &step, int64_t t, const Stored *sources, int64_t v, T *own) {
      const Maps<State> &in = *step.in;
      const int64_t number = step.targets + v, count = in.width_of(t), at = t * in.tile * lanes;
      const Edge<Weight> *edges = plan.edges.data();
      const T factor = plan.factor.empty() ? T(1) : plan.factor[number];
      const T shift = step.stride ? graph.shift[step.functions + v] : T(0);
      alignas(BYTES) T apart[State::MOST * lanes];
      sum_tile_of<State>(count)(
          edges + graph.rowptr[number], edges + graph.rowptr[number + 1], sources, factor, shift,
          step.stride ? &in.mask[at] : nullptr, step.stride == 2 ? apart : own + at);
      if (step.stride == 2) split(step.received, apart, count, own + at / 2);
    }

    // Splits a number of registers into even and odd columns.
    static void split(const Received<State> &received, const T *from, int64_t count, T *even) {
      for (int64_t n = 0; n < count; n += 2, even += lanes) {
        Vector e, o;
        const Vector next = n + 1 < count ? S::load(from + (n + 1) * lanes) : Vector{};
        take_apart(S::load(from + n * lanes), next, &e, &o, std::make_integer_sequence<int, lanes>());
        S::store(even, e);
        S::store(even + received.odd(), o);
      }
    }

    // A tile of the inputs: rows of the image or of the stem, then scale, shift and relu.
    void inputs(
        const Step<State> &step, int64_t t, int64_t from, int64_t to, const T *x, std::optional<StemRows<T>> &rows) {
      const Maps<State> &in = *step.in;
      const int64_t at = t * in.tile * lanes, count = in.width_of(t);
      const int64_t first = (at + in.pitch - 1) / in.pitch, end = (at + count * lanes + in.pitch - 1) / in.pitch;
      const auto map_of = [&](int64_t v) {
        return step.stride == 2 ? raw + (v - from) * in.values() : step.received.start(received, v - from);
      };
      for (int64_t y = first; y < std::min(end, in.height); ++y)
        if (rows)
          rows->compute(y, from, to, [&](int64_t v) { return map_of(v) + y * in.pitch; });
        else
          for (int64_t v = from; v < to; ++v)
            std::memcpy(map_of(v) + y * in.pitch, x + (v * in.height + y) * in.width, in.width * sizeof(T));
      for (int64_t v = from; !graph.inverse.empty() && v < to; ++v)
        for (int64_t j = 0; j < count * lanes; ++j) map_of(v)[at + j] *= graph.inverse[v];
      if (!step.stride) return;
      for (int64_t v = from; v < to; ++v) {
        T *values = map_of(v) + at;
        for (int64_t j = 0; j < count; ++j)
          S::store(
              values + j * lanes,
              masked_relu<T>(graph.scale[v] * S::load(values + j * lanes) + graph.shift[v], &in.mask[at + j * lanes]));
        if (step.stride == 2) split(step.received, values, count, step.received.start(received, v - from) + at / 2);
      }
    }

    // States with a stride of 2: the rows that the registers from … to - 1 cover, in `flat`.
    void apply_stride2(const Step<State> &step, int64_t v, const T *even, int64_t from, int64_t to) {
      const Maps<State> &in = *step.in, &out = *step.out;
      const NodeFunction<T> f(kernel_of(step, v), bias_of(step, v));
      const int64_t pitch = in.pitch / 2, end = std::min((to * lanes + out.pitch - 1) / out.pitch, out.height);
      const T *odd = even + step.received.odd();
      for (int64_t y = from * lanes / out.pitch; y < end; ++y)
        for (int64_t x = 0; x < out.width; x += lanes) {
          const int64_t place = (2 * y - 1) * pitch + x;
          S::store(flat + y * out.pitch + x, f.at(even + place, odd + place, pitch));
        }
    }

    // The result of a node of the last block: shifted, with relu, as a map or its mean.
    void leave(const Maps<State> &out, int64_t v, const T *map, T *result) const {
      const T shift = graph.out_shift.empty() ? T(0) : graph.out_shift[v];
      const auto value = [&](T place) { return graph.relu ? relu(place + shift) : place + shift; };
      T *to = result + v * (graph.pooled ? 1 : out.height * out.width);
      if (!graph.pooled) {
        for (int64_t y = 0; y < out.height; ++y)
          for (int64_t x = 0; x < out.width; ++x) to[y * out.width + x] = value(map[y * out.pitch + x]);
        return;
      }
      Vector total{};
      for (int64_t j = 0; j < out.registers; ++j) {
        Vector places = S::load(map + j * lanes) + shift;
        if (graph.relu) places = places < 0 ? Vector{} : places;
        const auto mask = Simd<Bits<T>>::load(&out.mask[j * lanes]);
        total += Vector(decltype(mask)(places) & mask);
      }
      *to = T(0);
      for (int64_t lane = 0; lane < lanes; ++lane) *to += total[lane];
      *to /= T(out.height * out.width);
    }
  };
};

// Bits of a state, or 0 for unrounded states.
template <class T>
AnyPlan *new_plan(Graph<T> &&graph, int64_t) {
  return new Plan<Exact<T>>(std::move(graph));
}
template <>
AnyPlan *new_plan(Graph<float> &&graph, int64_t bits) {
  if (bits == 8) return new Plan<Bytes>(std::move(graph));
  if (bits == 16) return new Plan<Rounded>(std::move(graph));
  return new Plan<Exact<float>>(std::move(graph));
}

}  // namespace
