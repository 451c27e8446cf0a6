"""What is installed: the files of the package, which work without the optional dependencies."""

import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from PIL import Image

import dnw_graph

ROOT = Path(dnw_graph.__file__).parents[1]
BUILD = "import sys, setuptools.build_meta as build; print(getattr(build, f'build_{sys.argv[1]}')(sys.argv[2]))"
BASE = """
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, *args):
        return None if name.partition(".")[0] in sys.argv[1].split(",") else self.finder.find_spec(name, *args)

sys.meta_path[:] = map(Without, sys.meta_path)
import torch
from dnw_graph import NeuralGraph, attach, compact, cost, load, pretrained, sparsify
from dnw_graph.cli import main
from dnw_graph.compaction import save_compact

model = torch.nn.Sequential(NeuralGraph((4, 8, 4), 20), torch.nn.Conv2d(4, 3, 5))
sparsify(model[1], 0.5, "rigl")
optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
attach(model, optimizer, 10)
model(torch.randn(2, 4, 5, 5)).square().mean().backward()
optimizer.step()
cost(model.eval(), (4, 5, 5))
x = torch.randn(2, 4, 5, 5)
small = compact(model)
torch.testing.assert_close(small(x), model(x))
save_compact(small, "small.safetensors")
torch.testing.assert_close(load("small.safetensors")(x), model(x))
model[0].to_data().validate()
sys.exit(main(["predict", str(pretrained()[0].path), "image.png"]))
"""


def built(kind: str, source: Path, target: Path) -> Path:
    command = [sys.executable, "-c", BUILD, kind, str(target)]
    result = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return target / result.stdout.splitlines()[-1]


@pytest.mark.slow
def test_a_wheel_from_the_source_distribution_has_the_files_of_the_package(tmp_path: Path):
    pytest.importorskip("setuptools", "77")
    if not (ROOT / ".git").exists():
        pytest.skip("the files are listed by git")
    command = ["git", "-C", str(ROOT), "ls-files", "dnw_graph"]
    files = {*subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()}
    assert "dnw_graph/py.typed" in files
    outside = {"LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py"}
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_something.py").touch()
    for name in files | outside:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    with tarfile.open(built("sdist", tmp_path, tmp_path / "dist")) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.glob("dnw_graph-*")
    found = {path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()}
    made = {"PKG-INFO", "setup.cfg"}
    assert {name for name in found if ".egg-info/" not in name} == files | outside | made
    with zipfile.ZipFile(built("wheel", source, tmp_path / "dist")) as archive:
        assert {name for name in archive.namelist() if ".dist-info/" not in name} == files


def test_the_base_install_trains_compacts_and_predicts(tmp_path: Path):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    packages = {re.split(r"[\[>=]", each)[0] for name, some in extras.items() if name != "dev" for each in some}
    modules = {"yaml", "pytorch_lightning", "sklearn", *(each.replace("-", "_") for each in packages)}
    modules.remove("networkx")  # PyTorch needs it.
    assert {"lightning", "jsonargparse", "torch_scatter"} <= modules
    Image.new("RGB", (40, 40), "green").save(tmp_path / "image.png")
    command = [sys.executable, "-c", BASE, ",".join(modules)]
    result = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "image.png" in result.stdout
