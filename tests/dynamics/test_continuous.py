import copy
import re
from functools import partial

import pytest
import torch
from dynamic_reference import (
    NORMS,
    Changed,
    Timed,
    all_pairs,
    dense_adjacency,
    euler,
    plain_norm_relu_conv,
    plain_timed,
    product,
    runge_kutta,
)
from pairs import rest_is_slow
from reference import relative_error
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call, grad, jvp, vmap
from torchdiffeq import odeint
from waits import Waits

from dnw_graph import DNW, Continuous, InputError, NeuralGraph
from dnw_graph.node_functions import NormReluConv
from dnw_graph.propagation import BlockPropagation, MessagePassingPropagation

N, INPUTS, OUTPUTS, K = 6, 2, 3, 20
PAIRS = all_pairs(N)
ADAPTIVE = ["dopri8", "dopri5", "bosh3", "fehlberg2", "adaptive_heun", "scipy_solver"]
FIXED_STEP = ["euler", "midpoint", "heun2", "heun3", "rk4", "explicit_adams", "implicit_adams", "fixed_adams"]
PROPAGATIONS = {
    "block": BlockPropagation(),
    "edge_index": MessagePassingPropagation("edge_index"),
    "csr": MessagePassingPropagation("csr"),
}


def make_graph(dynamics, function=Timed, **options):
    options = {"num_nodes": N, "num_inputs": INPUTS, "num_outputs": OUTPUTS, "num_edges": K} | options
    graph = NeuralGraph(dynamics=dynamics, node_function=function, **options).double()
    with torch.no_grad():
        for p in graph.dynamics.parameters():
            p.uniform_(-1, 1)
    return graph


@pytest.fixture
def x():
    return torch.randn(3, INPUTS, dtype=torch.float64)


def twin(graph):
    """The dense adjacency and the parameters of the node function, as leaves."""
    matrix = dense_adjacency(N, PAIRS, graph.candidates.weight, graph.num_edges).requires_grad_()
    p = {name: p.detach().clone().requires_grad_() for name, p in graph.dynamics.node_function.named_parameters()}
    return matrix, p


def augmented(x):
    """Zeros for all nodes that are no inputs: Equation 10."""
    return torch.cat([x, torch.zeros(x.size(0), N - INPUTS, *x.shape[2:], dtype=x.dtype)], dim=1)


def compare(graph, x, plain, tolerance):
    """Outputs and all gradients of a graph against ``plain(matrix, p, start)``, the states of all nodes at the end.

    The gradient of a dense adjacency is ∫⟨Z_u, ∂L/∂I_v⟩ for every pair, those with a zero in the adjacency included.
    """
    matrix, p = twin(graph)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    found, expected = graph(inputs[0]), plain(matrix, p, augmented(inputs[1]))[:, -OUTPUTS:]
    assert relative_error(found, expected) < tolerance
    (found**3 + found).sum().backward()
    (expected**3 + expected).sum().backward()
    assert relative_error(inputs[0].grad, inputs[1].grad) < tolerance
    gradients = {name: parameter.grad for name, parameter in graph.named_parameters()}
    assert relative_error(gradients.pop("candidates.weight"), matrix.grad.flatten()) < tolerance
    assert set(gradients) == {f"dynamics.node_function.{name}" for name in p}
    for name, parameter in p.items():
        assert relative_error(gradients[f"dynamics.node_function.{name}"], parameter.grad) < tolerance
    hallucinated = matrix == 0
    assert int(hallucinated.sum()) == N * N - K
    assert matrix.grad[hallucinated].abs().max() > 0.01


@pytest.mark.parametrize("propagation", PROPAGATIONS)
def test_equation_13_by_a_plain_loop_of_euler_steps(propagation, x):
    dynamics = Continuous("euler", options={"step_size": 0.05}, t_span=(0.2, 1.2))
    graph = make_graph(dynamics, propagation=PROPAGATIONS[propagation])

    def plain(matrix, p, start):
        return euler(lambda t, z: plain_timed(p, product(matrix, z), t), start, (0.2, 1.2), 20)[-1]

    compare(graph, x, plain, 1e-10)


