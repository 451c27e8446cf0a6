// Every kernel against a plain loop, without Python: for processors that PyTorch is not at hand for.
// Prints a line for each kernel and type; the exit status is the number of those that are wrong.

#include "kernels.cpp"

#include <cstdio>
#include <functional>
#include <random>
#include <string>

namespace {

std::mt19937 generator(7);
int failures = 0;

template <class T>
std::vector<T> numbers(int64_t count) {
  std::normal_distribution<double> normal;
  std::vector<T> made(count);
  for (T &each : made) each = T(normal(generator));
  return made;
}

template <class T>
const char *type() {
  return sizeof(T) == 4 ? "float32" : "float64";
}

template <class T>
void report(
    const char *kernel, int status, const std::vector<T> &found, const std::vector<double> &expected,
    double tolerance = sizeof(T) == 4 ? 1e-5 : 1e-12) {
  double difference = 0, size = 1e-30;
  for (size_t i = 0; i < found.size(); ++i) {
    difference += (found[i] - expected[i]) * (found[i] - expected[i]);
    size += expected[i] * expected[i];
  }
  const double error = std::sqrt(difference / size);
  const bool right = status == OK && found.size() == expected.size() && error <= tolerance;
  std::printf("%-24s %s  error %.1e  %s\n", kernel, type<T>(), error, right ? "right" : "WRONG");
  failures += !right;
}

// A matrix of which about one weight in three is there, in CSR and with zeros.
template <class T, class Index>
struct Sparse {
  std::vector<Index> rowptr{0}, columns;
  std::vector<T> values;
  std::vector<double> dense;

  Sparse(int64_t targets, int64_t sources) : dense(targets * sources) {
    for (int64_t v = 0; v < targets; ++v) {
      for (int64_t u = 0; u < sources; ++u)
        if (generator() % 3 == 0 && v != targets / 2) {
          columns.push_back(Index(u));
          values.push_back(numbers<T>(1)[0]);
          dense[v * sources + u] = values.back();
        }
      rowptr.push_back(Index(columns.size()));
    }
  }
  Edges<T, Index> edges() const { return {rowptr.data(), columns.data(), values.data(), int64_t(columns.size())}; }
  // The values that a dense matrix has where this one has edges.
  std::vector<double> at_edges(const std::vector<double> &matrix) const {
    const int64_t targets = rowptr.size() - 1, sources = matrix.size() / targets;
    std::vector<double> found;
    for (int64_t v = 0; v < targets; ++v)
      for (Index e = rowptr[v]; e < rowptr[v + 1]; ++e) found.push_back(matrix[v * sources + columns[e]]);
    return found;
  }
};

template <class T, class Index>
void products(int64_t targets, int64_t sources, int64_t features) {
  const Sparse<T, Index> matrix(targets, sources);
  const auto z = numbers<T>(sources * features), received = numbers<T>(targets * features);
  std::vector<double> expected(targets * features), gradient(targets * sources);
  for (int64_t v = 0; v < targets; ++v)
    for (int64_t u = 0; u < sources; ++u)
      for (int64_t f = 0; f < features; ++f) {
        expected[v * features + f] += matrix.dense[v * sources + u] * z[u * features + f];
        gradient[v * sources + u] += double(received[v * features + f]) * z[u * features + f];
      }
  const int64_t half = sources / 2, sizes[] = {half, sources - half};
  const T *pieces[] = {z.data(), z.data() + half * features};
  const Rows<T> rows(2, sizes, pieces, features);
  std::vector<T> out(targets * features), sampled(matrix.columns.size());
  report("sparse_product", sparse_product(2, targets, features, rows, matrix.edges(), out.data()), out, expected);
  const int status = sampled_product(2, targets, features, received.data(), rows, matrix.edges(), sampled.data());
  report("sampled_product", status, sampled, matrix.at_edges(gradient));
}

template <class T, class Index>
void linear(int64_t batch, int64_t inputs, int64_t outputs) {
  const Sparse<T, Index> matrix(outputs, inputs);
  const auto x = numbers<T>(batch * inputs), bias = numbers<T>(outputs), grad = numbers<T>(batch * outputs);
  std::vector<double> expected(batch * outputs), gradient(outputs * inputs);
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t v = 0; v < outputs; ++v) {
      double sum = bias[v];
      for (int64_t u = 0; u < inputs; ++u) {
        sum += matrix.dense[v * inputs + u] * x[b * inputs + u];
        gradient[v * inputs + u] += double(grad[b * outputs + v]) * x[b * inputs + u];
      }
      expected[b * outputs + v] = std::max(sum, 0.0);
    }
  std::vector<T> out(batch * outputs), values_grad(matrix.columns.size());
  const Finish<T> finish{bias.data(), nullptr, true};
  report("sparse_linear", sparse_linear(2, batch, inputs, outputs, x.data(), matrix.edges(), finish, out.data()), out, expected);
  const int status = sampled_linear(
      2, batch, inputs, outputs, grad.data(), x.data(), matrix.edges(), static_cast<const Index *>(nullptr), values_grad.data());
  report("sampled_linear", status, values_grad, matrix.at_edges(gradient));
}

