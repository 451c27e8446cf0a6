"""attach and the optimisers that people use: each is followed rightly, or refused by name and reason."""

import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dnw_graph import InputError, RigL, SparseMomentum, attach
from dnw_graph.sparse_layers import sparsify, weight_graphs

X = torch.randn(16, 8, generator=torch.Generator().manual_seed(1))
STEPS = 5

FOLLOWED = {
    "SGD": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.05),
    "SGD, Nesterov": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=0.05),
    "SGD, one by one": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, foreach=False),
    "SGD, fused": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.05, fused=True),
    "Adam": lambda p: torch.optim.Adam(p, 0.01, weight_decay=0.05),
    "Adam, fused": lambda p: torch.optim.Adam(p, 0.01, weight_decay=0.05, fused=True),
    "AdamW, AMSGrad": lambda p: torch.optim.AdamW(p, 0.01, amsgrad=True),
    "Adamax": lambda p: torch.optim.Adamax(p, 0.01),
    "NAdam": lambda p: torch.optim.NAdam(p, 0.01, weight_decay=0.05),
    "RAdam": lambda p: torch.optim.RAdam(p, 0.01, weight_decay=0.05),
    "RMSprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.9, weight_decay=0.05),
    "Adagrad": lambda p: torch.optim.Adagrad(p, 0.1, weight_decay=0.05),
    "Adadelta": lambda p: torch.optim.Adadelta(p, weight_decay=0.05),
    "Adafactor": lambda p: torch.optim.Adafactor(p, weight_decay=0.05),
    "ASGD": lambda p: torch.optim.ASGD(p, weight_decay=0.05),
    "Rprop": lambda p: torch.optim.Rprop(p),
    "Muon": lambda p: torch.optim.Muon([each for each in p if each.dim() == 2], 0.02, weight_decay=0.05),
}
WITHOUT_MOMENTUM = ("Adagrad", "Adadelta", "Adafactor", "ASGD", "Rprop")


def make(rule):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    sparsify(model, 0.25, rule)
    return model, list(weight_graphs(model).values())


def train(model, optimiser, steps=STEPS, **options):
    for _ in range(steps):
        optimiser.zero_grad()
        model(X).square().mean().backward(**options)
        optimiser.step()


def follow(make_optimiser, **options):
    """Train with RigL; what is not trained must be zero in weight and state, and the edges must change."""
    model, graphs = make(RigL(every=2, until=100))
    optimiser = make_optimiser(list(model.parameters()))
    attach(model, optimiser, num_steps=100)
    before = [graph.real_index.tolist() for graph in graphs]
    weights = [graph.real_weight.detach().clone() for graph in graphs]
    for number in range(STEPS):
        train(model, optimiser, 1, **options)
        for graph in graphs:
            hallucinated = graph.wiring.real == 0
            view = graph.view(optimizer=optimiser)
            assert graph.wiring.step == number + 1
            assert graph.num_real_edges == graph.num_edges
            assert all((flat[hallucinated] == 0).all() for flat in (view.weight, *view.state.values()))
    for graph, index, weight in zip(graphs, before, weights, strict=True):
        assert graph.real_index.tolist() != index
        assert torch.isfinite(graph.real_weight).all()
        assert not torch.equal(graph.real_weight, weight)


@pytest.mark.parametrize("name", FOLLOWED)
def test_what_is_not_trained_stays_zero_and_every_step_counts(name):
    if not hasattr(torch.optim, name.split(",")[0]):
        pytest.skip(f"PyTorch {torch.__version__} has no {name}")
    follow(FOLLOWED[name])


@pytest.mark.parametrize("name", WITHOUT_MOMENTUM)
def test_what_has_no_momentum_is_refused_where_a_rule_needs_it(name):
    model, _ = make(SparseMomentum(every=2))
    with pytest.raises(InputError, match=f"{name} has no momentum for 0.weight, which SparseMomentum needs: give SGD"):
        attach(model, FOLLOWED[name](list(model.parameters())))


def test_momentum_that_is_promised_and_not_kept_is_missed_at_the_first_step():
    class Averaging(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {"momentum": 0.9})

        def step(self, closure=None):
            pass

    model, _ = make(SparseMomentum(every=100))
    optimiser = Averaging(model.parameters())
    attach(model, optimiser, 100)
    with pytest.raises(InputError, match=r"0\.weight: the optimiser has no momentum, but no state: give SGD"):
        train(model, optimiser, 1)


def test_a_step_that_calls_that_of_its_base_class_counts_once():
    class Own(torch.optim.SGD):
        def step(self, closure=None):
            return super().step(closure)

    torch.optim.SGD([nn.Parameter(torch.ones(1))])  # from now on PyTorch calls hooks in the step of the base class too
    follow(lambda p: Own(p, 0.1, momentum=0.9))