@pytest.mark.parametrize("propagation", PROPAGATIONS)
def test_equation_13_by_a_plain_loop_of_runge_kutta_steps(propagation, x):
    graph = make_graph(Continuous(rtol=1e-9, atol=1e-9), propagation=PROPAGATIONS[propagation])

    def plain(matrix, p, start):
        return runge_kutta(lambda t, z: plain_timed(p, product(matrix, z), t), start, (0, 1), 60)

    compare(graph, x, plain, 1e-6)


@pytest.mark.parametrize("norm", NORMS)
def test_maps_and_the_papers_node_function_by_a_plain_loop(norm, digits):
    x = digits[0][:4].view(2, INPUTS, 8, 8)
    graph = make_graph(Continuous("euler", options={"step_size": 0.25}), partial(NormReluConv, norm=norm))

    def plain(matrix, p, start):
        return euler(lambda t, z: plain_norm_relu_conv(p, norm, product(matrix, z)), start, (0, 1), 4)[-1]

    compare(graph, x, plain, 1e-10)


@pytest.mark.parametrize("method", ["dopri5", "adaptive_heun", "rk4", "implicit_adams"])
def test_the_same_solver_on_a_dense_adjacency(method, x):
    options = {} if method in ADAPTIVE else {"step_size": 0.1}
    graph = make_graph(Continuous(method, options=options))

    def plain(matrix, p, start):
        def field(t, z):
            return plain_timed(p, product(matrix, z), t)

        ends = torch.tensor([0, 1], dtype=torch.float64)
        return odeint(field, start, ends, method=method, rtol=1e-3, atol=1e-3, options=options)[-1]

    compare(graph, x, plain, 1e-9)


@pytest.mark.parametrize("method", [*ADAPTIVE, *FIXED_STEP])
def test_every_solver_on_a_linear_graph_in_closed_form(method, x):
    # Without node functions the solution is exp(A t) Z(0), and that gives the gradient of every candidate too.
    options = {} if method in ADAPTIVE else {"step_size": 0.02}
    graph = make_graph(Continuous(method, rtol=1e-5, atol=1e-5, options=options), nn.Identity())
    if method == "scipy_solver":
        matrix, _ = twin(graph.eval())
        expected = product(torch.matrix_exp(matrix), augmented(x))[:, -OUTPUTS:]
        assert relative_error(graph(x), expected) < 1e-3
    else:
        tolerance = 2e-2 if method == "euler" else 1e-2
        compare(graph, x, lambda matrix, p, start: product(torch.matrix_exp(matrix), start), tolerance)
    assert graph.dynamics.num_evaluations > 0


@pytest.mark.parametrize("t_span", [(0.0, 2.0), (1.0, -0.5), (-1.0, 0.5)])
def test_closed_form_over_any_span(t_span, x):
    graph = make_graph(Continuous(rtol=1e-10, atol=1e-10, t_span=t_span), nn.Identity())
    duration = t_span[1] - t_span[0]
    compare(graph, x, lambda matrix, p, start: product(torch.matrix_exp(duration * matrix), start), 1e-7)


@pytest.mark.parametrize("adjoint", [False, True])
def test_outputs_at_several_times(adjoint, x):
    graph = make_graph(Continuous(rtol=1e-9, atol=1e-9, adjoint=adjoint), nn.Identity())
    matrix, _ = twin(graph)
    for times in ([0.3, 0.5, 2.0], [-0.5, -1.0], torch.tensor([0.25])):
        states = graph(x, times=times)
        expected = [product(torch.matrix_exp(float(t) * matrix), augmented(x))[:, -OUTPUTS:] for t in times]
        assert states.shape == (3, len(times), OUTPUTS)
        assert relative_error(states, torch.stack(expected, dim=1)) < 1e-7
    (gradient,) = torch.autograd.grad(graph(x, times=[0.3, 1.0]).sum(), [graph.candidates.weight])
    plain = sum(product(torch.matrix_exp(t * matrix), augmented(x))[:, -OUTPUTS:].sum() for t in (0.3, 1.0))
    (expected,) = torch.autograd.grad(plain, [matrix])
    assert relative_error(gradient, expected.flatten()) < 1e-6