template <class T, class Index>
void convolutions(
    int64_t batch, int64_t inputs, int64_t outputs, int64_t groups, int64_t size, int64_t kernel, int64_t stride,
    int64_t padding, int64_t dilation) {
  const int64_t out_size = (size + 2 * padding - dilation * (kernel - 1) - 1) / stride + 1, maps = out_size * out_size;
  const int64_t per_group = inputs / groups, places = kernel * kernel, sources = per_group * places;
  const Sparse<T, Index> matrix(outputs, sources);
  const auto x = numbers<T>(batch * inputs * size * size), grad = numbers<T>(batch * outputs * maps);
  std::vector<double> expected(grad.size()), x_expected(x.size()), gradient(outputs * sources);
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t v = 0; v < outputs; ++v)
      for (int64_t u = 0; u < sources; ++u)
        for (int64_t p = 0; p < maps; ++p) {
          const int64_t channel = v / (outputs / groups) * per_group + u / places;
          const int64_t i = p / out_size * stride - padding + u % places / kernel * dilation;
          const int64_t j = p % out_size * stride - padding + u % kernel * dilation;
          if (i < 0 || j < 0 || i >= size || j >= size) continue;
          const int64_t from = ((b * inputs + channel) * size + i) * size + j, to = (b * outputs + v) * maps + p;
          expected[to] += matrix.dense[v * sources + u] * x[from];
          x_expected[from] += matrix.dense[v * sources + u] * grad[to];
          gradient[v * sources + u] += double(grad[to]) * x[from];
        }
  const int64_t from[] = {size, size}, to[] = {out_size, out_size};
  const int64_t window[] = {kernel, kernel, stride, stride, padding, padding, dilation, dilation};
  const auto layer = layer_convolution(batch, inputs, outputs, groups, from, to, window, matrix.edges());
  std::vector<T> out(grad.size()), x_grad(x.size()), values_grad(matrix.columns.size());
  report("sparse_convolution", layer.forward(2, x.data(), Finish<T>{nullptr, nullptr, false}, out.data()), out, expected);
  const int status = convolution_grad(2, layer, grad.data(), x.data(), x_grad.data(), values_grad.data());
  report("sparse_convolution_grad, x", status, x_grad, x_expected);
  report("sparse_convolution_grad, w", status, values_grad, matrix.at_edges(gradient));
}

template <class T>
void exchange() {
  constexpr int64_t first = 21, middle = 3, last = 37;
  const auto from = numbers<T>(first * middle * last);
  std::vector<T> to(from.size());
  std::vector<double> expected(from.size());
  for (int64_t f = 0; f < first; ++f)
    for (int64_t m = 0; m < middle; ++m)
      for (int64_t l = 0; l < last; ++l) expected[(l * middle + m) * first + f] = from[(f * middle + m) * last + l];
  report("exchanged", exchanged(2, first, middle, last, from.data(), to.data()), to, expected);
}

template <class T>
void select() {
  constexpr int64_t count = 40000, k = 1234;
  auto weight = numbers<T>(count);
  for (int64_t i = 0; i < count; i += 5) weight[i] = weight[0];  // ties
  std::vector<int64_t> order(count);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return std::abs(weight[a]) > std::abs(weight[b]); });
  std::sort(order.begin(), order.begin() + k);
  std::vector<int64_t> out(k), found(4);
  const int64_t low = int64_t(magnitude(T(0.1))), high = int64_t(magnitude(T(9)));
  const int status = largest(2, count, k, low, high, weight.data(), out.data(), found.data());
  report("largest", status, std::vector<T>(out.begin(), out.end()), std::vector<double>(order.begin(), order.begin() + k));
}

