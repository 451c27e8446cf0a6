"""A static graph with the layers around it in one call, against the layers one by one and against float64."""

import copy
import io
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from reference import relative_error
from torch import nn

import dnw_graph.compaction.plans as plans
from dnw_graph import InputError, NeuralGraph
from dnw_graph.compaction import compact, load_compact, save_compact
from dnw_graph.models import MobileNetV1DNW
from dnw_graph.ops.build import kernels


@pytest.fixture(autouse=True)
def _has_kernels():
    if kernels() is None:
        pytest.skip("no C++ compiler")


@pytest.fixture
def planned(monkeypatch):
    """Return how often a plan has given a result."""
    found = []
    call = plans.Run.__call__

    def counted(run, z):
        out = call(run, z)
        found.append(out is not None)
        return out

    monkeypatch.setattr(plans.Run, "__call__", counted)
    return found


def with_statistics(model):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.running_mean)
            nn.init.normal_(module.bias)
    return model.eval()


def small_mobilenet(**options):
    return with_statistics(MobileNetV1DNW(0.3, num_classes=5, wiring="random_graph", **options))


def one_by_one(model, x):
    for layer in model.layers:
        x = layer(x)
    return x


@torch.no_grad()
@pytest.mark.parametrize("node_function", ["norm_relu_conv", "norm_relu_conv_norm_relu"])
@pytest.mark.parametrize("stem_stride", [1, 2])
def test_equals_the_model_in_float64(node_function, stem_stride, planned):
    model = small_mobilenet(node_function=node_function, stem_stride=stem_stride).double()
    compacted = compact(model)
    planned.clear()
    for batch, height, width in ((1, 32, 32), (4, 33, 47), (2, 1, 70)):
        x = torch.randn(batch, 3, height, width, dtype=torch.float64)
        assert relative_error(compacted(x), model(x)) <= 1e-10
    assert planned == [True] * 3


@torch.no_grad()
def test_equals_its_layers_one_by_one_in_float32(planned):
    compacted = compact(small_mobilenet())
    for side in (7, 32, 64, 96):
        x = torch.randn(3, 3, side, side)
        assert relative_error(compacted(x), one_by_one(compacted, x)) <= 1e-5
    assert all(planned)


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 2, 3, 5])
def test_the_result_does_not_depend_on_threads_or_batch(batch, planned):
    compacted = compact(small_mobilenet())
    x = torch.randn(batch, 3, 48, 48)
    singly = torch.cat([compacted(image[None]) for image in x])
    torch.set_num_threads(3)
    try:
        together = compacted(x)
    finally:
        torch.set_num_threads(1)
    torch.testing.assert_close(together, singly, rtol=1e-6, atol=1e-6)
    assert all(planned)


@torch.no_grad()
def test_several_threads_call_one_model():
    compacted = compact(small_mobilenet())
    images = [torch.randn(1, 3, side, side) for side in (32, 40, 32, 56) * 3]
    expected = [compacted(x) for x in images]
    with ThreadPoolExecutor(4) as pool:
        assert all(map(torch.equal, pool.map(compacted, images), expected))


@torch.no_grad()
def test_parts_of_the_chain(planned):
    """Without a stem, without a classifier, with layers that no plan takes."""
    graph = with_statistics(NeuralGraph((4, 6, 5), 20, wiring="random_graph"))
    chains = {
        "graph": nn.Sequential(graph),
        "stem": nn.Sequential(nn.Conv2d(2, 4, 3, 2, 1), graph),
        "stem of another kernel": nn.Sequential(nn.Conv2d(2, 4, 5, 1, 2), graph),
        "relu": nn.Sequential(graph, nn.ReLU()),
        "mean": nn.Sequential(graph, nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        "no relu": nn.Sequential(graph, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3, bias=False)),
        "sigmoid": nn.Sequential(graph, nn.Sigmoid()),
    }
    for name, chain in chains.items():
        planned.clear()
        x = torch.randn(2, 2 if "stem" in name else 4, 11, 9)
        assert relative_error(compact(chain.eval())(x), chain(x)) <= 1e-5, name
        assert planned == [True], name


@torch.no_grad()
def test_changed_weights_are_noticed(planned):
    compacted = compact(small_mobilenet())
    x = torch.randn(1, 3, 32, 32)
    first = compacted(x)
    for change in (
        lambda: compacted.layers[1].values.mul_(2),
        lambda: compacted.load_state_dict(
            {k: v * (1 + v.is_floating_point()) for k, v in compacted.state_dict().items()}
        ),
        lambda: setattr(compacted.layers[0], "weight", compacted.layers[0].weight * 3),
        lambda: setattr(compacted.layers[1].values, "data", compacted.layers[1].values * 2),
        lambda: compacted.double(),
    ):
        change()
        x = x.to(compacted.layers[0].weight.dtype)
        assert relative_error(compacted(x), one_by_one(compacted, x)) <= 1e-5
        assert relative_error(compacted(x), first) > 1e-3
    assert all(planned)


