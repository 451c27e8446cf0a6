"""Compact models through torch.compile, torch.export and ONNX."""

from functools import partial
from itertools import product

import onnxruntime
import pytest
import torch
from pairs import rest_is_slow
from reference import relative_error
from torch import nn

from dnw_graph import Continuous, Discrete, InputError, NeuralGraph
from dnw_graph.compaction import compact, export
from dnw_graph.models import MobileNetV1, MobileNetV1DNW, TinyClassifier
from dnw_graph.node_functions import NormReluConv, ReluConvSendNorm

DYNAMIC = {"num_nodes": 12, "num_inputs": 3, "num_outputs": 3, "num_edges": 30}
INSTANCE = partial(ReluConvSendNorm, norm="instance")
MODELS = {
    "mobilenet dnw": lambda: MobileNetV1DNW(0.12, 7, wiring="random_graph"),
    "small": lambda: MobileNetV1DNW(0.12, 7, small=True, node_function=partial(NormReluConv, norm="instance")),
    "mobilenet": lambda: MobileNetV1(0.1, 7),
    "tiny": lambda: TinyClassifier("static"),
    "discrete": lambda: NeuralGraph(**DYNAMIC, dynamics=Discrete(steps=3), node_function=INSTANCE),
    "fixed step": lambda: NeuralGraph(**DYNAMIC, dynamics=Continuous("rk4", options={"step_size": 0.5})),
}
BATCH = {0: torch.export.Dim("batch", min=1, max=64)}


@pytest.fixture(autouse=True)
def _fresh(unchecked):
    torch.compiler.reset()


# What a compiler takes long for is left to the slow tests.
NAMES = sorted(MODELS, key="discrete".__ne__)


@pytest.fixture(params=rest_is_slow(NAMES))
def model(request, photos, trained):
    return trained(MODELS[request.param](), photos.float())


@pytest.mark.parametrize(("model", "products"), rest_is_slow(product(NAMES, ["sparse", "dense"])), indirect=["model"])
def test_export_save_load(model, products, photos, tmp_path):
    x = photos.float()
    compacted = compact(model, products=products)
    program = torch.export.export(compacted, (x[:2],), dynamic_shapes=(BATCH,))
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    with torch.no_grad():
        for batch in (1, 2, 4):
            assert relative_error(loaded(x[:batch]), model(x[:batch])) < 1e-5


def test_compile_without_a_break(model, photos):
    x = photos.float()
    compiled = torch.compile(compact(model), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert relative_error(compiled(x), model(x)) < 1e-5


def test_onnx(model, photos, tmp_path):
    x = photos.float()
    path = tmp_path / "model.onnx"
    compacted = compact(model, products="dense")
    torch.onnx.export(compacted, (x[:2],), path, dynamo=True, dynamic_shapes=(BATCH,), verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (name,) = (value.name for value in session.get_inputs())
    with torch.no_grad():
        for batch in (1, 4):
            (out,) = session.run(None, {name: x[:batch].numpy()})
            assert relative_error(torch.tensor(out), model(x[:batch])) < 1e-5


def test_a_user_s_module_exports_too(photos, tmp_path):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.stage = NeuralGraph((3, 8, 4), 30)

        def forward(self, x):
            return self.stage(x).amax((2, 3))

    x = photos.float()
    model = Own().eval()
    program = torch.export.export(compact(model), (x,), dynamic_shapes=(BATCH,))
    torch.export.save(program, tmp_path / "model.pt2")
    with torch.no_grad():
        assert relative_error(torch.export.load(tmp_path / "model.pt2").module()(x[:3]), model(x[:3])) < 1e-5


@pytest.mark.parametrize("ending", ["pt2", "safetensors"])
def test_a_model_on_another_device_is_exported_from_a_copy_on_the_cpu(ending, tmp_path, monkeypatch):
    model, x, moved = TinyClassifier("static").eval(), torch.randn(2, 3, 16, 16), []
    for kind in (nn.Module, torch.Tensor):
        monkeypatch.setattr(kind, "cpu", lambda self, to_cpu=kind.cpu: moved.append(self) or to_cpu(self))
    export(model, tmp_path / f"model.{ending}", x)
    (copied,) = (each for each in moved if isinstance(each, nn.Module))
    assert {p.data_ptr() for p in copied.parameters()}.isdisjoint(p.data_ptr() for p in model.parameters())
    assert any(each is x for each in moved)


@pytest.mark.parametrize("ending", ["pt2", "onnx"])
@pytest.mark.parametrize("method", ["dopri5", "explicit_adams"])
def test_a_solver_that_no_program_holds_is_refused(method, ending, tmp_path):
    options = {} if method == "dopri5" else {"step_size": 0.5}
    graph = NeuralGraph(**DYNAMIC, dynamics=Continuous(method, options=options)).eval()
    with pytest.raises(InputError, match=rf"{method}.*euler.*\.safetensors"):
        export(graph, tmp_path / f"model.{ending}", torch.randn(2, 3, 8, 8))
    assert not list(tmp_path.iterdir())


def test_a_model_that_cannot_be_traced_is_refused_in_one_line(tmp_path):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.stage = NeuralGraph((3, 8, 4), 30)

        def forward(self, x):
            return self.stage(x) if x.sum() > 0 else x

    for ending in ("pt2", "onnx"):
        with pytest.raises(InputError, match=r"torch.export cannot trace this Own") as error:
            export(Own().eval(), tmp_path / f"model.{ending}", torch.randn(2, 3, 8, 8))
        assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_an_example_of_one_image(photos, tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), NeuralGraph((4, 5, 3), 14)).eval()
    x = photos.float()
    export(model, tmp_path / "model.pt2", x[:1])
    with torch.no_grad():
        assert relative_error(torch.export.load(tmp_path / "model.pt2").module()(x), model(x)) < 1e-5


@pytest.mark.parametrize("example", [torch.zeros(0, 3, 8, 8), torch.zeros(2, 1, 8, 8), torch.tensor(1.0)])
def test_an_example_that_the_model_cannot_take(example, tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), NeuralGraph((4, 5, 3), 14)).eval()
    for ending in ("pt2", "safetensors"):
        with pytest.raises(InputError, match="example") as error:
            export(model, tmp_path / f"model.{ending}", example)
        assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())