// norm → ReLU → 3×3 convolution of one channel each, images last.
template <class T>
void node_functions(int64_t norm, int64_t stride) {
  constexpr int64_t nodes = 3, side = 5, batch = 11, places = side * side;
  const int64_t out_side = (side + stride - 1) / stride;
  const auto scale = numbers<T>(nodes), shift = numbers<T>(nodes), kernel = numbers<T>(nodes * 9);
  const auto x = numbers<T>(nodes * places * batch), grad = numbers<T>(nodes * out_side * out_side * batch);
  const auto plain = [&](const std::vector<double> &z) {
    std::vector<double> out(grad.size());
    for (int64_t n = 0; n < nodes; ++n)
      for (int64_t b = 0; b < batch; ++b) {
        double mean = 0, variance = 0;
        const int64_t from = norm == BATCH ? 0 : b, to = norm == BATCH ? batch : b + 1;
        const double count = double(places * (to - from));
        for (int64_t p = 0; p < places; ++p)
          for (int64_t i = from; i < to; ++i) mean += z[(n * places + p) * batch + i] / count;
        for (int64_t p = 0; p < places; ++p)
          for (int64_t i = from; i < to; ++i) variance += std::pow(z[(n * places + p) * batch + i] - mean, 2) / count;
        for (int64_t p = 0; p < out_side * out_side; ++p)
          for (int64_t k = 0; k < 9; ++k) {
            const int64_t i = p / out_side * stride + k / 3 - 1, j = p % out_side * stride + k % 3 - 1;
            if (i < 0 || j < 0 || i >= side || j >= side) continue;
            const double normed = (z[(n * places + i * side + j) * batch + b] - mean) / std::sqrt(variance + 1e-5);
            out[(n * out_side * out_side + p) * batch + b] +=
                kernel[n * 9 + k] * std::max(scale[n] * normed + shift[n], 0.0);
          }
      }
    return out;
  };
  std::vector<T> mean(nodes * batch), variance(nodes * batch), out(grad.size()), x_grad(x.size());
  std::vector<T> scale_grad(nodes), shift_grad(nodes), kernel_grad(nodes * 9);
  const TrainedFunction<T> f{nodes, side,     side,         batch,        norm,          1,           stride,
                             1e-5,  x.data(), scale.data(), shift.data(), kernel.data(), mean.data(), variance.data()};
  const auto forward = [&](int64_t node, T *scratch) { f.forward(node, scratch, out.data()); };
  const int status = f.each_node(2, f.forward_room(), forward);
  const std::vector<double> wide(x.begin(), x.end());
  report("node_function", status, out, plain(wide));
  f.each_node(2, f.backward_room(), [&](int64_t node, T *scratch) {
    f.backward(node, grad.data(), scratch, x_grad.data(), scale_grad.data(), shift_grad.data(), kernel_grad.data());
  });
  // Against differences of the plain loop; those are right to about 1e-8 where no ReLU opens or closes.
  double difference = 0, size = 0;
  for (int64_t at = 0; at < int64_t(x.size()); at += 17) {
    double sides[2] = {};
    for (int side_of = 0; side_of < 2; ++side_of) {
      std::vector<double> moved = wide;
      moved[at] += side_of ? 1e-6 : -1e-6;
      const std::vector<double> values = plain(moved);
      for (size_t i = 0; i < values.size(); ++i) sides[side_of] += values[i] * grad[i];
    }
    const double slope = (sides[1] - sides[0]) / 2e-6;
    difference += std::pow(slope - x_grad[at], 2);
    size += slope * slope;
  }
  const bool right = std::sqrt(difference / size) < 1e-4;
  std::printf("%-24s %s  error %.1e  %s\n", "node_function_grad", type<T>(), std::sqrt(difference / size), right ? "right" : "WRONG");
  failures += !right;
}

