"""Damaged, foreign and hostile files of every kind that the package reads.

A file is read by what a command or a user reads it with. Bad is an error that is no ``InputError``, code that was run,
memory beyond reason, and a file that was accepted although it does not hold, bit for bit, what was written.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import json
import logging
import math
import pickle
import random
import resource
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from fuzz import Bad, Case
from jsonargparse import ArgumentError
from lightning.pytorch import Trainer
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from dnw_graph import InputError, NeuralGraph
from dnw_graph.checkpoint import SECTION, read_checkpoint
from dnw_graph.compaction import compact, load_compact, save_compact
from dnw_graph.data.images import ArrayImages
from dnw_graph.data.sources import digits
from dnw_graph.recipes.second_stage import second_stage
from dnw_graph.sparse_layers import sparsify
from dnw_graph.training import (
    SCHEDULES,
    Checkpoints,
    Classifier,
    DataModule,
    ImageData,
    RunOptions,
    TrainingCost,
    WiringMonitor,
    WiringOptions,
    WiringRecorder,
    run,
)
from dnw_graph.training.checkpoints import WholeFileIO
from dnw_graph.training.command_line import read_options
from dnw_graph.training.resuming import check_same_run
from dnw_graph.visualize import Recording, plot, plot_evolution, save_page
from dnw_graph.visualize.recording import MAGIC

try:
    from dnw_graph.checksum import checksum
    from dnw_graph.training.resuming import check_resumable, check_weights
except ImportError:  # before there were checks, PyTorch and Lightning found out
    checksum = check_resumable = check_weights = None

MEMORY = 2**28  # Bytes that reading a file of some kilobytes may take.
STEPS = 4  # Of the run that is resumed.
BAD_VALUES = (None, "x", -1, 2**70, 1.5, math.inf, math.nan, [], {}, True, [[1]], {"a": 1})


def cases(rng: random.Random, count: int) -> Iterator[Case]:
    """Yield cases of all kinds, most of them of checkpoints."""
    makers = (resumed, evaluated, completed, resumed, compacted, compacted, loaded, configured, recorded, recorded)
    for number in range(count):
        description, call = makers[number % len(makers)](random.Random(rng.random()))
        yield description, partial(_watched, call)


def _watched(call: Callable[[], object]) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        try:
            call()
        finally:
            if _harm().exists():
                _harm().rmdir()
                raise Bad("code in the file was run")
            if (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 > MEMORY:
                raise Bad("the file took memory beyond reason")


_HELD: list[Any] = []


@cache
def _folder() -> Path:
    _HELD.append(tempfile.TemporaryDirectory(prefix="dnw_graph_files_"))
    return Path(_HELD[-1].name)


def _harm() -> Path:
    return _folder() / "harm"


def _written(name: str, content: bytes) -> Path:
    path = _folder() / name
    path.write_bytes(content)
    return path


for _name in ("lightning.pytorch", "lightning.fabric"):
    logging.getLogger(_name).setLevel(logging.WARNING)


# What can happen to the bytes of a file, and to what it says.


def _damaged(rng: random.Random, data: bytes) -> tuple[str, bytes]:
    """Return other bytes than a file's."""
    first, second = sorted(rng.randrange(len(data)) for _ in range(2))
    length = min(second - first + 1, rng.choice((1, 8, 64, 4096)))
    flipped = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        flipped[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    kind, result = rng.choice(
        [
            *[("bits flipped", bytes(flipped))] * 4,
            ("cut", data[:first]),
            ("more at the end", data + rng.randbytes(length)),
            ("zeros", data[:first] + bytes(length) + data[first + length :]),
            ("noise", data[:first] + rng.randbytes(length) + data[first + length :]),
            ("a part twice", data[: first + length] + data[first:]),
            ("a part missing", data[:first] + data[first + length :]),
            ("two halves exchanged", data[first:] + data[:first]),
        ]
    )
    return f"{kind}, at byte {first}", result


def _places(content: Any, path: str = "") -> Iterator[tuple[Any, Any, str]]:
    """Yield every place in nested dicts and lists: the container, the key and the way there."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        yield content, key, f"{path}.{key}"
        yield from _places(value, f"{path}.{key}")


def _changed(rng: random.Random, content: Any, value_too: bool) -> str:
    """Change one place in nested content and say how.

    Args:
        rng: Where the change is drawn from.
        content: The content, changed in place.
        value_too: Whether a value may become another of its kind, which nothing but a checksum can tell.
    """
    container, key, where = rng.choice(list(_places(content)))
    value = container[key]
    kinds = ["deleted", "of another kind", "of another kind", *(["renamed"] if isinstance(container, dict) else [])]
    if isinstance(value, Tensor):
        kinds += ["of another shape", "not finite", "of another type", "huge"] + ["another value"] * 3 * value_too
    elif type(value) in (int, float, str, bool):
        kinds += ["another value"] * 2 * value_too
    kind = rng.choice(kinds)
    if kind == "deleted":
        del container[key]
    elif kind == "renamed":
        container[rng.choice((f"{key}s", "", 7, "x" * 10_000))] = container.pop(key)
    elif kind == "of another kind":
        values = [each for each in BAD_VALUES if type(each) is not type(value)]
        container[key] = rng.choice([*values, torch.zeros(3)])
    elif kind == "of another shape":
        container[key] = rng.choice((value[None], value.flatten()[:-1], value.new_zeros(2, 3, 5)))
    elif kind == "not finite":
        container[key] = torch.full(value.shape, rng.choice((math.inf, math.nan)))
    elif kind == "of another type":
        container[key] = value.to(torch.complex64 if value.dtype == torch.int64 else torch.int64)
    elif kind == "huge":
        container[key] = value.flatten()[:1].expand(10**6, 10**6)
    elif isinstance(value, Tensor) and value.numel():
        raw = value.detach().clone().contiguous()
        raw.view(-1).view(torch.uint8)[rng.randrange(raw.nbytes)] ^= 1 << rng.randrange(8)
        container[key] = raw
    else:
        container[key] = not value if type(value) is bool else value + value + type(value)(1)
    return f"{where} is {kind}"


def _compare(found: Any, expected: Any, where: str = "") -> None:
    """Refuse what is not the same, bit for bit."""
    if isinstance(expected, Tensor):
        same = isinstance(found, Tensor) and (found.dtype, found.shape) == (expected.dtype, expected.shape)
        same = same and found.detach().numpy().tobytes() == expected.detach().numpy().tobytes()
        if not same:
            raise Bad(f"accepted, but other than what was written: {where}")
    elif isinstance(expected, dict):
        if not isinstance(found, dict) or found.keys() != expected.keys():
            raise Bad(f"accepted, with other names: {where}")
        for key, value in expected.items():
            _compare(found[key], value, f"{where}.{key}")
    elif isinstance(expected, list | tuple):
        if not isinstance(found, list | tuple) or len(found) != len(expected):
            raise Bad(f"accepted, with another length: {where}")
        for number, value in enumerate(expected):
            _compare(found[number], value, f"{where}.{number}")
    elif found != expected or type(found) is not type(expected):
        raise Bad(f"accepted, but other than what was written: {where}")


# Checkpoints


class Model(nn.Module):
    """A stem, a graph and a sparse classifier."""

    def __init__(self, wiring: str) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, 2, 1)
        self.graph = NeuralGraph((4, 8, 6), 40, wiring=wiring, name="fuzzed")
        self.classifier = nn.Linear(6, 10)
        if wiring != "complete":
            sparsify(self.classifier, 0.5, wiring)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.graph(self.stem(x)).mean((2, 3)))


@cache
def _images() -> ImageData:
    whole = digits()
    parts = [
        ArrayImages(part.pixels[:count], part.labels[:count])  # type: ignore[attr-defined]
        for part, count in ((whole.train, 70), (whole.test, 30))
    ]
    return ImageData("digits", *parts, whole.classes)


def _options(**more: Any) -> RunOptions:
    return RunOptions(image_size=8, batch_size=16, epochs=1, lr=0.3, accelerator="cpu", workers=0, **more)


@cache
def _run(wiring: str) -> Path:
    """Return the folder of a finished run."""
    folder = _folder() / wiring
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        run(lambda *_: Model(wiring), {"wiring": wiring}, _options(output=str(folder)), _images())
    return folder


@cache
def _original(path: Path) -> dict[str, Any]:
    return read_checkpoint(path)


def _checkpoint(rng: random.Random, path: Path) -> tuple[str, bytes, bool]:
    """Return what happened to a checkpoint, its bytes, and whether its writer wrote it so."""
    kind = rng.choice(("bytes", "bytes", "content", "content", "sealed", "hostile"))
    if kind == "bytes":
        return *_damaged(rng, path.read_bytes()), False
    if kind == "hostile":
        name = rng.choice(list(HOSTILE))
        return name, HOSTILE[name](), False
    content = copy.deepcopy(_original(path)) if kind == "sealed" else torch.load(path, weights_only=True)
    what = _changed(rng, content, kind == "content")
    if kind == "content":
        buffer = io.BytesIO()
        torch.save(content, buffer)
        return what, buffer.getvalue(), False
    sealed = _folder() / "sealed"
    try:
        WholeFileIO().save_checkpoint(content, sealed)
    except Exception:  # what cannot be written cannot be read either
        return f"{what}, not written", b"", False
    return f"{what}, by its writer", sealed.read_bytes(), True


def resumed(rng: random.Random) -> Case:
    """A checkpoint and ``--resume``."""
    path = _run("random_graph") / "last.ckpt"
    original = _original(path)
    what, data, sealed = _checkpoint(rng, path)

    def call() -> None:
        path = _written("resumed.ckpt", data)
        checkpoint = read_checkpoint(path)
        then = original[SECTION]["options"]
        check_same_run(str(path), checkpoint[SECTION]["options"], then, list(then))
        options = _options()
        model = Model("random_graph")
        module = Classifier(model, 10, SCHEDULES["cosine"](STEPS), options.lr, 0.9, 5e-5, 0)
        callbacks = [
            WiringMonitor(model),
            WiringRecorder(model=model),
            TrainingCost(model),
            Checkpoints(_folder(), 0, then),
        ]
        trainer = Trainer(
            accelerator="cpu", max_epochs=1, logger=False, callbacks=callbacks, plugins=[WholeFileIO()],
            enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
            use_distributed_sampler=False,
        )  # fmt: skip
        if check_resumable:
            check_resumable(str(path), checkpoint, trainer, callbacks, module, STEPS)
        # The run has ended: it restores all and does no step.
        trainer.fit(module, DataModule(_images(), options), ckpt_path=path, weights_only=True)
        if not sealed:
            found = {
                "state_dict": dict(module.state_dict()),
                "optimizer_states": [each.state_dict() for each in trainer.optimizers],
                "callbacks": {each.state_key: each.state_dict() for each in callbacks},
                "global_step": trainer.global_step,
            }
            seconds = original["callbacks"]["Checkpoints"]["seconds"]
            found["callbacks"]["Checkpoints"]["seconds"] = seconds  # the clock runs
            _compare(found, {name: original[name] for name in found})

    return f"--resume: {what}", call


def evaluated(rng: random.Random) -> Case:
    """A checkpoint and ``--evaluate``."""
    path = _run("random_graph") / "last.ckpt"
    what, data, sealed = _checkpoint(rng, path)

    def call() -> None:
        weights = read_checkpoint(_written("evaluated.ckpt", data))["state_dict"]
        module = Classifier(Model("random_graph"), 10, SCHEDULES["cosine"](STEPS), 0.1, 0.9, 0.0, 0)
        if check_weights:
            check_weights("evaluated.ckpt", weights, module.state_dict(), "give another")
        try:
            module.load_state_dict(weights)
        except RuntimeError as error:  # as the command does
            raise InputError("the weights do not fit") from error
        if not sealed:
            _compare(dict(module.state_dict()), dict(_original(path)["state_dict"]))

    return f"--evaluate: {what}", call


def completed(rng: random.Random) -> Case:
    """A checkpoint of the run of a complete graph and ``--complete``."""
    folder = _run("complete")
    name = rng.choice(("first.ckpt", "last.ckpt"))
    what, data, sealed = _checkpoint(rng, folder / name)

    def stage(folder: Path) -> dict[str, Tensor]:
        return dict(second_stage("lottery_ticket", folder, Model("complete"), {"image_size": 8}).state_dict())

    def call() -> None:
        copied = _folder() / "copied"
        shutil.copytree(folder, copied, ignore=lambda _, names: [n for n in names if not n.endswith(".ckpt")])
        try:
            (copied / name).write_bytes(data)
            found = stage(copied)
        finally:
            shutil.rmtree(copied)
        if not sealed:
            _compare(found, stage(folder))

    return f"--complete, {name}: {what}", call


# Files that nobody wrote by accident


def _archive(program: bytes, records: dict[str, bytes] | None = None) -> bytes:
    """Return an archive as ``torch.save`` writes it, with a pickle and records of one's own."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in {"data.pkl": program, "byteorder": b"little", "version": b"3\n", **(records or {})}.items():
            archive.writestr(f"archive/{name}", data)
    return buffer.getvalue()


class _Harm:
    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return os.mkdir, (str(_harm()),)


def _saved(content: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def _claiming(number: bytes) -> bytes:
    """A file with a tensor of four numbers that claims to have another number of them."""
    with zipfile.ZipFile(io.BytesIO(_saved({SECTION: {"format": 2}, "x": torch.zeros(4)}))) as archive:
        program = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
    program = program.replace(b"K\x04tq", number + b"tq").replace(b"K\x04\x85", number + b"\x85")
    return _archive(program, {"data/0": bytes(16)})


def _nested() -> bytes:
    content: list[Any] = []
    for _ in range(60):
        content = [content, content]
    return _saved({SECTION: {"format": 2, "options": {}}, "x": content})


def _recursive() -> bytes:
    content: list[Any] = []
    content.append(content)
    return _saved({SECTION: {"format": 2, "options": {}}, "x": content})


@cache
def _bomb() -> bytes:
    """An archive of half a megabyte that would be half a gigabyte."""
    buffer = io.BytesIO(_archive(b"\x80\x02}.", {"data/0": bytes(16)}))
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/version", "3\n")
        with archive.open("archive/data.pkl", "w") as entry:
            entry.write(b"\x80\x02")
            for _ in range(512):
                entry.write(b"N0" * 2**19)  # None, and away with it
            entry.write(b"}.")
    return buffer.getvalue()


HUGE = b"\x8a\x08" + (10**12).to_bytes(8, "little")
HOSTILE: dict[str, Callable[[], bytes]] = {
    "code in a checkpoint": lambda: _saved({SECTION: {"format": 2, "options": {}}, "x": _Harm()}),
    "code in a pickle": lambda: pickle.dumps(_Harm()),
    "code in an old file": lambda: _saved(_Harm(), _use_new_zipfile_serialization=False),
    "an old file": lambda: _saved({"x": torch.zeros(3)}, _use_new_zipfile_serialization=False),
    "a tensor that claims to be huge": lambda: _claiming(HUGE),
    "a tensor that claims to be larger": lambda: _claiming(b"K\x80"),
    "a huge expanded tensor": lambda: _saved({SECTION: {"format": 2}, "x": torch.zeros(1).expand(10**6, 10**6)}),
    "a huge bytearray": lambda: _archive(b"\x80\x02c__builtin__\nbytearray\n\x8a\x06" + b"\0" * 4 + b"\x00\x01\x85R."),
    "a large bytearray": lambda: _archive(b"\x80\x02c__builtin__\nbytearray\nJ\x00\x00\x00\x30\x85R."),
    "a huge tensor by name": lambda: _archive(b"\x80\x02ctorch\nTensor\nJ\x00\x00\x00\x10\x85R."),
    "lists of lists of lists": _nested,
    "a list of itself": _recursive,
    "a compressed archive": _bomb,
    "an archive of nothing": lambda: _archive(b"\x80\x02}."),
    "nothing": lambda: b"",
    "text": lambda: b"epoch: 3\n",
    "a number": lambda: _saved(3),
    "a list": lambda: _saved([1, 2]),
    "a foreign checkpoint": lambda: _saved({"state_dict": {"x": torch.zeros(3)}}),
}


# Compact models


@cache
def _compacted() -> tuple[bytes, dict[str, Tensor], dict[str, str]]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), NeuralGraph((4, 5, 3), 14), NeuralGraph((3, 4, 2), 8, input_function=False)
    )
    path = _folder() / "original.safetensors"
    save_compact(compact(model), path)
    with safe_open(path, framework="pt") as file:
        return path.read_bytes(), {name: file.get_tensor(name).clone() for name in file.keys()}, file.metadata()  # noqa: SIM118


