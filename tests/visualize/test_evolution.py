"""Curves, animations and pages say what a recording holds."""

import base64
import json
import re
import shutil
import subprocess
from itertools import pairwise

import matplotlib as mpl

mpl.use("Agg")

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from PIL import Image

from dnw_graph import Discrete, InputError, NeuralGraph
from dnw_graph.visualize import Recording, animate, plot_adjacency, plot_evolution, plot_training, save_page
from dnw_graph.visualize.evolution import _Film
from dnw_graph.visualize.style import BORN, KEPT


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


def shrinking(blocks, *numbers):
    """A recording of a graph that has fewer and fewer edges."""
    torch.manual_seed(0)
    graph = NeuralGraph(blocks, num_edges=numbers[0], name="shrinking")
    recording = Recording(graph)
    for step, number in enumerate(numbers[1:], 1):
        graph.rewire("dnw", number)
        recording.add(10 * step)
    return recording


def scales(graph):
    """Of every frame of an animation: the ends of the colours, those of the bar, its label, and the cells."""
    film, found = _Film(graph, list(range(len(graph)))), []
    for number in range(len(graph)):
        film.picture(number)
        mesh, bar = film.ax.collections[0], film.figure.axes[2]
        bounds = mesh.get_coordinates()[0, :, 0].tolist()
        found.append(((mesh.norm.vmin, mesh.norm.vmax), bar.get_ylim(), bar.get_ylabel(), bounds))
    return found


CYCLES = {"num_nodes": 9, "num_inputs": 2, "num_outputs": 2, "dynamics": Discrete(2)}


def test_the_colour_bar_of_an_animation_is_that_of_every_frame():
    torch.manual_seed(0)
    graph = NeuralGraph(**CYCLES, num_edges=20)
    recording = Recording(graph)
    for step in (1, 2):
        with torch.no_grad():
            graph.candidates.weight *= 0.2 if step == 2 else 25
        recording.add(step)
    weights = [recording["graph"].weights(moment) for moment in range(3)]
    most = max(np.quantile(np.abs(weight), 0.95) for weight in weights)
    assert most > 20 * np.quantile(np.abs(weights[0]), 0.95)
    for colours, bar, label, _ in scales(recording["graph"]):
        assert colours == bar == pytest.approx((-most, most))
        assert label.startswith("weight of a real edge")


@pytest.mark.parametrize(
    ("blocks", "numbers"), [((40, 120), (4700, 200, 100)), ((64, 192, 256), (30_000, 500))], ids=["small", "large"]
)
def test_frames_of_shares_have_one_scale_and_the_same_cells(blocks, numbers):
    frames = scales(shrinking(blocks, *numbers)["shrinking"])
    assert frames[0][0] == frames[0][1]
    assert all(frame == frames[0] for frame in frames)
    assert frames[0][0][0] == 0
    assert "real share" in frames[0][2]


def test_a_frame_counts_forward_edges_and_feedback_by_its_own_distances():
    torch.manual_seed(0)
    graph = NeuralGraph(num_nodes=30, num_inputs=3, num_outputs=4, num_edges=50, dynamics=Discrete(3))
    recording = Recording(graph)
    for step in (1, 2, 3):
        torch.nn.init.normal_(graph.candidates.weight)
        recording.add(step)
    film = _Film(recording["graph"], [0, 1, 2, 3])
    for moment in range(4):
        film.picture(moment)
        order, counts = film.ax.get_xlabel().split("\n")
        assert order == "source, nodes by distance at the last moment"
        alone = plot_adjacency(recording["graph"].to_data(moment)).get_xlabel().split("\n")
        assert alone == ["source", counts]


def test_zero_weights_are_grey_in_an_animation():
    for zero in (False, True):
        torch.manual_seed(0)
        graph = NeuralGraph((3, 4, 2), num_edges=12, wiring="random_graph")
        with torch.no_grad():
            graph.candidates.weight[graph.real_index[:5]] *= not zero
            film = _Film(Recording(graph)["graph"], [0])
        film.picture(0)
        labels = [text.get_text() for text in film.below.get_legend().get_texts()]
        assert labels == ["w > 0", "w < 0", *["w = 0"] * zero, "born", "going"]
        shades = film.ax.collections[0].get_colors()
        on_white = [1 - shade[3] * (1 - shade[:3]) for shade in shades]
        assert sum(np.abs(shade - to_rgb(KEPT)).max() < 0.06 for shade in on_white) == 5 * zero


def test_a_wiring_that_shrinks_from_unknown_weights(tmp_path):
    recording = shrinking((40, 120), 4700, 200, 100)
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
    assert len(decoded(drawn["weights"], np.float16)) == 200 + 100


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
    weights, at = decoded(found["weights"], np.float16), 0
    live = decoded(found["live"], np.uint8).reshape(5, 15)
    for moment in range(5):
        real = (birth <= moment) & (moment < death)
        data = graph.to_data(moment)
        np.testing.assert_array_equal(ends[:, real], data.edge_index)
        np.testing.assert_array_equal(live[moment], data.live_mask)
        np.testing.assert_array_equal(weights[at : at + real.sum()], data.edge_weight)
        at += real.sum()
        assert found["largest"][moment] == data.edge_weight.abs().max()


