"""Curves, animations and pages say what a recording holds."""

import base64
import json
import re
from itertools import pairwise

import matplotlib as mpl

mpl.use("Agg")

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from PIL import Image

from dnw_graph import Discrete, InputError, NeuralGraph
from dnw_graph.visualize import Recording, animate, plot_evolution, plot_training, save_page
from dnw_graph.visualize.style import BORN


def recorded(moments=5, epoch=lambda step: step / 2, **nodes):
    torch.manual_seed(0)
    graph = NeuralGraph(**(nodes or {"blocks": (4, 8, 3)}), num_edges=20, name="a</script>b")
    recording = Recording(graph)
    for step in range(1, moments):
        with torch.no_grad():
            graph.candidates.weight += 0.2 * torch.randn_like(graph.candidates.weight)
        recording.add(10 * step, epoch(step))
    return recording


def test_curves_are_those_of_the_recording():
    graph = recorded()["a</script>b"]
    figure = plot_evolution(graph)
    swaps, kept, spans, degrees, dead, magnitude = figure.axes
    born = graph.swaps()[:, 0]
    assert f"born: {born.sum()} in total" in swaps.get_legend().get_texts()[0].get_text()
    high = max(path.vertices[:, 1].max() for path in swaps.collections[0].get_paths())
    assert high == pytest.approx(born.max() / 0.5)  # per epoch
    first, last = (line.get_ydata() for line in kept.lines)
    sets = [set(graph.edges(n).tolist()) for n in range(5)]
    np.testing.assert_allclose(first, [len(sets[0] & now) / 20 for now in sets])
    np.testing.assert_allclose(last, [len(sets[-1] & now) / 20 for now in sets])
    lives, ended = graph.life_spans()
    assert sum(patch.get_height() for patch in spans.patches) == pytest.approx(len(lives))
    into = np.bincount(graph.pairs(graph.edges(4))[1], minlength=15)[4:]
    assert degrees.lines[0].get_ydata()[-1] == pytest.approx(np.quantile(into, 0.95))
    assert dead.get_title() == "dead nodes, of 15"
    np.testing.assert_allclose(magnitude.lines[0].get_ydata(), graph.magnitudes()[:, 2])
    assert "epoch 0 to 2" in figure.get_suptitle()
    assert ended.sum() == graph.swaps()[:, 1].sum()


def test_moments_of_one_epoch_are_drawn_by_step(tmp_path):
    graph = recorded(epoch=lambda step: 0.0)["a</script>b"]
    assert "step 0 to 40" in plot_evolution(graph).get_suptitle()
    animate(graph, tmp_path / "a.gif", seconds=1)
    assert (tmp_path / "a.gif").stat().st_size