def compacted(rng: random.Random) -> Case:
    """The file of a compact model, and ``load_compact``."""
    original, tensors, metadata = _compacted()
    tensors, metadata = copy.deepcopy(tensors), dict(metadata)
    kind = rng.choice(("bytes", "bytes", "tensors", "metadata", "config", "sealed", "length"))
    what, data = kind, original
    if kind == "bytes":
        what, data = _damaged(rng, original)
    elif kind == "length":
        length = rng.choice((0, 1, 10**9, 2**63, len(original), rng.randrange(2**64)))
        what, data = f"a header of {length} bytes", length.to_bytes(8, "little") + original[8:]
    else:
        config = json.loads(metadata["config"])
        part = rng.choice(("tensors", "config")) if kind == "sealed" else kind
        content = {"tensors": tensors, "metadata": metadata, "config": config}[part]
        what = f"{kind}: {_changed(rng, content, kind != 'sealed')}"
        try:
            if content is config:
                metadata["config"] = json.dumps(config)
            if kind == "sealed" and checksum:
                metadata.pop("checksum", None)
                metadata["checksum"] = checksum([metadata, tensors])
            data = save({str(k): v for k, v in tensors.items()}, {str(k): str(v) for k, v in metadata.items()})
        except Exception:  # what cannot be written cannot be read either
            what, data, kind = f"{what}, not written", b"", "nothing"

    def call() -> None:
        model = load_compact(_written("model.safetensors", data))
        x = torch.ones(2, 3, 8, 8)
        with torch.no_grad():
            out = model(x)
        if kind != "sealed":
            first = load_compact(_written("model.safetensors", original))
            _compare(dict(model.state_dict()), dict(first.state_dict()))
            with torch.no_grad():
                _compare(out, first(x))

    return f"load_compact: {what}", call