class Watching(BlockPropagation):
    """Keeps the states that are propagated."""

    def __init__(self):
        super().__init__()
        self.sent = []

    def forward(self, edges, x):
        plain = super().forward(edges, x)

        def product(number, z, rows, columns):
            self.sent.append(z.detach().clone())
            return plain.product(number, z, rows, columns)

        recording = copy.copy(plain)
        recording.product = product
        return recording


def test_nodes_other_than_the_inputs_start_at_zero(digits):
    graph = make_graph(Continuous(), propagation=Watching())
    maps = digits[0][:4].view(2, INPUTS, 8, 8)
    graph(maps)
    first, last = graph.propagation.sent[0], graph.propagation.sent[-1]
    assert torch.equal(first[:, :INPUTS], maps)
    assert not first[:, INPUTS:].any()
    assert last[:, INPUTS:].any()


def test_without_further_nodes_it_is_a_plain_neural_ode(x):
    graph = make_graph(Continuous(rtol=1e-9, atol=1e-9), num_nodes=INPUTS, num_outputs=INPUTS, num_edges=3)
    matrix = dense_adjacency(INPUTS, all_pairs(INPUTS), graph.candidates.weight, 3)
    p = dict(graph.dynamics.node_function.named_parameters())
    expected = runge_kutta(lambda t, z: plain_timed(p, product(matrix, z), t), x, (0, 1), 60)
    assert relative_error(graph(x), expected) < 1e-7


def count_calls(graph):
    calls = []
    graph.dynamics.node_function.register_forward_pre_hook(lambda module, args: calls.append(1))
    return calls


@pytest.mark.parametrize("method", ["dopri5", "euler", "rk4", "scipy_solver"])
def test_evaluations_are_counted_per_forward_pass(method, x):
    graph = make_graph(Continuous(method, options={} if method in ADAPTIVE else {"step_size": 0.1})).eval()
    calls = count_calls(graph)
    for _ in range(2):
        calls.clear()
        graph(x)
        assert graph.dynamics.num_evaluations == len(calls) > 0
        assert graph.dynamics.num_backward_evaluations == 0
    # One evaluation per step of Euler's method, four per step of Runge and Kutta's.
    assert {"euler": 10, "rk4": 40}.get(method, len(calls)) == len(calls)


def test_evaluations_of_the_adjoint_are_counted_apart(x):
    graph = make_graph(Continuous("rk4", options={"step_size": 0.1}, adjoint=True))
    calls = count_calls(graph)
    out = graph(x)
    forward = len(calls)
    assert graph.dynamics.num_evaluations == forward == 40
    out.sum().backward()
    assert graph.dynamics.num_evaluations == forward
    assert graph.dynamics.num_backward_evaluations == len(calls) - forward >= 40
    graph(x)
    assert (graph.dynamics.num_evaluations, graph.dynamics.num_backward_evaluations) == (40, 0)


class Counting(DNW):
    """Counts how often edges are chosen."""

    calls = 0

    def choose(self, view):
        self.calls += 1
        return super().choose(view)


@pytest.mark.parametrize("adjoint", [False, True])
def test_the_edges_are_chosen_once_per_forward_pass(adjoint, x):
    graph = make_graph(Continuous(adjoint=adjoint), wiring=Counting())
    for passes in (1, 2):
        graph(x).sum().backward()
        assert graph.dynamics.num_evaluations > 1
        assert graph.wiring.calls == passes