// States as they are, or of so many bits; integers of 8 bits have units.
template <class T, class Index>
void static_graphs(int64_t bits) {
  constexpr int64_t batch = 2, side = 9, sizes[] = {4, 6, 5}, strides[] = {1, 2, 0}, small = 5, functions = 10;
  const auto x = numbers<T>(batch * sizes[0] * side * side);
  const auto scale = numbers<T>(functions), shift = numbers<T>(functions), kernel = numbers<T>(functions * 9);
  const std::vector<T> unit(sizes[0] + sizes[1] + sizes[2], T(0.05));
  const auto rounded = [&](double state) {
    return bits == 8 ? unit[0] * std::clamp(std::round(state / unit[0]), -127.0, 127.0) : state;
  };
  // Edges to the second block come from the first, those to the third from the second, whose maps have its size.
  const Sparse<T, Index> second(sizes[1], sizes[0]), third(sizes[2], sizes[1]);
  Sparse<T, Index> all(0, 0);
  all.rowptr = second.rowptr, all.columns = second.columns, all.values = second.values;
  for (size_t v = 1; v < third.rowptr.size(); ++v) all.rowptr.push_back(Index(second.columns.size() + third.rowptr[v]));
  for (Index column : third.columns) all.columns.push_back(Index(column + sizes[0]));
  all.values.insert(all.values.end(), third.values.begin(), third.values.end());
  const auto function = [&](const std::vector<double> &map, int64_t node, int64_t stride) {
    const int64_t out_side = (side + stride - 1) / stride;
    std::vector<double> out(out_side * out_side);
    for (int64_t p = 0; p < out_side * out_side; ++p)
      for (int64_t k = 0; k < 9; ++k) {
        const int64_t i = p / out_side * stride + k / 3 - 1, j = p % out_side * stride + k % 3 - 1;
        if (i >= 0 && j >= 0 && i < side && j < side)
          out[p] += kernel[node * 9 + k] * std::max(scale[node] * map[i * side + j] + shift[node], 0.0);
      }
    for (double &state : out) state = rounded(state);
    return out;
  };
  const auto received = [](const std::vector<std::vector<double>> &states, const Sparse<T, Index> &matrix, int64_t target) {
    std::vector<double> sum(states[0].size());
    for (size_t u = 0; u < states.size(); ++u)
      for (size_t p = 0; p < sum.size(); ++p) sum[p] += matrix.dense[target * states.size() + u] * states[u][p];
    return sum;
  };
  std::vector<double> expected;
  for (int64_t b = 0; b < batch; ++b) {
    std::vector<std::vector<double>> first, middle;
    for (int64_t u = 0; u < sizes[0]; ++u) {
      const T *map = x.data() + (b * sizes[0] + u) * side * side;
      first.push_back(function(std::vector<double>(map, map + side * side), u, 1));
    }
    for (int64_t v = 0; v < sizes[1]; ++v) middle.push_back(function(received(first, second, v), sizes[0] + v, 2));
    for (int64_t v = 0; v < sizes[2]; ++v) {
      const std::vector<double> map = received(middle, third, v);
      expected.insert(expected.end(), map.begin(), map.end());
    }
  }
  std::vector<T> out(batch * sizes[2] * small * small);
  Graph<T> graph;
  graph.sizes.assign(sizes, sizes + 3);
  graph.strides.assign(strides, strides + 3);
  int status = pack_edges<T, Index>(graph, all.edges(), scale.data(), shift.data(), kernel.data(), nullptr, bits == 8 ? unit.data() : nullptr);
  if (status == OK) {
    const std::unique_ptr<AnyPlan> plan(new_plan(std::move(graph), bits));
    status = static_cast<PlanOf<T> *>(plan.get())->run(2, batch, side, side, x.data(), out.data());
  }
  report("static_graph", status, out, expected, bits == 8 ? 3e-3 : bits == 16 ? 1e-2 : sizeof(T) == 4 ? 1e-5 : 1e-12);
}

template <class T, class Index>
void with_edges() {
  for (int64_t features : {1, 3, 16, 61, 200}) products<T, Index>(9, 14, features);
  for (int64_t batch : {1, 2, 16, 37}) {
    linear<T, Index>(batch, 40, 21);
    linear<T, Index>(batch, 7, 33);
  }
  convolutions<T, Index>(3, 6, 9, 1, 8, 1, 1, 0, 1);
  convolutions<T, Index>(3, 6, 9, 3, 7, 3, 1, 1, 1);
  convolutions<T, Index>(3, 6, 8, 2, 11, 3, 2, 1, 1);
  convolutions<T, Index>(2, 4, 4, 4, 9, 2, 3, 0, 2);
  convolutions<T, Index>(2, 4, 6, 1, 6, 1, 2, 0, 1);
  for (int64_t bits : {0, 16, 8})
    if (!bits || sizeof(T) == 4) static_graphs<T, Index>(bits);
}

template <class T>
void all() {
  with_edges<T, int32_t>();
  with_edges<T, int64_t>();
  exchange<T>();
  select<T>();
  for (int64_t norm : {BATCH, INSTANCE})
    for (int64_t stride : {1, 2}) node_functions<T>(norm, stride);
}

}  // namespace

int main() {
  all<float>();
  all<double>();
  std::printf("%d wrong\n", failures);
  return failures != 0;
}