def test_a_step_that_failed_does_not_count_and_the_next_one_does():
    model, (graph, _) = make(RigL(every=2, until=100))
    optimiser = torch.optim.SGD(model.parameters(), 0.1)
    attach(model, optimiser, num_steps=100)

    def fails():
        raise RuntimeError

    with pytest.raises(RuntimeError):
        optimiser.step(fails)
    assert graph.wiring.step == 0
    train(model, optimiser, 3)
    assert graph.wiring.step == 3


class Wrapper(torch.optim.Optimizer):
    """As SAM's authors have it: an optimiser around another one, with the same groups."""

    def __init__(self, base):
        super().__init__(base.param_groups, {})
        self.base_optimizer = base


class Lookahead(Wrapper):
    pass


class Proxy:
    """Something that is used as an optimiser is, and is none."""

    def __init__(self, base):
        self.optimizer = base


def zero(parameters):
    from torch.distributed.optim import ZeroRedundancyOptimizer

    return ZeroRedundancyOptimizer(parameters, torch.optim.SGD, lr=0.1, momentum=0.9)


REFUSED = {
    "LBFGS": (lambda p: torch.optim.LBFGS(p), "LBFGS takes many steps in one"),
    "SAM": (lambda p: Wrapper(torch.optim.SGD(p, 0.1)), r"attach\(model, optimizer\.base_optimizer\)"),
    "Lookahead": (lambda p: Lookahead(torch.optim.SGD(p, 0.1)), "Lookahead keeps weights or state where rules cannot"),
    "ZeRO": (zero, "ZeroRedundancyOptimizer keeps weights or state where rules cannot"),
    "capturable": (lambda p: torch.optim.Adam(p, capturable=True), r"Adam\(capturable=True\) is for steps in a CUDA"),
    "another model's": (lambda p: torch.optim.SGD([nn.Parameter(torch.ones(2))], 0.1), "0.weight is not among the"),
    "one layer's": (lambda p: torch.optim.SGD(p[:2], 0.1), r"2\.weight is not among the parameters"),
    "no optimiser": (lambda p: Proxy(torch.optim.SGD(p, 0.1)), "attach: optimizer must be an Optimizer; got"),
    "two": (lambda p: [torch.optim.SGD(p[:2], 0.1), torch.optim.SGD(p[2:], 0.1)], "optimizer must be an Optimizer"),
}


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("kind", REFUSED)
def test_what_rules_cannot_follow_is_refused_by_name_and_reason(kind, request):
    if kind == "ZeRO":
        request.getfixturevalue("one_rank")
    make_optimiser, message = REFUSED[kind]
    model, graphs = make("rigl")
    with pytest.raises(InputError, match=message) as error:
        attach(model, make_optimiser(list(model.parameters())))
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500
    assert all(graph.updates is None for graph in graphs)


@pytest.mark.parametrize("kind", ["LBFGS", "SAM", "capturable"])
def test_a_rule_that_needs_no_steps_works_with_any_optimiser(kind):
    model, _ = make("dnw")
    attach(model, REFUSED[kind][0](list(model.parameters())))


def test_the_base_of_sam_is_followed():
    model, graphs = make(RigL(every=2, until=100))
    outer = Wrapper(torch.optim.SGD(model.parameters(), 0.1, momentum=0.9))
    attach(model, outer.base_optimizer, num_steps=100)
    for number in range(STEPS):
        model(X).square().mean().backward()
        with torch.no_grad():  # the ascent, a second pass, and back
            moved = [(each, 0.01 * each.grad) for each in model.parameters()]
            for each, way in moved:
                each.add_(way)
        outer.zero_grad()
        model(X).square().mean().backward()
        with torch.no_grad():
            for each, way in moved:
                each.sub_(way)
        outer.base_optimizer.step()
        assert {graph.wiring.step for graph in graphs} == {number + 1}
        assert all((graph.candidate_weight[graph.wiring.real == 0] == 0).all() for graph in graphs)


@pytest.mark.slow
def test_those_of_timm():
    timm = pytest.importorskip("timm.optim")
    names = [name for name in timm.list_optimizers() if not name.startswith(("bnb", "fused"))]  # need packages, a GPU
    for name in names:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            follow(lambda p, name=name: timm.create_optimizer_v2(p, opt=name, lr=0.01), create_graph="hess" in name)
    model, _ = make("rigl")
    with pytest.raises(InputError, match="Lookahead keeps weights or state where rules cannot"):
        attach(model, timm.Lookahead(torch.optim.SGD(model.parameters(), 0.1)))
