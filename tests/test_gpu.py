"""Training on a CUDA device: the numbers of the CPU, without waiting, and as one CUDA graph."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from alone import run_alone
from reference import relative_error
from torch import nn
from torch.sparse import SparseSemiStructuredTensor
from torchvision.models import resnet18

from dnw_graph import InputError, NeuralGraph
from dnw_graph.compaction import export
from dnw_graph.models import MobileNetV1DNW, TinyClassifier
from dnw_graph.sparse_layers import densify, sparsify
from dnw_graph.wirings.two_stage import lottery_ticket

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

MODELS = {
    "mobilenet": lambda: MobileNetV1DNW(0.225, 10, 1),
    "small": lambda: MobileNetV1DNW(0.225, 10, 1, small=True),
    "static": lambda: TinyClassifier("static"),
    "discrete": lambda: TinyClassifier("discrete"),
    "continuous": lambda: TinyClassifier("continuous"),
}


def step(model, images, labels):
    """Loss and gradients of a training step."""
    loss = F.cross_entropy(model(images), labels)
    names = [name for name, _ in model.named_parameters()]
    return {"loss": loss} | dict(zip(names, torch.autograd.grad(loss, list(model.parameters())), strict=True))


def batch(dtype=torch.float32, device="cuda"):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(4, 3, 32, 32, generator=generator).to(device, dtype)
    return images, torch.arange(4, device=device)


@pytest.mark.parametrize("name", MODELS)
def test_a_training_step_has_the_numbers_of_the_cpu(name):
    torch.manual_seed(0)
    model = MODELS[name]().double()
    expected = step(copy.deepcopy(model), *batch(torch.float64, "cpu"))
    found = step(model.cuda(), *batch(torch.float64))
    scale = max(each.norm().item() for each in expected.values())
    for key, value in expected.items():
        assert (found[key].cpu() - value).norm() <= 1e-7 * max(value.norm().item(), 1e-3 * scale), key


def test_the_same_weights_give_the_same_edges():
    torch.manual_seed(0)
    graph = NeuralGraph((64, 128, 128), 1244)
    graph.candidates.weight.data.round_(decimals=2)  # Many ties.
    expected = graph.real_index
    assert torch.equal(graph.cuda().real_index.cpu(), expected)


def sparse_resnet():
    model = resnet18(num_classes=10)
    sparsify(model, 0.2)
    return model


def second_stage():
    model = MobileNetV1DNW(0.225, 10, 1, wiring="complete")
    return lottery_ticket(model, model.state_dict())


WITHOUT_WAITING = {
    **{rule: partial(MobileNetV1DNW, 0.225, 10, 1, wiring=rule) for rule in ("dnw", "no_update", "random_graph")},
    "complete": partial(MobileNetV1DNW, 0.225, 10, 1, wiring="complete"),
    "lottery_ticket": second_stage,
    "sparse ResNet": sparse_resnet,
}


@pytest.mark.parametrize("name", WITHOUT_WAITING)
def test_a_training_step_does_not_wait(name):
    model = WITHOUT_WAITING[name]().cuda()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    images, labels = batch()
    for waiting in ("default", "error"):  # The first step sets libraries up.
        torch.cuda.set_sync_debug_mode(waiting)
        try:
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_weights_that_are_not_finite_are_reported_before_a_checkpoint():
    graph = NeuralGraph((4, 8, 8), 20, name="stage3").cuda()
    with torch.no_grad():
        graph.candidates.weight[3] = torch.nan
    graph(torch.randn(2, 4, 3, 3, device="cuda"))
    with pytest.raises(InputError, match=r"stage3: 1 of \d+ candidate weights"):
        graph.state_dict()


def test_exports_are_for_the_cpu(tmp_path):
    torch.manual_seed(0)
    model, (images, _) = TinyClassifier("static").cuda().double().eval(), batch(torch.float64)
    export(model, tmp_path / "model.pt2", images)
    program = torch.export.load(tmp_path / "model.pt2").module()
    with torch.no_grad():
        assert relative_error(program(images.cpu()), model(images).cpu()) < 1e-7


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_two_of_four_inputs_become_semi_structured_tensors(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 10)).to("cuda", dtype).eval()
    sparsify(model, wiring="nm")
    x = torch.randn(64, 128, device="cuda", dtype=dtype)
    with torch.no_grad():
        expected = model(x)
        densify(model, semi_structured=True)
        assert isinstance(model[0].weight, SparseSemiStructuredTensor)
        assert type(model[2].weight) is nn.Parameter  # ten targets are too few
        assert relative_error(model(x), expected) < 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("recompute", [False, True])
def test_half_precision_comes_near(recompute):
    torch.manual_seed(0)
    model = MobileNetV1DNW(0.225, 10, 1, recompute=recompute).cuda()
    images, labels = batch()
    exact = F.cross_entropy(model(images), labels)
    with torch.autocast("cuda", torch.bfloat16):
        loss = F.cross_entropy(model(images), labels)
    loss.backward()
    assert relative_error(loss, exact) < 0.05
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in model.parameters())


def test_a_training_step_as_a_cuda_graph():
    torch.manual_seed(0)
    model = nn.Sequential(NeuralGraph((8, 32, 32), 100), nn.AdaptiveAvgPool2d(1), nn.Flatten()).cuda()
    other = copy.deepcopy(model)
    images, labels = torch.randn(16, 8, 8, 8, device="cuda"), torch.randint(32, (16,), device="cuda")
    optimizers = [torch.optim.SGD(each.parameters(), 0.1, momentum=0.9) for each in (model, other)]

    def train(each, optimizer):
        optimizer.zero_grad(set_to_none=False)
        F.cross_entropy(each(images), labels).backward()
        optimizer.step()

    # As PyTorch's manual asks: first some steps on a stream of their own.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            train(model, optimizers[0])
    torch.cuda.current_stream().wait_stream(stream)
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recorded):
        train(model, optimizers[0])
    for _ in range(5):
        recorded.replay()
    for _ in range(3 + 5):
        train(other, optimizers[1])
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert relative_error(p, q) < 1e-3, name
    model.state_dict()
    with torch.no_grad():
        model[0].candidates.weight[3] = torch.nan
    recorded.replay()
    with pytest.raises(InputError, match=r"graph: \d+ of \d+ candidate weights"):
        model.state_dict()


# In a process of its own: the compiler cannot look through the type checks that the other tests run under.
PROGRAM = """
import copy

