"""Files of compact models: the same outputs after a round trip, and nothing but such files is read."""

import json
import re
from functools import partial
from itertools import product

import pytest
import torch
from pairs import rest_is_slow
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

from dnw_graph import Continuous, Discrete, InputError, NeuralGraph
from dnw_graph.checksum import checksum
from dnw_graph.compaction import CompactModel, compact, load_compact, save_compact
from dnw_graph.compaction.gaps import from_gaps, to_gaps
from dnw_graph.compaction.products import SparseProduct
from dnw_graph.equivalence import mlp_to_discrete, static_to_discrete
from dnw_graph.models import MobileNetV1, MobileNetV1DNW, TinyClassifier
from dnw_graph.node_functions import NormReluConv, ReluConvSendNorm

INSTANCE = partial(NormReluConv, norm="instance")
DYNAMIC = {"num_nodes": 12, "num_inputs": 3, "num_outputs": 3, "num_edges": 30}
MODELS = {
    "mobilenet dnw": lambda: MobileNetV1DNW(0.12, 7, wiring="random_graph"),
    "two norms, small": lambda: MobileNetV1DNW(0.12, 7, small=True, node_function="norm_relu_conv_norm_relu"),
    "mobilenet": lambda: MobileNetV1(0.1, 7),
    "tiny": lambda: TinyClassifier("static"),
    "static": lambda: NeuralGraph((3, 6, 3), 15, stride=2),
    "discrete": lambda: NeuralGraph(**DYNAMIC, dynamics=Discrete(steps=3), node_function=ReluConvSendNorm),
    "blockwise": lambda: static_to_discrete(NeuralGraph((3, 6, 5, 3), 40, node_function=INSTANCE)),
    "fixed step": lambda: NeuralGraph(**DYNAMIC, dynamics=Continuous("rk4", options={"step_size": 0.5})),
    "adaptive": lambda: NeuralGraph(**DYNAMIC, dynamics=Continuous(options={"first_step": 0.1})),
}


@pytest.mark.parametrize(
    ("kind", "products"), rest_is_slow(product(sorted(MODELS, key="static".__ne__), ["sparse", "dense"]), quick=4)
)
def test_round_trip(kind, products, photos, trained, tmp_path):
    x = photos[:2]
    compacted = compact(trained(MODELS[kind](), x), products=products)
    path = tmp_path / "model.safetensors"
    save_compact(compacted, path)
    loaded = load_compact(path)
    assert [type(module) for module in loaded.modules()] == [type(module) for module in compacted.modules()]
    assert not loaded.training
    with torch.no_grad():
        assert torch.equal(loaded(x), compacted(x))
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]


def test_vectors_and_sequences(tmp_path):
    perceptron = mlp_to_discrete(nn.Sequential(nn.Linear(4, 3), nn.ReLU6(), nn.Linear(3, 2), nn.Sigmoid()))
    sequence = NeuralGraph(
        num_nodes=6, num_inputs=3, num_outputs=2, num_edges=9, dynamics=Discrete(input_mode="sequence"),
        node_function=lambda num_nodes: nn.Tanh(),
    )  # fmt: skip
    for model, x in ((perceptron, torch.randn(5, 4)), (sequence, torch.randn(5, 4, 3))):
        compacted = compact(model)
        save_compact(compacted, tmp_path / "model")
        with torch.no_grad():
            assert torch.equal(load_compact(tmp_path / "model")(x), compacted(x))