# Recordings


@cache
def _recording() -> bytes:
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 3, 3)
    sparsify(layer, 0.4)
    model = nn.Sequential(NeuralGraph((3, 5, 4), 17, name="fuzzed"), layer)
    recording = Recording(model)
    for step in range(1, 4):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        recording.add(step, step / 2)
    return recording.to_bytes()


def _parts_of_recording() -> tuple[dict[str, Any], list[bytes]]:
    """Return the head of a recording, and the content of every change."""
    rest = _recording()[len(MAGIC) + 16 :]
    at = 8 + int.from_bytes(rest[:8], "little")
    head, changes = json.loads(rest[8:at]), []
    for graph in head["graphs"]:
        for change in graph["changes"]:
            changes.append(rest[at : at + change[2]])
            at += change[2]
    return head, changes


def _forged(rng: random.Random, change: bytes) -> tuple[str, bytes]:
    """Return other content of a change, most of it as well compressed as before."""
    plain = zlib.decompress(change)
    kind, data = rng.choice(
        [
            *[_damaged(rng, plain)] * 4,
            ("nothing", b""),
            ("shorter", plain[: rng.randrange(len(plain))]),
            ("longer", plain + rng.randbytes(rng.choice((1, 2, 64)))),
            ("far longer", plain + bytes(10**7)),
            ("noise", rng.randbytes(len(plain))),
            ("all ones", b"\xff" * len(plain)),
        ]
    )
    packed = zlib.compress(data)
    return rng.choice([*[(kind, packed)] * 5, ("not compressed", data), ("compressed, cut", packed[:-3])])