@pytest.mark.parametrize("propagation", PROPAGATIONS)
@pytest.mark.parametrize("wiring", ["dnw", "random_graph"])
def test_the_adjoint_gives_the_gradient_of_backpropagation(wiring, propagation, x):
    results = []
    for adjoint in (False, True):
        torch.manual_seed(1)
        dynamics = Continuous(rtol=1e-8, atol=1e-8, adjoint=adjoint)
        graph = make_graph(dynamics, wiring=wiring, propagation=PROPAGATIONS[propagation])
        inputs = x.clone().requires_grad_()
        out = graph(inputs)
        (out**3 + out).sum().backward()
        assert (graph.dynamics.num_backward_evaluations > 0) == adjoint
        results.append([inputs.grad, *(p.grad for p in graph.parameters())])
    for backpropagation, adjoint in zip(*results, strict=True):
        assert relative_error(adjoint, backpropagation) < 1e-4
        # No candidate and no node lacks its gradient.
        assert torch.equal(adjoint != 0, backpropagation != 0)
    real = torch.zeros(N * N, dtype=torch.bool)
    real[graph.real_index] = True
    gradient = graph.candidates.weight.grad
    assert gradient[real].all()
    assert gradient[~real].all() if wiring == "dnw" else not gradient[~real].any()


def test_the_adjoint_of_weights_that_are_not_trained(x):
    graph = make_graph(Continuous(rtol=1e-9, atol=1e-9, adjoint=True), nn.Identity())
    graph.candidates.weight.requires_grad_(False)
    inputs = x.clone().requires_grad_()
    graph(inputs).sum().backward()
    matrix, _ = twin(graph)
    expected = torch.matrix_exp(matrix)[-OUTPUTS:, :INPUTS].sum(0).expand(3, -1)
    assert relative_error(inputs.grad, expected) < 1e-7
    assert graph.candidates.weight.grad is None


def test_options_of_the_adjoint_reach_its_solver(x):
    counts = []
    for options in ({}, {"adjoint_method": "euler", "adjoint_options": {"step_size": 0.5}}):
        graph = make_graph(Continuous(rtol=1e-8, atol=1e-8, adjoint=True, adjoint_options=options))
        graph(x).sum().backward()
        counts.append(graph.dynamics.num_backward_evaluations)
    assert counts[1] < 5 < counts[0]


def saved_values(adjoint, step_size, x):
    """Numbers kept for the backward pass."""
    saved = []
    graph = make_graph(Continuous("rk4", options={"step_size": step_size}, adjoint=adjoint))
    with saved_tensors_hooks(lambda tensor: saved.append(tensor.numel()) or tensor, lambda tensor: tensor):
        graph(x)
    return sum(saved)


def test_the_memory_of_the_adjoint_does_not_grow_with_the_steps(x):
    assert saved_values(True, 0.01, x) == saved_values(True, 0.1, x)
    assert saved_values(False, 0.01, x) > 5 * saved_values(False, 0.1, x)


def test_scipy_cannot_train_without_the_adjoint(x):
    graph = make_graph(Continuous("scipy_solver"), name="ode")
    with pytest.raises(InputError, match="ode: scipy_solver computes outside PyTorch and yields no gradient; train wi"):
        graph(x)
    with torch.no_grad():
        graph(x)
    graph = make_graph(Continuous("scipy_solver", rtol=1e-8, atol=1e-8, adjoint=True), nn.Identity())
    matrix, _ = twin(graph)
    product(torch.matrix_exp(matrix), augmented(x))[:, -OUTPUTS:].sum().backward()
    graph(x).sum().backward()
    assert relative_error(graph.candidates.weight.grad, matrix.grad.flatten()) < 1e-5


def test_unknown_solvers_come_with_near_ones():
    with pytest.raises(InputError, match="unknown solver 'dopri6': did you mean 'dopri8' or 'dopri5'"):
        Continuous("dopri6")
    with pytest.raises(InputError, match=r"unknown solver 'zzz': known are 'adaptive_heun', .*'scipy_solver'"):
        Continuous("zzz")


@pytest.mark.parametrize(
    "t_span", [(0.0, 0.0), (0.0,), (), (0.0, 0.5, 1.0), (0.0, float("nan")), (0.0, float("inf")), (-float("inf"), 0.0)]
)
def test_spans_that_are_no_span_are_refused(t_span):
    with pytest.raises(
        InputError, match=r"t_span must be (two different times, start and end|a sequence of finite numbers); got"
    ):
        Continuous(t_span=t_span)


