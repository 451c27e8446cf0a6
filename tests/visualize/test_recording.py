"""A recording gives back what the wirings were, of any model, and goes on where it was left."""

import hashlib
import io
import json
import pickletools
import zipfile
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch_geometric.data import Data

from dnw_graph import DNW, Discrete, InputError, NeuralGraph, sparsify
from dnw_graph.analysis.cost import live_nodes
from dnw_graph.sparse_layers import densify, weight_graphs
from dnw_graph.visualize import QUANTILES, Recording
from dnw_graph.visualize.recording import MAGIC


class Model(nn.Module):
    """Two graphs, one after the other, and a sparse layer."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(NeuralGraph((3, 5, 6), 20, name="first"), NeuralGraph((6, 8, 4), 30, name="second"))
        self.head = nn.Conv2d(4, 6, 3)
        sparsify(self.head, 0.2)


def shake(model, seed):
    """Change all weights, as a step would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for graph in graphs(model).values():
            for weight in graph.weights:
                weight.parameter.add_(0.1 * torch.randn(weight.parameter.shape, generator=generator))


def graphs(model):
    return {"first": model.body[0], "second": model.body[1], "head.weight": weight_graphs(model)["head.weight"]}


def recorded(moments=6):
    """A recording, and what there was to see at every moment."""
    model = Model()
    recording, seen = Recording(model), []
    for step in range(moments):
        if step:
            shake(model, step)
            recording.add(step, step / 2)
        edges = {name: graph.real_index.tolist() for name, graph in graphs(model).items()}
        weights = {name: graph.edge_weight for name, graph in graphs(model).items()}
        seen.append((edges, weights, live_nodes(model)))
    return model, recording, seen


@pytest.mark.filterwarnings("error")
def test_weights_beyond_half_precision_are_its_largest():
    graph = NeuralGraph((2, 3, 2), 6)
    with torch.no_grad():
        graph.candidates.weight[:] = torch.arange(-5.0, graph.num_candidates - 5) * 1e6
    recording = Recording(graph)
    (recorded,) = recording.graphs.values()
    expected = graph.edge_weight.clamp(-65504, 65504)
    assert torch.equal(torch.as_tensor(recorded.to_data().edge_weight, dtype=torch.float32), expected)


def test_edges_weights_and_live_nodes_are_those_of_the_moments():
    _, recording, seen = recorded()
    recording = Recording.from_bytes(recording.to_bytes())
    assert list(recording.graphs) == ["first", "second", "head.weight"]
    for moment in (3, 0, 5, 1, 4, 2, -1):
        edges, weights, live = seen[moment]
        for name, graph in recording.graphs.items():
            assert graph.edges(moment).tolist() == edges[name]
            np.testing.assert_allclose(graph.weights(moment), weights[name], rtol=1e-3)
            if name in live:
                assert graph.live(moment).tolist() == live[name].tolist()
            expected = weights[name].abs().quantile(torch.tensor(QUANTILES))
            np.testing.assert_allclose(graph.magnitudes()[moment], expected, rtol=1e-3)
    assert [moment.step for moment in recording.moments] == list(range(6))
    assert [moment.epoch for moment in recording.moments] == [0, 0.5, 1, 1.5, 2, 2.5]


def test_born_gone_and_life_spans_against_sets():
    _, recording, seen = recorded()
    for name, graph in recording.graphs.items():
        sets = [set(edges[name]) for edges, _, _ in seen]
        swaps, spans, ended = [(0, 0)], [], []
        for number in range(1, 6):
            assert set(graph.born(number).tolist()) == sets[number] - sets[number - 1]
            assert set(graph.gone(number).tolist()) == sets[number - 1] - sets[number]
            swaps.append((len(sets[number] - sets[number - 1]), len(sets[number - 1] - sets[number])))
        assert graph.swaps().tolist() == [list(pair) for pair in swaps]
        assert sum(map(sum, swaps)) > 0
        for edge in set().union(*sets):
            life = 0
            for number in range(1, 7):
                life += edge in sets[number - 1]
                if life and (number == 6 or edge not in sets[number]):
                    spans.append(life - (number == 6))
                    ended.append(number < 6)
                    life = 0
        found = sorted(zip(*(each.tolist() for each in graph.life_spans()), strict=True))
        assert found == sorted(zip(spans, ended, strict=True))