def recorded(rng: random.Random) -> Case:
    """A recording, all that is read from it, and pictures of it."""
    original = _recording()
    head, changes = _parts_of_recording()
    what = kind = rng.choice(("bytes", "head", "head", "change", "change", "length"))
    data = original
    if kind == "bytes":
        what, data = _damaged(rng, original)
    else:
        if kind == "head":
            what = f"head: {_changed(rng, head, value_too=True)}"
        elif kind == "change":
            number = rng.randrange(len(changes))
            what, changes[number] = _forged(rng, changes[number])
            graph, place = divmod(number, len(head["moments"]))
            head["graphs"][graph]["changes"][place][2] = len(changes[number])
        try:
            packed = json.dumps(head).encode()
        except (TypeError, ValueError):  # what cannot be written cannot be read either
            packed = b"{}"
        length = rng.choice((0, 1, 2**40, 2**63, rng.randrange(2**64))) if kind == "length" else len(packed)
        rest = length.to_bytes(8, "little") + packed + b"".join(changes)
        data = MAGIC + hashlib.blake2b(rest, digest_size=16).digest() + rest

    def call() -> None:
        recording = Recording.load(_written("wiring.recording", data))
        if kind == "bytes" and recording.to_bytes() != original:
            raise Bad("accepted, but other than what was written")
        for graph in recording.graphs.values():
            for moment in range(len(graph)):
                found = graph.to_data(moment)
                found.validate()
                if found.num_edges and len({*map(tuple, found.edge_index.T.tolist())}) != found.num_edges:
                    raise Bad("accepted an edge twice")
                if not all(value.isfinite().all() for _, value in found if isinstance(value, Tensor)):
                    raise Bad("accepted what is not finite")
            if not (graph.lives()[1] < graph.lives()[2]).all():
                raise Bad("accepted an edge that is gone before it is born")
        save_page(recording, _folder() / "page.html")
        if rng.random() < 0.02:
            for graph in recording.graphs.values():
                plot_evolution(graph)
                plot(graph.to_data())

    return f"Recording.load: {what}", call