@torch.no_grad()
def test_layers_are_called_where_that_matters(planned):
    compacted = compact(small_mobilenet())
    x = torch.randn(1, 3, 32, 32)
    expected = one_by_one(compacted, x)
    seen = []
    handle = compacted.layers[1].register_forward_hook(lambda *args: seen.append(1))
    torch.testing.assert_close(compacted(x), expected, rtol=1e-4, atol=1e-4)
    handle.remove()
    assert seen == [1]
    old = compacted.layers[2].forward
    compacted.layers[2].forward = lambda z: old(z) * 0
    assert torch.equal(compacted(x), one_by_one(compacted, x))
    del compacted.layers[2].forward
    with torch.enable_grad(), pytest.raises(RuntimeError):
        compacted(x.requires_grad_()).sum().backward()
    x.requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        assert compacted(x).dtype == torch.bfloat16
    assert not any(planned)
    with pytest.raises(RuntimeError, match="channels"):
        compacted(x[:, :2])


@torch.no_grad()
def test_copies_pickles_and_programs(unchecked):
    compacted = compact(small_mobilenet())
    x = torch.randn(2, 3, 32, 32)
    expected = compacted(x)
    assert torch.equal(copy.deepcopy(compacted)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(compacted))(x), expected)
    file = io.BytesIO()
    program = torch.export.export(compacted, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for other in (x, torch.randn(3, 3, 32, 32)):
        torch.testing.assert_close(loaded(other), compacted(other), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_states_in_bfloat16(tmp_path, planned):
    model = small_mobilenet()
    x = torch.randn(4, 3, 64, 64)
    rounded = compact(model, state_dtype=torch.bfloat16)
    planned.clear()
    out = rounded(x)
    assert planned == [True]
    assert 1e-5 < relative_error(out, compact(model)(x)) <= 2e-2
    # PyTorch's operations round the same states; sums in another order flip few of them.
    assert relative_error(out, one_by_one(rounded.double(), x.double())) <= 5e-3
    save_compact(rounded.float(), tmp_path / "file.safetensors")
    assert torch.equal(load_compact(tmp_path / "file.safetensors")(x), out)


@torch.no_grad()
def test_states_in_int8(tmp_path, planned, unchecked):
    model = small_mobilenet()
    x = torch.randn(4, 3, 64, 64)
    rounded = compact(model, state_dtype=torch.int8, example=x)
    planned.clear()
    out = rounded(x)
    assert planned == [True]
    assert 1e-4 < relative_error(out, compact(model)(x)) <= 5e-2
    assert rounded.report.difference == pytest.approx(relative_error(out, compact(model)(x)), rel=1e-3)
    assert relative_error(out, one_by_one(copy.deepcopy(rounded).double(), x.double())) <= 1e-2
    save_compact(rounded, tmp_path / "file.safetensors")
    assert torch.equal(load_compact(tmp_path / "file.safetensors")(x), out)
    program = torch.export.export(rounded, (x,))
    torch.testing.assert_close(program.module()(x), out, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_scales_come_from_the_states_of_the_example():
    graph = with_statistics(NeuralGraph((3, 5, 2), 31, wiring="random_graph"))
    x = torch.randn(20, 3, 6, 6)
    x[13] *= 10
    layer = compact(graph, state_dtype=torch.int8, example=x).layers[0]
    received = (layer.scale[:3].view(3, 1, 1) * x + layer.shift[:3].view(3, 1, 1)).relu()
    states = nn.functional.conv2d(received, layer.kernel[:3, None], padding=1, groups=3)
    torch.testing.assert_close(layer.state_scale[:3], 2 / 127 * states.abs().amax((0, 2, 3)))
    assert bool((layer.state_scale > 0).all())


def test_wrong_state_types_are_refused():
    model = small_mobilenet()
    x = torch.randn(1, 3, 32, 32)
    for options in (
        {"state_dtype": torch.float16},
        {"state_dtype": torch.bfloat16, "products": "dense"},
        {"state_dtype": torch.int8, "products": "dense", "example": x},
        {"state_dtype": torch.int8},
    ):
        with pytest.raises(InputError, match="state_dtype"):
            compact(model, **options)
    for dtype in (torch.int8, torch.bfloat16):
        with pytest.raises(InputError, match="this model has none"):
            compact(nn.Sequential(nn.Conv2d(3, 4, 3)), state_dtype=dtype, example=x)