def test_a_moment_chooses_the_edges_of_every_graph_once(monkeypatch):
    model, recording, _ = recorded(2)
    shake(model, 7)
    chosen, choose = [], DNW.choose
    monkeypatch.setattr(DNW, "choose", lambda rule, view: (chosen.append(view.name), choose(rule, view))[1])
    recording.add(9)
    assert sorted(chosen) == sorted(graph.name for graph in graphs(model).values())


def test_a_moment_that_fails_leaves_the_recording_as_it_was():
    model, recording, seen = recorded(3)
    before = recording.to_bytes()
    shake(model, 7)
    with torch.no_grad():
        model.body[1].candidates.weight[0] = torch.nan
    with pytest.raises(InputError, match=r"second: 1 of .* candidate weights are NaN"):
        recording.add(3)
    assert recording.to_bytes() == before
    assert recording["first"].edges(-1).tolist() == seen[-1][0]["first"]


def test_a_moment_is_the_graph_as_pyg_has_it():
    model, recording, _ = recorded()
    now, then = model.body[0].to_data(), recording["first"].to_data()
    assert (then.step, then.epoch) == (5, 2.5)
    del then.step, then.epoch
    assert set(now.keys()) == set(then.keys())
    for key in set(now.keys()) - {"edge_weight", "live_mask"}:
        same = now[key] == then[key]
        assert same if isinstance(same, bool) else same.all(), key
    torch.testing.assert_close(now.edge_weight, then.edge_weight, rtol=1e-3, atol=0)
    assert isinstance(then, Data)


def test_the_layer_of_a_recording_has_the_inputs_of_its_kernel():
    data = Recording(Model())["head.weight"].to_data()
    assert data.num_nodes == 4 * 9 + 6
    assert data.live_mask[36:].all()
    assert data.live_mask[:36].tolist() == [node in data.edge_index[0].tolist() for node in range(36)]


def test_a_recording_goes_on_where_it_was_left(tmp_path):
    _, whole, _ = recorded()
    model = Model()
    half = Recording(model)
    for step in (1, 2):
        shake(model, step)
        half.add(step, step / 2)
    half.save(tmp_path / "half")
    again = Recording.load(tmp_path / "half", model)
    for step in (3, 4, 5):
        shake(model, step)
        again.add(step, step / 2)
    assert again.to_bytes() == whole.to_bytes()


def test_some_steps_only():
    model = Model()
    recording = Recording(model, every=3)
    for step in range(1, 8):
        recording.add(step)
    assert [moment.step for moment in recording.moments] == [0, 3, 6]


def _dense_layer(model):
    densify(model[2])


def _another_shape(model):
    model[0] = NeuralGraph((4, 7, 6), 20, name="body")


def _one_more_layer(model):
    sparsify(model[3], 0.5)