import torch

from dnw_graph import InputError, NeuralGraph

torch.manual_seed(0)
graph = NeuralGraph((8, 32, 32), 100).cuda()
twin = copy.deepcopy(graph)
x = torch.randn(16, 8, 8, 8, device="cuda")
for each in (torch.compile(graph, fullgraph=True), twin):
    each(x).square().mean().backward()
for p, q in zip(graph.parameters(), twin.parameters(), strict=True):
    assert (p.grad - q.grad).norm() <= 1e-3 * q.grad.norm()

# The compiler's own CUDA graphs: a step that warms up, one that is recorded, and two that are replayed.
torch.compiler.reset()
twin = copy.deepcopy(graph)
compiled = torch.compile(graph, mode="reduce-overhead")
optimizers = [torch.optim.SGD(each.parameters(), 0.1) for each in (graph, twin)]
for step in range(4):
    torch.compiler.cudagraph_mark_step_begin()
    for each, optimizer in zip((compiled, twin), optimizers, strict=True):
        optimizer.zero_grad()
        each(x).square().mean().backward()
        optimizer.step()
graph.state_dict()
for p, q in zip(graph.parameters(), twin.parameters(), strict=True):
    assert (p - q).norm() <= 1e-3 * q.norm()
with torch.no_grad():
    graph.candidates.weight[3] = torch.nan
torch.compiler.cudagraph_mark_step_begin()
compiled(x)
try:
    graph.state_dict()
except InputError:
    print("same")
"""


def test_a_compiled_training_step():
    run = run_alone(PROGRAM)
    assert run.stdout == "same\n", run.stderr