@pytest.mark.parametrize(
    "nodes", [{}, {"num_nodes": 9, "num_inputs": 2, "num_outputs": 2, "dynamics": Discrete(2)}], ids=["lines", "matrix"]
)
def test_an_animation_has_a_frame_per_moment(tmp_path, nodes):
    animate(recorded(4, **nodes)["a</script>b"], tmp_path / "a.gif", seconds=2)
    image = Image.open(tmp_path / "a.gif")
    frames, times = [], []
    for number in range(image.n_frames):
        image.seek(number)
        frames.append(np.asarray(image.convert("RGB")).astype(int))
        times.append(image.info["duration"])
    assert times == [500, 500, 500, 2500]
    assert image.info["loop"] == 0
    assert all(np.abs(a - b).max() > 100 for a, b in pairwise(frames))
    if not nodes:
        green = 255 * np.array(to_rgb(BORN))
        above = [frame[: frame.shape[0] * 6 // 10] for frame in frames]
        near = [(np.abs(frame - green).max(-1) < 12).sum() for frame in above]
        assert near[0] == 0
        assert min(near[1:]) > 50


def test_a_wiring_that_shrinks_from_unknown_weights(tmp_path):
    torch.manual_seed(0)
    first = NeuralGraph((40, 120), num_edges=4700, name="shrinking")
    recording = Recording(first)
    for step, number in ((10, 200), (20, 100)):
        first.rewire("dnw", number)
        recording.add(step)
    only = recording["shrinking"]
    assert [only.weights(moment) is None for moment in range(3)] == [True, False, False]
    animate(only, tmp_path / "a.gif", seconds=1)
    save_page(recording, tmp_path / "page.html")
    content = re.search(
        r'<script id="data" type="application/json">(.*?)</script>', (tmp_path / "page.html").read_text()
    )
    assert content is not None
    (drawn,) = json.loads(content[1])["graphs"]
    assert [largest is None for largest in drawn["largest"]] == [True, False, False]
    assert len(base64.b64decode(drawn["weights"])) == 200 + 100


def test_few_frames_of_many_moments(tmp_path):
    animate(recorded(6)["a</script>b"], tmp_path / "a.gif", frames=2)
    assert Image.open(tmp_path / "a.gif").n_frames == 2


def decoded(text, kind):
    return np.frombuffer(base64.b64decode(text), kind)


def test_a_page_holds_the_recording_and_loads_nothing(tmp_path):
    recording = recorded()
    save_page(recording, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert not re.search(r"""(src|href)\s*=|https?://|@import|fetch\(""", text)
    assert text.count("</script>") == 2
    (content,) = re.findall(r'<script id="data" type="application/json">(.*?)</script>', text, re.DOTALL)
    (found,) = json.loads(content)["graphs"]
    graph = recording["a</script>b"]
    assert found["name"] == graph.name
    assert found["moments"] == [[m.step, m.epoch] for m in graph.moments]
    birth, death = (decoded(found[key], np.uint32) for key in ("birth", "death"))
    ends = np.stack([decoded(found[key], np.uint32) for key in ("source", "target")])
    weights, at = decoded(found["weights"], np.int8), 0
    live = decoded(found["live"], np.uint8).reshape(5, 15)
    for moment in range(5):
        real = (birth <= moment) & (moment < death)
        data = graph.to_data(moment)
        np.testing.assert_array_equal(ends[:, real], data.edge_index)
        np.testing.assert_array_equal(live[moment], data.live_mask)
        roots = weights[at : at + real.sum()].astype(float)
        at += real.sum()
        back = np.sign(roots) * (roots / 127) ** 2 * found["largest"][moment]
        np.testing.assert_allclose(back, data.edge_weight, atol=0.02 * found["largest"][moment])


def test_curves_of_a_run_are_those_of_its_table(tmp_path):
    (tmp_path / "metrics.csv").write_text(
        "epoch,step,train/loss,val/top1,wiring/live_nodes\n0,9,2.5,,\n0,10,,0.25,0.5\n1,19,1.5,,\n1,20,,0.75,0.25\n"
    )
    figure = plot_training(tmp_path)
    loss, accuracy, live = figure.axes
    assert figure.get_suptitle() == f"{tmp_path.name}, 2 epochs"
    assert [ax.get_title() for ax in (loss, accuracy, live)] == ["loss", "accuracy", "live nodes"]
    assert loss.lines[0].get_xydata().tolist() == [[9, 2.5], [19, 1.5]]
    assert accuracy.lines[0].get_xydata().tolist() == [[10, 0.25], [20, 0.75]]
    assert live.lines[0].get_xydata().tolist() == [[10, 0.5], [20, 0.25]]
    live.set_ylim(0.484, 0.491)
    figure.canvas.draw()
    labels = [label.get_text() for label in live.get_yticklabels()]
    assert len({*labels}) == len(labels) > 3


def test_what_cannot_be_shown_is_refused(tmp_path):
    graph = recorded(2)["a</script>b"]
    with pytest.raises(InputError, match="frames must be an integer >= 1; got 0"):
        animate(graph, tmp_path / "a.gif", frames=0)
    with pytest.raises(InputError, match="seconds must be a number above 0; got -1"):
        animate(graph, tmp_path / "a.gif", seconds=-1)
    with pytest.raises(InputError, match="cannot write"):
        save_page(graph, tmp_path / "missing" / "a.html")
    with pytest.raises(InputError, match="cannot be read"):
        plot_training(tmp_path / "missing.csv")
    for text, message in (
        ("a,step\n1,2\n", "has no curve of a run"),
        ("step,val/top1\n1,x\n", "has 'x' under val/top1"),
    ):
        (tmp_path / "metrics.csv").write_text(text)
        with pytest.raises(InputError, match=message):
            plot_training(tmp_path)