# Edges in a state dict


def _wrong_edges(rng: random.Random, index: Tensor, num_candidates: int) -> tuple[str, Tensor]:
    place = rng.randrange(len(index) - 1)

    def put(*values: int) -> Tensor:
        changed = index.clone()
        changed[place : place + len(values)] = torch.tensor(values)
        return changed

    return rng.choice(
        [
            ("reversed", index.flip(0)),
            ("in another order", index[torch.randperm(len(index), generator=torch.Generator().manual_seed(place))]),
            ("two exchanged", put(int(index[place + 1]), int(index[place]))),
            ("one twice", put(int(index[place + 1]))),
            ("one outside", put(num_candidates + rng.choice((0, 1, 2**40)))),
            ("one negative", put(-rng.choice((1, 2, 2**40)))),
            ("one missing", index[index != index[place]]),
            ("one more", torch.cat([index, torch.tensor([num_candidates - 1])])),
            ("int32", index.int()),
            ("float", index.float() + 0.5),
            ("bool", index.bool()),
            ("uint8", index.to(torch.uint8)),
            ("a matrix", index[None]),
            ("nothing", index[:0]),
            ("one flipped bit", put(int(index[place]) ^ 1 << rng.randrange(63))),
        ]
    )


def loaded(rng: random.Random) -> Case:
    """Edges in the state dict of a graph or a sparse layer, and ``load_state_dict``."""
    torch.manual_seed(rng.randrange(2**31))
    rule, layer = rng.choice(("random_graph", "lottery_ticket", "fine_tune")), rng.random() < 0.4
    assign, strict = rng.random() < 0.5, rng.random() < 0.7
    if layer:
        model: nn.Module = nn.Sequential(nn.Linear(8, 6))
        sparsify(model, 0.4, "random_graph")
        key, candidates = "0.parametrizations.weight.0.owned.0.wiring.index", 48
    else:
        model = NeuralGraph((3, 5, 4), 11, wiring=rule, input_function=False)
        key, candidates = "wiring.index", 47
    model.eval()
    state = copy.deepcopy(model.state_dict())
    count = len(state[key])
    index = torch.randperm(candidates)[:count].sort().values
    what, wrong = _wrong_edges(rng, index, candidates)
    state = {name: value + 1 if value.is_floating_point() else value for name, value in state.items()}
    state = {**state, key: wrong} if strict else {key: wrong}
    before = copy.deepcopy(dict(model.state_dict()))

    def call() -> None:
        try:
            model.load_state_dict(state, assign=assign, strict=strict)
        except InputError:
            _compare(dict(model.state_dict()), before)  # refused as a whole
            raise
        found = model.state_dict()[key]
        valid = found.dtype == torch.int64 and found.shape == (count,)
        if not valid or not torch.equal(found, found.clamp(0, candidates - 1).unique()) or len(found) != count:
            raise Bad("accepted edges that are none")
        if not torch.equal(found, wrong.to(found.dtype)):
            raise Bad("accepted edges that were not given")

    return f"load_state_dict of {'a layer' if layer else rule}: {what}, assign={assign}, strict={strict}", call