@pytest.mark.parametrize("times", [[0.0], [0.5, 0.5], [0.5, 0.2], [-0.5, 0.5], [0.5, float("nan")]])
def test_times_that_do_not_move_on_are_refused(times, x):
    graph = make_graph(Continuous(), name="ode")
    with pytest.raises(
        InputError,
        match=r"ode: times must (increase .* t = 0.0|be a sequence of finite numbers); got \[",
    ):
        graph(x, times=times)


def test_unknown_options_are_refused(x):
    with pytest.raises(InputError, match="unknown options return_states; known is times"):
        make_graph(Continuous())(x, return_states=True)


class Square(nn.Module):
    def forward(self, z):
        return z**2


def exploding(dynamics):
    """One node with a self-loop of weight 3: ż = (3 z)²."""
    graph = NeuralGraph(
        num_nodes=1, num_inputs=1, num_outputs=1, node_function=Square(), dynamics=dynamics, name="ode"
    ).double()
    graph.candidates.weight.data.fill_(3.0)
    return graph


@pytest.mark.parametrize(("method", "adjoint"), rest_is_slow([("dopri5", False), ("dopri5", True), ("dopri8", False)]))
def test_adaptive_solvers_report_where_the_solution_blows_up(method, adjoint):
    # z(t) = 1 / (1/z(0) - 9 t) with z(0) = 0.5 leaves the finite numbers at t = 2/9.
    graph = exploding(Continuous(method, adjoint=adjoint))
    with pytest.raises(InputError) as caught:
        graph(torch.tensor([[0.5]], dtype=torch.float64))
    message = str(caught.value)
    assert message.startswith(f"ode: {method} failed at t = ")
    assert float(re.search("at t = ([0-9.e-]+)", message)[1]) == pytest.approx(2 / 9, rel=0.02)
    assert "(underflow in dt" in message
    assert "lower the learning rate, bound the node function (a norm, tanh), loosen rtol and atol, or" in message
    assert "\n" not in message


@pytest.mark.parametrize("adjoint", [False, True])
@pytest.mark.parametrize("method", ["euler", "rk4", "explicit_adams"])
def test_solvers_with_fixed_steps_report_that_the_solution_blew_up(method, adjoint):
    graph = exploding(Continuous(method, options={"step_size": 0.05}, adjoint=adjoint))
    start = torch.tensor([[0.5]], dtype=torch.float64)
    with pytest.raises(InputError, match=rf"^ode: {method} failed at t = 2 \(the state is not finite\); .* smaller"):
        graph(start, times=[0.1, 2.0, 3.0])
    # From z(0) = 0 nothing happens.
    assert torch.equal(graph(0 * start), 0 * start)