# What the script of a page needs of a browser. Notes are the strokes, as colour and opacity.
BROWSER = """
const fs = require("fs"), vm = require("vm"), elements = {}, notes = [];
const own = {stroke() { notes.push([pen.strokeStyle, pen.globalAlpha]); }};
const pen = new Proxy(own, {get: (_, key) => own[key] ?? (() => 0)}), box = {left: 0, top: 0, width: 1000, height: 640};
const text = fs.readFileSync(process.argv[2], "utf8");
const scripts = text.match(/json">(.*?)<.script>\\s*<script>(.*?)<.script>/s);
const element = () => ({
  style: {setProperty() {}}, clientWidth: 1000, clientHeight: 640, textContent: scripts[1],
  add() {}, getContext: () => pen, getBoundingClientRect: () => box, replaceChildren(...all) { this.all = all; }
});
const document = {createElement: element, getElementById: id => elements[id] ??= element()};
const browser = {location: {hash: ""}, devicePixelRatio: 1, addEventListener() {}, Option: class {}, document};
Object.assign(globalThis, browser, {notes});
vm.runInThisContext(scripts[2]);
process.stdout.write(JSON.stringify(vm.runInThisContext(process.argv[3])));
"""


def in_browser(recording, directory, expression):
    """Return the value of an expression within the page of a recording."""
    save_page(recording, directory / "page.html")
    (directory / "browser.js").write_text(BROWSER)
    command = ["node", str(directory / "browser.js"), str(directory / "page.html"), expression]
    return json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout)


needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="node runs the script of the page")


@needs_node
def test_the_page_says_the_recorded_weights_in_three_digits(tmp_path):
    torch.manual_seed(0)
    graph = NeuralGraph((4, 8, 3), num_edges=60)
    with torch.no_grad():
        graph.candidates.weight.copy_(torch.logspace(-4, 4, graph.num_candidates) * (-1) ** torch.arange(68))
    recording = Recording(graph)
    told = in_browser(recording, tmp_path, "present().map(edge => /, w (.*?):/.exec(tellEdge(edge))[1])")
    found = [float(text.replace("−", "-")) for text in told]
    np.testing.assert_allclose(found, graph.edge_weight, rtol=0.006)


@needs_node
@pytest.mark.parametrize("view", ["lines", "matrix"])
def test_the_page_describes_what_is_under_the_mouse_at_every_moment(tmp_path, view):
    recording = recorded(6)
    place = "position(5, 1000, 640)" if view == "lines" else "[frame(1000, 640).x(2.5), frame(1000, 640).y(7.5)]"
    expression = f"""
      choose(0); $("view").onchange({{target: {{value: "{view}"}}}}); go(0);
      const [x, y] = {place}, kept = [], fresh = [], note = into => into.push($("told").textContent);
      const point = () => $("picture").onmousemove({{clientX: x, clientY: y}}), leave = $("picture").onmouseleave;
      point();
      for (let m = 0; m < 6; m++) {{ go(m); note(kept); }}
      for (let m = 0; m < 6; m++) {{ leave(); go(m); note(fresh); point(); note(fresh); }}
      [kept, fresh]"""
    kept, fresh = in_browser(recording, tmp_path, expression)
    assert kept == fresh[1::2]
    assert len({*kept}) > 1
    assert {*fresh[::2]} == {"Point at a node, an edge or a cell."}
    graph = recording["a</script>b"]
    for moment, text in enumerate(kept):
        source, target = graph.pairs(graph.edges(moment))
        if view == "lines":
            assert f"{(target == 5).sum()} edges in, {(source == 5).sum()} out" in text
        else:
            assert text.startswith("edge 2 → 7") == bool(((source == 2) & (target == 7)).any()) or "gone at" in text


@needs_node
def test_zero_weights_are_grey_in_a_page(tmp_path):
    graph = NeuralGraph((3, 4, 2), num_edges=12, wiring="random_graph")
    with torch.no_grad():
        graph.candidates.weight[graph.real_index[:5]] = 0
    expression = """$("view").onchange({target: {value: "lines"}}); notes.length = 0; draw();
      [notes, $("legend").all.map(row => row.textContent)]"""
    strokes, rows = in_browser(Recording(graph), tmp_path, expression)
    grey = [opacity for colour, opacity in strokes[:12] if colour == "#202020"]
    assert len(grey) == 5
    assert min(grey) >= 0.25
    assert rows[:3] == ["w > 0", "w < 0", "w = 0"]


@needs_node
def test_a_page_says_whose_distances_order_the_nodes(tmp_path):
    rows = '$("legend").all.map(row => row.textContent)'
    assert "by distance at the last moment" in in_browser(recorded(**CYCLES), tmp_path, rows)[-1]
    assert not any("distance" in row for row in in_browser(recorded(), tmp_path, rows))


@needs_node
def test_the_graph_that_an_address_names_is_selected(tmp_path):
    model = torch.nn.ModuleList([NeuralGraph((3, 4, 2), num_edges=12, name=name) for name in ("first", "second")])
    expression = 'choose(1); [$("graph").selectedIndex, g.name]'
    assert in_browser(Recording(model), tmp_path, expression) == [1, "second"]


def test_curves_of_a_run_are_those_of_its_table(tmp_path):
    (tmp_path / "metrics.csv").write_text(
        "epoch,step,train/loss,val/top1,wiring/live_nodes\n0,9,2.5,,\n0,10,,0.25,0.5\n1,19,1.5,,\n1,20,,0.75,0.25\n"
    )
    figure = plot_training(tmp_path)
    loss, accuracy, live = figure.axes
    assert figure.get_suptitle() == f"{tmp_path.name}, up to epoch 2"
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