# Configuration files


class Options(WiringOptions):
    """Options of no model."""

    def with_wiring(self, *_: Any) -> nn.Module:
        raise NotImplementedError


CONFIG = """epochs: 3
lr: 0.1
wiring: dnw
wiring_options: {}
batch_size: 32
schedule: cosine
data: digits
image_size: null
check_images: true
precision: 32-true
output: null
"""
YAML_VALUES = (
    "null", "~", "[]", "{}", "&a [*a]", ".inf", "-.inf", ".nan", "1e400", "0x10", "1_000", "yes",
    "!!python/object:os.system x",
    "!!binary aGk=", "2001-01-01", "'", '"', "[", "{a: b", "|", ">", "*a", "@", "%", "\\t", "x\\ny", "-1", "0", "1.5",
    "9" * 400, "- 1", "? a", "x: y: z", "\\0", "[[[[[[[[[[1]]]]]]]]]]", "true", "''",
)  # fmt: skip


def configured(rng: random.Random) -> Case:
    """A YAML file and ``--config``."""
    lines = CONFIG.splitlines()
    place = rng.randrange(len(lines))
    name = lines[place].split(":")[0]
    kind = rng.choice(("value", "value", "value", "bytes", "name", "line"))
    if kind == "value":
        value = rng.choice(YAML_VALUES)
        lines[place] = f"{name}: {value}"
        what, data = lines[place], "\n".join(lines).encode()
    elif kind == "name":
        lines[place] = rng.choice(
            (f"{name}s: 1", ": 1", "1: 2", "null: 3", "[1]: 2", "config: x", f"{name}: 1\n{name}: 2")
        )
        what, data = lines[place], "\n".join(lines).encode()
    elif kind == "line":
        lines.insert(place, rng.choice(("- a", "---", "...", "\t", "a", "# \x07", "x" * 10_000, "<<: {epochs: 2}")))
        what, data = lines[place][:40], "\n".join(lines).encode()
    else:
        what, data = _damaged(rng, CONFIG.encode())

    def call() -> None:
        try:
            read_options("", Options, RunOptions(), ["--config", str(_written("config.yaml", data))])
        except ArgumentError as error:  # which the command prints as one line
            raise InputError(" ".join(str(error).split())[:400]) from error

    return f"--config: {what!r}", call