@pytest.mark.parametrize("method", ["dopri5", "euler"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_inputs_that_are_no_numbers_are_named_as_the_cause(method, value, x):
    x[1, 0] = value
    with pytest.raises(InputError, match=r"^ode: the inputs of the graph are NaN or infinite"):
        make_graph(Continuous(method), name="ode")(x)


def test_a_field_that_is_no_number_is_reported_with_the_time(x):
    graph = make_graph(Continuous(t_span=(0.25, 1.0)), name="ode")
    with torch.no_grad():
        next(graph.dynamics.parameters()).fill_(float("nan"))
    with pytest.raises(InputError, match=r"^ode: dopri5 failed at t = 0.25 \(underflow in dt"):
        graph(x)


def test_a_loss_that_is_no_number_is_reported_with_the_time_at_which_the_adjoint_started(x):
    loss = make_graph(Continuous(adjoint=True, t_span=(0.25, 0.75)), name="ode")(x).sum() * float("nan")
    with pytest.raises(InputError, match=r"^ode: dopri5 failed at t = 0.75 \(the state is not finite, solved back"):
        loss.backward()


def test_no_images_give_nothing_or_are_named_as_the_cause(x):
    assert make_graph(Continuous("rk4"))(x[:0]).shape == (0, OUTPUTS)
    with pytest.raises(InputError, match=r"^ode: the batch is empty, so that dopri5 cannot choose its steps"):
        make_graph(Continuous(), name="ode")(x[:0])


@pytest.mark.parametrize("tolerances", [{"rtol": -1e-3}, {"atol": 0.0}, {"atol": -1.0}, {"rtol": float("nan")}])
def test_tolerances_that_are_none_are_refused(tolerances):
    with pytest.raises(InputError, match=r"[ra]tol must be (a number >= 0|a number above 0|a finite number); got"):
        Continuous(**tolerances)


def test_a_tolerance_may_be_absolute_alone(x):
    graph = make_graph(Continuous(rtol=0.0, atol=1e-9), nn.Identity())
    matrix, _ = twin(graph)
    assert relative_error(graph(x), product(torch.matrix_exp(matrix), augmented(x))[:, -OUTPUTS:]) < 1e-6


def test_times_are_rounded_on_the_cpu(x, monkeypatch):
    """Some devices have no float64."""
    graph, grids = make_graph(Continuous()).float().to("meta"), []

    def solve(self, field, z, grid):
        grids.append(grid)
        return z.expand(len(grid) - 1, *z.shape)

    monkeypatch.setattr(Continuous, "_solve", solve)
    make = torch.tensor

    def tensor(*args, **options):
        assert options.get("dtype") is not torch.float64 or options["device"] == "cpu"
        return make(*args, **options)

    monkeypatch.setattr(torch, "tensor", tensor)
    graph(x.float().to("meta"), times=[0.1, 0.7])
    assert (grids[0].device.type, grids[0].dtype, len(grids[0])) == ("meta", torch.float32, 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("adjoint", [False, True])
def test_under_autocast_the_solver_computes_in_single_precision(dtype, adjoint, x):
    graph = make_graph(Continuous(adjoint=adjoint), nn.Tanh()).float()
    expected = graph(x.to(dtype).float())
    evaluations = graph.dynamics.num_evaluations
    with torch.autocast("cpu", dtype=dtype):
        out = graph(x.to(dtype))
    out.sum().backward()
    assert out.dtype == torch.float32
    assert graph.dynamics.num_evaluations <= 2 * evaluations
    assert relative_error(out, expected) < 8 * torch.finfo(dtype).eps
    # Without autocast a model has the precision that it was given.
    half = make_graph(Continuous("rk4", adjoint=adjoint), nn.Tanh()).to(dtype)
    assert half(x.to(dtype)).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", ["dopri5", "adaptive_heun"])
def test_adaptive_solvers_refuse_half_precision(dtype, method, x):
    graph = make_graph(Continuous(method), nn.Tanh(), name="ode").to(dtype)
    with pytest.raises(InputError, match=rf"^ode: {method} .* {dtype} .* keep the graph in float32 .*'rk4'$"):
        graph(x.to(dtype))


class Steep(nn.Module):
    def forward(self, z):
        return torch.full_like(z, 3e4)


def test_slopes_are_added_up_in_single_precision_under_autocast(x):
    # Eight slopes, which the solver adds up before it divides by 8, are too much for float16.
    graph = make_graph(Continuous("rk4"), Steep()).float()
    with torch.autocast("cpu", dtype=torch.float16):
        out = graph(x.float())
    assert torch.equal(out, torch.full_like(out, 3e4))


def test_the_host_waits_per_step_not_per_evaluation(x):
    counts = []
    for method in ("euler", "rk4"):
        graph = make_graph(Continuous(method, options={"step_size": 0.1}))
        with Waits() as waits:
            graph(x)
        counts.append(waits.found.count("aten._local_scalar_dense.default"))
    assert graph.dynamics.num_evaluations == 40
    assert counts[0] == counts[1]


@pytest.mark.slow
def test_a_state_that_blows_up_on_the_adjoints_way_back_is_refused_with_the_graph_and_the_time():
    graph = NeuralGraph(
        num_nodes=3,
        num_inputs=3,
        num_outputs=3,
        num_edges=3,
        node_function=nn.Identity(),
        dynamics=Continuous(adjoint=True),
        name="ode",
    ).double()
    with torch.no_grad():
        graph.candidates.weight.zero_()[::4] = -800.0  # decays forwards, explodes backwards
    loss = graph(torch.ones(1, 3, dtype=torch.float64)).sum()
    with pytest.raises(InputError, match=r"ode: dopri5 failed at t = .*solved backwards"):
        loss.backward()


def test_a_norm_of_the_user_sees_states_as_everybody_does():
    shapes, x = set(), torch.randn(20, INPUTS, 3, 4, dtype=torch.float64)

    def norm(states):
        shapes.add(tuple(states.shape))
        return states.pow(2).mean().sqrt()

    results = []
    for options in ({"norm": norm}, {}):
        torch.manual_seed(0)
        results.append(make_graph(Continuous(options=options), propagation="sparse")(x))
    torch.testing.assert_close(*results)
    assert shapes == {(20, N, 3, 4)}


class NormTanh(nn.Module):
    def __init__(self, num_nodes, stride=1):
        super().__init__()
        self.norm = nn.BatchNorm2d(num_nodes)

    def forward(self, z):
        return torch.tanh(self.norm(z))


@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_the_adjoint_leaves_running_statistics_alone(method):
    """A batch is counted once per evaluation of the forward pass; the statistics are those of backpropagation."""
    buffers = []
    for adjoint in (False, True):
        torch.manual_seed(0)
        graph = make_graph(Continuous(method, adjoint=adjoint), NormTanh)
        evaluations = 0
        for seed in range(3):
            x = torch.randn(2, INPUTS, 3, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            graph(x).square().sum().backward()
            evaluations += graph.dynamics.num_evaluations
            assert (graph.dynamics.num_backward_evaluations > 0) == adjoint
        assert graph.dynamics.node_function.norm.num_batches_tracked == evaluations
        buffers.append(list(graph.dynamics.node_function.buffers()))
    assert all(map(torch.equal, *buffers))


def by_torch_func(graph, transform, x):
    """The transform of the outputs' cubes as a function of the parameters, at the parameters."""
    p = {name: value.detach() for name, value in graph.named_parameters()}
    return transform(lambda p, x: functional_call(graph, p, (x,)).pow(3).sum(), p, x)


@pytest.mark.parametrize("method", ["euler", "rk4", "implicit_adams"])
def test_solvers_with_fixed_steps_have_gradients_of_torch_func(method, x):
    graph = make_graph(Continuous(method))
    named = dict(graph.named_parameters())
    expected = torch.autograd.grad(graph(x).pow(3).sum(), list(named.values()))
    found = by_torch_func(graph, lambda f, p, x: grad(f)(p, x), x)
    for name, gradient in zip(named, expected, strict=True):
        assert relative_error(found[name], gradient) < 1e-10
    change = by_torch_func(graph, lambda f, p, x: jvp(lambda p: f(p, x), (p,), (p,)), x)[1]
    assert relative_error(change, sum((a * b).sum() for a, b in zip(expected, named.values(), strict=True))) < 1e-10


@pytest.mark.parametrize(
    ("options", "transform"),
    [
        ({"method": "dopri5"}, lambda f, p, x: grad(f)(p, x)),
        ({"method": "rk4", "adjoint": True}, lambda f, p, x: grad(f)(p, x)),
        ({"method": "rk4"}, lambda f, p, x: vmap(f, (None, 0))(p, x[:, None])),
        ({"method": "rk4"}, lambda f, p, x: vmap(grad(f), (None, 0))(p, x[:, None])),
    ],
)
def test_transforms_that_a_solver_cannot_do_are_refused(options, transform, x):
    graph = make_graph(Continuous(**options), name="ode")
    with pytest.raises(InputError, match=f"^ode: {options['method']} does not work under this transform"):
        by_torch_func(graph, transform, x)


def test_errors_of_a_node_function_outside_of_a_transform_stay_as_they_are(x):
    def fail(z):
        raise RuntimeError("of the node function")

    with pytest.raises(RuntimeError, match="of the node function"):
        make_graph(Continuous("rk4"), Changed(fail))(x)
