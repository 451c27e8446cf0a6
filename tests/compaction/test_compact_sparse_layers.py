"""Compact forms of sparse layers: over their weights alone, with the same outputs, in small files."""

import copy
import io
import os
import pickle

import onnxruntime
import pytest
import torch
import torch.nn.functional as F
import torchvision
from onnxruntime.quantization import QuantType, quantize_dynamic
from reference import relative_error
from torch import nn
from torch.nn.utils import prune, weight_norm

import dnw_graph.compaction.sparse_layers as sparse_layers
from dnw_graph import InputError, NeuralGraph, sparsify
from dnw_graph.compaction import CompactModel, compact, export, load_compact, save_compact
from dnw_graph.compaction.gaps import from_gaps, to_gaps
from dnw_graph.compaction.network import Network
from dnw_graph.compaction.sparse_layers import DENSEST, SparseConv, SparseLinear
from dnw_graph.models import MobileNetV1DNW
from dnw_graph.ops import sparse_linear
from dnw_graph.ops.build import kernels


def with_statistics(model):
    """Norms and biases as training leaves them."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    return model.double().eval()


class Block(nn.Module):
    """Two convolutions around a residual connection, of which one is strided, grouped or dilated."""

    def __init__(self, stride, groups, dilation):
        super().__init__()
        options = {"stride": stride, "groups": groups, "dilation": dilation, "padding": dilation}
        self.first = nn.Conv2d(32, 64, 3, bias=False, **options)
        self.norm = nn.BatchNorm2d(64)
        self.second = nn.Conv2d(64, 64, (3, 5), padding="same")
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.head = nn.Linear(64, 70)

    def forward(self, x):
        x = F.relu(self.norm(self.first(x)))
        x = self.pool(F.relu(self.second(x) + x))
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize(("stride", "groups", "dilation"), [(1, 1, 1), (2, 1, 1), (1, 4, 1), (2, 2, 3)])
def test_a_network_has_the_same_outputs_over_its_weights_alone(stride, groups, dilation):
    model = Block(stride, groups, dilation)
    sparsify(model, 0.1)
    with_statistics(model)
    x = torch.randn(2, 32, 14, 11, dtype=torch.float64)
    small = compact(model, example=x)
    with torch.no_grad():
        assert relative_error(small(x), model(x)) < 1e-12
    assert isinstance(small, CompactModel)
    (network,) = small.layers
    # Norm, both ReLUs and the addition are part of the convolutions; pooling and mean are left.
    kinds = [type(layer).__name__ for layer in network.layers]
    assert kinds == ["SparseConv", "SparseConv", "Operation", "Operation", "SparseLinear"]


def test_the_report_has_a_row_for_every_layer():
    model = Block(1, 1, 1)
    sparsify(model, 0.1, skip="head")
    with_statistics(model)
    x = torch.randn(2, 32, 8, 8, dtype=torch.float64)
    report = compact(model, example=x).report
    rows = {row.name: row for row in report.layers}
    assert list(rows) == ["first", "second", "head"]
    weights, kept = 32 * 64 * 9, 1844  # n - ⌊0.9 n⌋
    row = rows["first"]
    assert (row.weights, row.kept, row.form, row.why_dense) == (weights, kept, "sparse", "")
    assert row.multiply_adds == kept * 64
    # A value and a byte each, and the bias that the norm has become.
    assert row.bytes == pytest.approx(kept * 9 + 64 * 8, abs=3)
    assert rows["head"].form == "dense"
    assert "more than 30%" in rows["head"].why_dense
    assert rows["head"].bytes == (64 * 70 + 70) * 8
    assert "head" in str(report)
    dense = compact(model, products="dense", example=x).report
    assert {row.form for row in dense.layers} == {"dense"}


def test_a_model_with_other_parts_keeps_them_and_gets_sparse_layers():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 64, 7, bias=False), nn.BatchNorm2d(64)
            self.attention, self.name = nn.MultiheadAttention(64, 4, batch_first=True), "own"

        def forward(self, x):
            x = self.norm(self.conv(x)).flatten(2).transpose(1, 2)
            return self.attention(x, x, x)[0]

    model = Own()
    sparsify(model, 0.1)
    with_statistics(model)
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    small = compact(model, example=x)
    assert (type(small.conv), type(small.norm), small.name) == (SparseConv, nn.Identity, "own")
    with torch.no_grad():
        assert relative_error(small(x), model(x)) < 1e-12
    assert [row.form for row in small.report.layers] == ["sparse", "dense"]


def test_a_norm_that_is_not_alone_stays():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32)

        def forward(self, x):
            x = self.conv(x)
            return self.norm(x) + x.softmax(1)

    model = Twice()
    sparsify(model, 0.1)
    with_statistics(model)
    x = torch.randn(2, 32, 8, 8, dtype=torch.float64)
    small = compact(model)
    assert type(small.norm) is nn.BatchNorm2d
    with torch.no_grad():
        assert relative_error(small(x), model(x)) < 1e-12


def test_chains_and_graphs_get_sparse_layers_too():
    model = nn.Sequential(
        nn.Conv2d(3, 64, 5, stride=2, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.Flatten(), nn.Linear(64 * 9, 10)
    )
    sparsify(model, 0.05)
    with_statistics(model)
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    small = compact(model)
    assert [type(layer).__name__ for layer in small.layers] == ["SparseConv", "Flatten", "SparseLinear"]
    with torch.no_grad():
        assert relative_error(small(x), model(x)) < 1e-12
    graph = MobileNetV1DNW(0.12, 50, wiring="random_graph")
    sparsify(graph, 0.1, skip="stem*")
    with_statistics(graph)
    x = torch.randn(2, 3, 40, 40, dtype=torch.float64)
    small = compact(graph)
    assert type(small.layers[-1]) is SparseLinear
    with torch.no_grad():
        assert relative_error(small(x), graph(x)) < 1e-12


def test_the_rule_is_the_share_of_weights_that_are_not_zero():
    for share, kind in ((DENSEST, "SparseLinear"), (DENSEST + 0.01, "Linear")):
        layer = nn.Linear(100, 100)
        with torch.no_grad():
            layer.weight.view(-1)[: round((1 - share) * 10_000)] = 0
        assert type(compact(nn.Sequential(layer)).layers[0]).__name__ == kind


@pytest.fixture(scope="module")
def resnet():
    model = torchvision.models.resnet18(num_classes=100)
    sparsify(model, 0.1)
    return with_statistics(model).float()


@pytest.fixture(scope="module")
def image():
    return torch.randn(2, 3, 64, 64)


@pytest.fixture(scope="module")
def small_resnet(resnet):
    return compact(resnet)


def test_the_size_of_a_file_follows_the_number_of_weights(resnet, small_resnet, image, tmp_path):
    path = tmp_path / "model.safetensors"
    save_compact(small_resnet, path)
    kept = sum(row.kept for row in small_resnet.report.layers)
    assert kept * 5 < os.path.getsize(path) < kept * 5 + 60_000  # biases, places that lie far apart, description
    loaded = load_compact(path)
    with torch.no_grad():
        expected = resnet(image)
        assert torch.equal(loaded(image), small_resnet(image))
        assert relative_error(loaded(image), expected) < 1e-5
        save_compact(small_resnet, path, torch.bfloat16)
        assert kept * 3 < os.path.getsize(path) < kept * 3 + 60_000
        loaded = load_compact(path)
        assert {tensor.dtype for tensor in loaded.buffers() if tensor.is_floating_point()} == {torch.float32}
        assert 1e-5 < relative_error(loaded(image), expected) < 0.02
    with pytest.raises(InputError, match="weight_dtype"):
        save_compact(small_resnet, path, torch.float64)


def test_export_save_load(small_resnet, image, unchecked):
    file = io.BytesIO()
    batch = torch.export.Dim("batch")
    torch.export.save(torch.export.export(small_resnet, (image,), dynamic_shapes=({0: batch},)), file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    with torch.no_grad():
        assert torch.equal(loaded(image[:1]), small_resnet(image[:1]))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["layers", "graphs"])
def test_dense_products_can_be_quantised_by_onnxruntime(kind, resnet, image, tmp_path, unchecked):
    model = resnet if kind == "layers" else with_statistics(MobileNetV1DNW(0.12, 10, wiring="random_graph")).float()
    dense, path = compact(model, products="dense"), tmp_path / "model.onnx"
    torch.onnx.export(
        dense, (image,), path, dynamo=True, dynamic_shapes=({0: torch.export.Dim("batch")},), verbose=False
    )
    quantize_dynamic(path, tmp_path / "int8.onnx", weight_type=QuantType.QUInt8)
    session = onnxruntime.InferenceSession(tmp_path / "int8.onnx", providers=["CPUExecutionProvider"])
    (name,) = (value.name for value in session.get_inputs())
    with torch.no_grad():
        (out,) = session.run(None, {name: image.numpy()})
        assert relative_error(torch.tensor(out), model(image)) < 0.2
    written = sum(file.stat().st_size for file in tmp_path.glob("model.onnx*"))  # large weights go to a file beside it
    assert os.path.getsize(tmp_path / "int8.onnx") < 0.4 * written


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 1.0])
def test_gaps_hold_all_places(share):
    matrix = torch.rand(7, 3000) < share
    rows, columns = matrix.nonzero(as_tuple=True)
    rowptr = torch.searchsorted(rows, torch.arange(8))
    gaps = to_gaps(rowptr, columns, 3000)
    assert all(map(torch.equal, from_gaps(gaps, 7, 3000, torch.int64), (rowptr, columns)))
    assert len(gaps) <= len(columns) + 7 * 3000 // 255
    if share:
        with pytest.raises(InputError, match="outside"):
            from_gaps(gaps, 7, 2000, torch.int64)


@pytest.mark.parametrize("inputs", [[[1]], [[]], [[0], [2]], [[0], ["a"]], [[0]]])
def test_a_network_refuses_inputs_that_are_not_there(inputs):
    with pytest.raises(InputError):
        Network([nn.ReLU()] * 2 if len(inputs) != 1 or inputs == [[0]] else [nn.ReLU()], inputs)


@torch.no_grad()
def test_a_sparse_linear_layer_notices_changes_of_its_tensors(monkeypatch):
    if kernels() is None:
        pytest.skip("no C++ compiler")
    weight = torch.randn(30, 20) * (torch.rand(30, 20) < 0.3)
    rows, columns = weight.nonzero(as_tuple=True)
    rowptr = torch.searchsorted(rows, torch.arange(31)).int()
    layer = SparseLinear(rowptr, columns.int(), weight[rows, columns], torch.randn(30), 20)
    others = []
    monkeypatch.setattr(sparse_layers, "sparse_linear", lambda *args: others.append(1) or sparse_linear(*args))

    def agrees(x):
        found = layer(x)
        expected = sparse_linear(x, layer.rowptr, layer.columns, layer.values, layer.bias, layer.relu)
        return torch.allclose(found, expected, atol=1e-5) and found.shape == expected.shape

    x = torch.randn(1, 20)
    assert all(agrees(each) for each in (x, torch.randn(20), torch.randn(2, 3, 20), torch.randn(9, 20)))
    first = layer(x)
    for change in (
        lambda: layer.values.mul_(2),
        lambda: setattr(layer, "values", layer.values * 2),
        lambda: setattr(layer.values, "data", layer.values * 2),
        lambda: setattr(layer, "bias", None),
        lambda: layer.load_state_dict({name: each.clone() for name, each in layer.state_dict().items()}),
    ):
        change()
        assert agrees(x)
    assert not torch.allclose(layer(x), first)
    assert not others
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(copied(x), layer(x))
    assert agrees(torch.randn(20, 5).t())  # Not contiguous.
    assert agrees(torch.empty(0, 20))
    assert len(others) == 2
    with pytest.raises(InputError, match="one dtype"):
        layer(x.double())
    with torch.enable_grad():
        assert layer(x.requires_grad_()).requires_grad
    x.requires_grad_(False)
    layer.columns[3] = 20
    with pytest.raises(InputError, match="valid sources"):
        layer(x)


@pytest.mark.parametrize("write", ["compact", "export"])
def test_layers_that_pytorch_has_pruned(write, tmp_path):
    model = nn.Sequential(
        nn.Conv2d(3, 64, 5, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 64),
    )
    for _ in range(2):
        prune.l1_unstructured(model[0], "weight", 0.7)
    prune.random_unstructured(model[-1], "weight", 0.9)
    prune.random_unstructured(model[-1], "bias", 0.5)
    with_statistics(model).float()
    x = torch.randn(2, 3, 8, 8)
    expected, before = model(x), {name: value.clone() for name, value in model.state_dict().items()}
    if write == "compact":
        small = compact(model, example=x)
        assert small.report.difference < 1e-5
    else:
        export(model, tmp_path / "x.safetensors", x)
        small = load_compact(tmp_path / "x.safetensors")
    assert [type(layer).__name__ for layer in small.layers] == ["SparseConv", "MapMean", "SparseLinear"]
    with torch.no_grad():
        assert relative_error(small(x), expected) < 1e-5
    assert prune.is_pruned(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(x), expected)
    assert expected.requires_grad


def test_weights_with_a_history_are_copied():
    """PyTorch's older way to normalise a weight sets a tensor that follows from two parameters."""
    model = nn.Sequential(weight_norm(nn.Linear(64, 64)), nn.ReLU(), nn.Linear(64, 64))
    sparsify(model[2], 0.1)
    model.eval()
    x = torch.randn(3, 64)
    with torch.no_grad():
        assert relative_error(compact(model, example=x)(x), model(x)) < 1e-6


def test_a_sparse_layer_leaves_the_relu_of_a_graph_to_it():
    model = nn.Sequential(nn.Conv2d(16, 64, 3, padding=1), NeuralGraph((64, 64, 32), 400))
    sparsify(model[0], 0.1)
    with_statistics(model).float()
    x = torch.randn(2, 16, 8, 8)
    small = compact(model)
    assert [type(layer).__name__ for layer in small.layers] == ["SparseConv", "FusedGraph"]
    with torch.no_grad():
        assert relative_error(small(x), model(x)) < 1e-5
        assert relative_error(compact(model, state_dtype=torch.bfloat16)(x), model(x)) < 0.05


@pytest.mark.parametrize("kind", ["sparse layer", "product", "graph"])
def test_a_sparse_compact_model_has_no_dense_form(kind):
    if kind == "sparse layer":
        model = nn.Sequential(nn.Linear(64, 64))
        sparsify(model, 0.1)
    else:
        model = NeuralGraph((3, 4, 2), node_function=nn.Tanh if kind == "product" else "norm_relu_conv")
    with pytest.raises(InputError, match=r"compact already, with sparse products.*the original"):
        compact(compact(model), products="dense")
    assert isinstance(compact(compact(model, products="dense"), products="dense"), CompactModel)