@pytest.fixture
def saved(tmp_path):
    """A file of a small model that has both kinds of graphs, its tensors and its metadata."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), NeuralGraph((4, 5, 3), 14), NeuralGraph((3, 2), 4, input_function=False))
    path = tmp_path / "model.safetensors"
    save_compact(compact(model), path)
    with safe_open(path, framework="pt") as file:
        return path, {name: file.get_tensor(name).clone() for name in file.keys()}, file.metadata()  # noqa: SIM118


def rewrite(path, tensors, metadata, **changes):
    config = json.loads(metadata["config"])
    for place, value in changes.pop("config", {}).items():
        part = config
        *way, last = place.split(".")
        for step in way:
            part = part[int(step)] if step.isdigit() else part[step]
        part[last] = value
    seal(path, tensors, {**metadata, "config": json.dumps(config), **changes})


def seal(path, tensors, metadata):
    """Write what may be wrong, with the checksum of it."""
    metadata = {name: value for name, value in metadata.items() if name != "checksum"}
    save_file(tensors, path, {**metadata, "checksum": checksum([metadata, tensors])})


def test_a_torn_file_is_refused_at_any_length(saved):
    path, _, _ = saved
    contents = path.read_bytes()
    for length in (0, 1, 7, 8, 9, 100, len(contents) // 2, len(contents) - 1):
        path.write_bytes(contents[:length])
        with pytest.raises(InputError, match="damaged"):
            load_compact(path)
    path.write_bytes(contents + b"\0")
    with pytest.raises(InputError, match="damaged"):
        load_compact(path)


def test_foreign_files_are_refused(saved, tmp_path):
    path, tensors, metadata = saved
    with pytest.raises(InputError, match="is not a file"):
        load_compact(tmp_path / "nowhere")
    for contents in (b"no tensors here", json.dumps({"a": 1}).encode()):
        path.write_bytes(contents)
        with pytest.raises(InputError, match="damaged"):
            load_compact(path)
    torch.save(tensors, path)
    with pytest.raises(InputError, match="damaged"):
        load_compact(path)
    save_file(tensors, path)
    with pytest.raises(InputError, match="not of a compact model"):
        load_compact(path)
    rewrite(path, tensors, metadata, version="1")
    with pytest.raises(InputError, match=r"version '1'.*reads version 3.*update"):
        load_compact(path)
    rewrite(path, tensors, metadata)
    assert isinstance(load_compact(path), CompactModel)


def test_shapes_and_indices_are_checked(saved):
    path, tensors, metadata = saved

    def refused(message, tensors, **changes):
        rewrite(path, tensors, metadata, **changes)
        with pytest.raises(InputError, match=message):
            load_compact(path)

    (fused,) = {name.rsplit(".", 1)[0] for name in tensors if name.endswith("kernel")}
    (sparse,) = {name.rsplit(".", 1)[0] for name in tensors if name.endswith("gaps")} - {fused}
    for graph, sizes in ((fused, (8, 12)), (sparse, (2, 3))):
        gaps = tensors[f"{graph}.gaps"]
        for changed in (gaps.float(), gaps.long(), gaps[None]):
            refused("list of bytes|parameter 'gaps'", {**tensors, f"{graph}.gaps": changed})
        for changed in (gaps[:-1], torch.cat([gaps[1:], gaps.new_zeros(2)])):
            refused("one source and one weight each|outside", {**tensors, f"{graph}.gaps": changed})
        refused("lies outside", {**tensors, f"{graph}.gaps": torch.cat([gaps[:-1], gaps.new_tensor([255, 7])])})
        refused("end with a value", {**tensors, f"{graph}.gaps": torch.cat([gaps, gaps.new_tensor([255])])})
        rowptr, columns = from_gaps(gaps, *sizes, torch.int32)
        assert torch.equal(to_gaps(rowptr, columns, sizes[1]), gaps)
    refused("describe", {name: tensor for name, tensor in tensors.items() if not name.endswith("kernel")})
    refused("holds unused tensors", {**tensors, "more": torch.zeros(3)})
    refused(
        "cannot take|do not fit|does not fit", tensors, config={"parts.layers.2.parts.products.0.options.sources": 9}
    )
    for key in ("rows", "sources"):
        for value in (-1, 1, 2**62, "x", None):
            refused("describe", tensors, config={f"parts.layers.1.csr.{key}": value})
    refused("describe", tensors, config={"parts.layers.1.csr.index": "float32"})
    refused("describe", tensors, config={"parts.layers.1.types": {"values": "int8"}})
    refused("node|stride|pointer", tensors, config={"parts.layers.1.options.sizes": [4, 3, 3]})
    rowptr, later = from_gaps(tensors[f"{fused}.gaps"], 8, 12, torch.int32)
    later[rowptr[1] - 1] = 4  # the first inner node, from itself
    refused("starts there", {**tensors, f"{fused}.gaps": to_gaps(rowptr, later, 12)})
    refused("strides", tensors, config={"parts.layers.1.options.strides": [1, 7, 0]})
    refused("describe", tensors, config={"parts.layers.0.kind": "os.system"})
    refused("no options", tensors, config={"parts.layers.0.options.hook": "print"})
    refused("describe", tensors, config={"parts.layers.0.options.stride": None})
    for name in ("groups", "stride", "dilation", "padding"):
        for value in (-1, 0.5, "x", None, [1], [1, 0.5], [1, -1], [1, None]):
            refused("describe", tensors, config={f"parts.layers.0.options.{name}": value})


def test_edges_of_a_product_are_checked():
    rowptr, columns = torch.tensor([0, 2, 3]), torch.tensor([0, 2, 1])
    for changed in (columns + 1000, columns - 1000, columns.float(), columns.bool(), columns.int()):
        with pytest.raises(InputError, match=r"indices|lie outside"):
            SparseProduct(rowptr, changed, torch.ones(3), torch.ones(2), 3)
    for changed in (columns[[1, 0, 2]], columns[[0, 0, 2]]):
        with pytest.raises(InputError, match="distinct and ascend"):
            SparseProduct(rowptr, changed, torch.ones(3), torch.ones(2), 3)
    for changed in (rowptr + 1, rowptr.flip(0), rowptr * 2):
        with pytest.raises(InputError, match="row pointers"):
            SparseProduct(changed, columns, torch.ones(3), torch.ones(2), 3)


def test_no_bit_of_a_file_can_change_unseen(saved):
    path, tensors, metadata = saved
    contents = path.read_bytes()
    expected = load_compact(path).state_dict()
    for place in range(0, 8 * len(contents), 1009):
        damaged = bytearray(contents)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"damaged|version|not of a compact model"):
            load_compact(path)
    path.write_bytes(contents)
    found = load_compact(path).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())
    rewrite(path, {**tensors, "layers.0.bias": tensors["layers.0.bias"] + 1}, metadata)
    load_compact(path)  # sealed by its writer
    del metadata["checksum"]
    save_file(tensors, path, metadata)
    with pytest.raises(InputError, match="checksum differs"):
        load_compact(path)


@pytest.mark.parametrize("length", [10**9, 2**63])
def test_a_header_that_claims_to_be_huge_takes_no_memory(saved, length):
    path, _, _ = saved
    path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])
    with pytest.raises(InputError, match="damaged"):
        load_compact(path)


WRONG = {
    "runge_kutta_graph": {"method": ["rk5", 3], "times": [[0.0], [0.0, "x"], 3, [0.0, None]]},
    "continuous_graph": {
        "method": ["rk5", None], "rtol": [-1.0, "x", None], "atol": [0.0], "t_span": [[0.0], [0.0, "x"]],
    },
    "discrete_graph": {"schedule": [[7], ["x"], None, [True]], "input_mode": ["x", None], "num_nodes": [1, None]},
    "instance_norm": {"eps": ["x", -1.0, None]},
    "map_mean": {"start": [-1, "x", None], "stop": [-1, 0.5]},
    "per_block": {"sizes": [[1] * 9, [0, 12], ["x"], 12, None]},
    "activation": {"name": ["x", None, 3]},
    "select": {"dim": ["x", None, -1]},
}  # fmt: skip


@pytest.mark.parametrize(
    "kind",
    rest_is_slow(["static", "discrete", "blockwise", "fixed step", "adaptive", "two norms, small", "tiny"], quick=2),
)
def test_options_are_checked(kind, photos, trained, tmp_path):
    path = tmp_path / "model.safetensors"
    save_compact(compact(trained(MODELS[kind](), photos[:2])), path)
    with safe_open(path, framework="pt") as file:
        tensors, metadata = {name: file.get_tensor(name).clone() for name in file.keys()}, file.metadata()  # noqa: SIM118
    found = 0
    for way, layer in layers_of(json.loads(metadata["config"])):
        for option, values in WRONG.get(layer["kind"], {}).items():
            for value in values:
                found += 1
                rewrite(path, tensors, metadata, config={f"{way}options.{option}": value})
                with pytest.raises(InputError, match="damaged"):
                    load_compact(path)
    assert found or kind == "static"


def layers_of(config, way=""):
    """Yield the way to every layer in a description, and the layer."""
    yield way, config
    for name, part in config["parts"].items():
        inner = enumerate(part) if isinstance(part, list) else [(None, part)]
        for number, each in inner:
            yield from layers_of(each, f"{way}parts.{name}." + ("" if number is None else f"{number}."))


def test_a_loaded_model_does_not_depend_on_its_file(saved, photos):
    path, _, _ = saved
    model = load_compact(path).double()
    loaded = load_compact(path)
    with torch.no_grad():
        expected = model(photos)
        with open(path, "r+b") as file:
            file.write(b"\0" * path.stat().st_size)
        assert torch.allclose(loaded(photos.float()).double(), expected, rtol=1e-4, atol=1e-6)


def test_config_that_is_no_json(saved):
    path, tensors, metadata = saved
    for config in ("", "[", "[]", "null", '{"kind": "chain"}', "[" * 5000):
        seal(path, tensors, {**metadata, "config": config})
        with pytest.raises(InputError, match="damaged"):
            load_compact(path)


def test_what_a_file_cannot_hold_is_named(tmp_path):
    path = tmp_path / "model"
    with pytest.raises(InputError, match=r"GELU.*torch.export"):
        save_compact(compact(NeuralGraph((3, 4, 2), node_function=nn.GELU())), path)

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.graph = NeuralGraph((3, 2))

    with pytest.raises(InputError, match="Own is not a CompactModel"):
        save_compact(compact(Own()), path)
    assert not list(tmp_path.iterdir())


def test_a_failing_write_leaves_the_old_file(saved, monkeypatch):
    path, _, _ = saved
    before = path.read_bytes()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(InputError, match="No space left"):
        save_compact(compact(NeuralGraph((2, 2))), path)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_messages_are_one_line(saved):
    path, _, _ = saved
    path.write_bytes(b"nothing")
    with pytest.raises(InputError) as error:
        load_compact(path)
    assert "\n" not in str(error.value)
    assert re.search(r"model\.safetensors", str(error.value))


def test_the_default_device_does_not_matter(photos, trained, tmp_path):
    x = photos[:2].float()
    model = trained(MODELS["mobilenet dnw"](), x)
    with torch.device("meta"):
        compacted = compact(model)
        save_compact(compacted, tmp_path / "model")
        loaded = load_compact(tmp_path / "model")
        with torch.no_grad():
            found = loaded(x)
    with torch.no_grad():
        assert torch.equal(found, compacted(x))


@pytest.mark.parametrize("options", [{"norm": torch.norm}, {"first_step": torch.tensor(0.1)}])
def test_options_of_a_solver_that_a_file_cannot_hold(options, tmp_path):
    compacted = compact(NeuralGraph(**DYNAMIC, dynamics=Continuous(options=options)))
    with pytest.raises(InputError, match=r"ContinuousGraph.*has options that a file cannot hold.*numbers and names"):
        save_compact(compacted, tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_weights_too_large_for_half_precision(tmp_path):
    model = nn.Sequential(nn.Linear(3, 2))
    nn.init.constant_(model[0].weight, 1e5)
    with pytest.raises(InputError, match=r"float16.*65,504.*torch.bfloat16"):
        save_compact(compact(model), tmp_path / "model", torch.float16)
    assert not list(tmp_path.iterdir())
    save_compact(compact(model), tmp_path / "model", torch.bfloat16)
    assert torch.allclose(load_compact(tmp_path / "model").layers[0].weight, model[0].weight, rtol=0.01)
    # What is not finite stays so.
    nn.init.constant_(model[0].weight, torch.inf)
    save_compact(compact(model), tmp_path / "model", torch.float16)
    assert load_compact(tmp_path / "model").layers[0].weight.isinf().all()


@pytest.mark.parametrize("wrap", [partial(torch.compile, backend="eager"), nn.DataParallel, AveragedModel])
def test_a_wrapped_model(wrap, tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), NeuralGraph((4, 5, 3), 14)).eval()
    x = torch.randn(2, 3, 8, 8)
    compacted = compact(wrap(model))
    assert isinstance(compacted, CompactModel)
    save_compact(wrap(compacted), tmp_path / "model")
    with torch.no_grad():
        assert torch.allclose(load_compact(tmp_path / "model")(x), model(x), atol=1e-5)