CHANGES = {
    _dense_layer: "has 3 graphs, the model 2",
    _another_shape: r"nodes is .* in the recording, .* in the model",
    _one_more_layer: "has 3 graphs, the model 4",
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_graphs_than_those_recorded_are_refused(change):
    torch.manual_seed(0)
    layers = nn.Linear(6, 8), nn.Linear(8, 5), nn.Linear(5, 3)
    model = nn.Sequential(NeuralGraph((4, 5, 6), 20, name="body"), *layers)
    sparsify(nn.Sequential(*layers[:2]), 0.5)
    recording = Recording(model)
    recording.add(1)
    before = recording.to_bytes()
    change(model)
    with pytest.raises(InputError, match=f"the graphs of the model have changed.*begins another.*{CHANGES[change]}"):
        recording.add(2)
    assert recording.to_bytes() == before
    assert Recording.from_bytes(before)["body"].to_data().num_edges == 20


def test_training_is_the_same_with_a_recording():
    def train(record):
        model = Model()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        recording = Recording(model) if record else None
        for step in range(1, 4):
            torch.manual_seed(step)
            loss = model.head(model.body(torch.randn(4, 3, 5, 5))).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if recording:
                recording.add(step)
        return model.state_dict()

    plain, beside = train(False), train(True)
    for name, tensor in plain.items():
        assert torch.equal(tensor, beside[name]), name


def test_a_change_takes_two_bytes():
    """73,000 of 4.7 million candidates, of which 3,000 are exchanged at a moment."""
    graph = NeuralGraph((256, *[512] * 6), 72_990)
    recording = Recording(graph)
    size, generator = len(recording.to_bytes()), torch.Generator().manual_seed(0)
    assert size < 2 * 72_990
    with torch.no_grad():
        weight = graph.candidates.weight
        leaving = graph.real_index[torch.randperm(72_990, generator=generator)[:3000]]
        weight[leaving] = 0
        weight[torch.randint(len(weight), (3000,), generator=generator)] = 1
    recording.add(1)
    (_, (born, gone)) = recording["graph"].swaps()
    assert 5900 < born + gone <= 6000
    assert len(recording.to_bytes()) - size < 2 * (born + gone)
    assert recording["graph"].weights(0) is None
    assert "edge_weight" not in recording["graph"].to_data()


def test_a_moment_of_a_small_graph_takes_two_bytes_per_edge():
    graph = NeuralGraph((64, 128, 128), 4000, wiring="random_graph")
    recording = Recording(graph)
    size = len(recording.to_bytes())
    for step in range(1, 6):
        torch.nn.init.normal_(graph.candidates.weight)
        recording.add(step)
    assert not recording["graph"].swaps().any()
    assert len(recording.to_bytes()) - size < 5 * (2 * 4000 + 320 / 8 + 100)  # with a line of the header


def test_a_file_has_no_pickle(tmp_path):
    _, recording, _ = recorded(2)
    recording.save(tmp_path / "a")
    content = (tmp_path / "a").read_bytes()
    assert not zipfile.is_zipfile(tmp_path / "a")
    with pytest.raises(ValueError, match="opcode"):
        list(pickletools.genops(io.BytesIO(content)))


@pytest.mark.parametrize("place", [0, 25, 60, -1])
def test_damage_is_told(tmp_path, place):
    _, recording, _ = recorded(2)
    content = bytearray(recording.to_bytes())
    content[place] ^= 1
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(InputError, match=r"is damaged: its checksum|is not a recording"):
        Recording.load(tmp_path / "a")


def sealed(head, content):
    """A file with another head, or other content, whose checksum is right."""
    head = json.dumps(head).encode()
    rest = len(head).to_bytes(8, "little") + head + content
    return MAGIC + hashlib.blake2b(rest, digest_size=16).digest() + rest


WRONG = {
    "no graphs": lambda head: head.pop("graphs"),
    "a number as moments": lambda head: head.update(moments=3),
    "no moment": lambda head: head.update(moments=[]),
    "a moment twice": lambda head: head["moments"].__setitem__(1, head["moments"][0]),
    "moments too many": lambda head: head["moments"].append([99, 1.0]),
    "a graph twice": lambda head: head["graphs"].append(head["graphs"][0]),
    "a graph fewer": lambda head: head["graphs"].pop(),
    "overlapping blocks": lambda head: head["graphs"][0].update(candidate_blocks=[[0, 3, 3, 8], [0, 3, 3, 8]]),
    "a block of three": lambda head: head["graphs"][0].update(candidate_blocks=[[0, 3, 3]]),
    "nodes that are none": lambda head: head["graphs"][0]["nodes"].__setitem__(0, [2.5]),
    "a change of text": lambda head: head["graphs"][0]["changes"][0].__setitem__(0, "9"),
    "more born than there are": lambda head: head["graphs"][0]["changes"][0].__setitem__(0, 2**40),
    "a negative length": lambda head: head["graphs"][0]["changes"][0].__setitem__(2, -1),
    "a longer change": lambda head: head["graphs"][0]["changes"][0].__setitem__(2, 10**9),
    "more gone than there are": lambda head: head["graphs"][0]["changes"][1].__setitem__(1, 47),
    "descending quantiles": lambda head: head["graphs"][0]["changes"][0].__setitem__(7, 0.0),
    "no number": lambda head: head["graphs"][0]["changes"][0].__setitem__(4, float("nan")),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_head_that_cannot_be_is_refused(wrong):
    content = recorded(2)[1].to_bytes()
    at = len(MAGIC) + 16
    end = at + 8 + int.from_bytes(content[at : at + 8], "little")
    head = json.loads(content[at + 8 : end])
    assert Recording.from_bytes(sealed(head, content[end:])).to_bytes()
    WRONG[wrong](head)
    with pytest.raises(InputError, match="the recording"):
        Recording.from_bytes(sealed(head, content[end:]))


@pytest.mark.parametrize("bad", [b"", b"no zlib", zlib.compress(b"12"), zlib.compress(bytes(10**7))])
def test_a_moment_that_cannot_be_is_refused(bad):
    recording = recorded(2)[1]
    graph = recording["first"]
    graph.changes[1] = replace(graph.changes[1], content=bad)
    graph = Recording.from_bytes(recording.to_bytes())["first"]
    assert len(graph.edges(0)) == 20
    with pytest.raises(InputError, match="first: moment 1 of the recording is damaged"):
        graph.edges(1)


def _edges(index):
    return np.diff(index, prepend=0).astype("<u4").view(np.uint8).reshape(-1, 4).T.tobytes()


CONTRADICTIONS = {
    "an edge that is no candidate": lambda plain, born, real: b"\xff" + plain[1:],
    "an edge born twice": lambda plain, born, real: _edges(real[:born]) + plain[4 * born :],
    "an edge gone that was not real": lambda plain, born, real: 2 * plain[: 4 * born] + plain[8 * born :],
    "edges in no order": lambda plain, born, real: _edges(np.zeros(born, int)) + plain[4 * born :],
    "an infinite weight": lambda plain, born, real: plain[:-40] + bytes(20) + b"\x7c" * 20,
    "a byte more": lambda plain, born, real: plain + b"0",
}


@pytest.mark.parametrize("wrong", CONTRADICTIONS)
def test_a_moment_that_contradicts_the_others_is_refused(wrong):
    recording = recorded(2)[1]
    graph = recording["first"]
    change, real = graph.changes[1], np.setdiff1d(graph.edges(0), graph.gone(1))
    assert change.born == change.gone > 1
    content = CONTRADICTIONS[wrong](zlib.decompress(change.content), change.born, real)
    graph.changes[1] = replace(change, content=zlib.compress(content))
    graph = Recording.from_bytes(recording.to_bytes())["first"]
    with pytest.raises(InputError, match="first: moment 1 of the recording is damaged: its content and header differ"):
        graph.lives()


def test_what_cannot_be_is_refused(tmp_path):
    model = Model()
    recording = Recording(model)
    recording.add(4)
    for step in (4, 3, -1):
        with pytest.raises(InputError, match=f"above that of the last moment, 4; got {step}"):
            recording.add(step)
    with pytest.raises(InputError, match="neither a neural graph nor a sparse layer"):
        Recording(nn.Linear(2, 2))
    with pytest.raises(InputError, match="every must be an integer >= 1; got 0"):
        Recording(model, every=0)
    with pytest.raises(InputError, match="cannot be read"):
        Recording.load(tmp_path / "missing")
    with pytest.raises(InputError, match=r"unknown graph 'frist': did you mean 'first'"):
        recording["frist"]
    with pytest.raises(InputError, match=r"moments are 0 … 1.*got 2"):
        recording["first"].edges(2)
    recording.save(tmp_path / "a")
    with pytest.raises(InputError, match="loaded without a model"):
        Recording.load(tmp_path / "a").add(5)
    with pytest.raises(InputError, match=r"of another model: name is 'first' in the recording, 'graph' in the model"):
        Recording.load(tmp_path / "a", NeuralGraph((3, 5, 6), 20))
    with pytest.raises(InputError, match="has 3 graphs, the model 1"):
        Recording.load(tmp_path / "a", NeuralGraph((3, 5, 6), 20, name="first"))


def test_discrete_graphs_and_rules_are_named():
    graph = NeuralGraph(num_nodes=9, num_inputs=2, num_outputs=3, num_edges=8, dynamics=Discrete(2), wiring=DNW())
    recorded = Recording(graph)["graph"]
    assert (recorded.dynamics, recorded.rule, recorded.nodes.num_nodes) == ("Discrete", "dnw", 9)
