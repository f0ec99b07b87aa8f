"""`fflfast plot graph METHOD`: the pictures of docs/graphs are what the methods train with today."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from training_runs import REPOSITORY

from fflfast import methods
from fflfast.graph import DistillGraph
from fflfast.training import ConfigError
from fflfast.training.graphs import draw_graph, plot_graph

PICTURES = REPOSITORY / "docs" / "graphs"
NETWORKS = {"single": 1, "kd": 1, "ffl": 2, "okddip": 4}  # of a picture in the docs; else 3


def texts(file: Path) -> list[str]:
    """Every text of an SVG, in the order in which it was drawn."""
    return [re.sub(r"<[^>]+>", "", line) for line in re.findall(r"<text.*?</text>", file.read_text("utf-8"), re.DOTALL)]


def arrows(file: Path) -> int:
    """How many lines end in an arrow, whose head alone is filled in this colour."""
    return len(re.findall(r"fill: #aa3377; stroke", file.read_text("utf-8")))


@pytest.mark.parametrize("name", methods.available())
def test_the_pictures_of_the_docs(tmp_path, name):
    count = NETWORKS.get(name, 3)
    file = plot_graph(name, count, tmp_path / "new" / f"{name}.svg")
    assert file.read_bytes() == (PICTURES / file.name).read_bytes(), (
        f"fflfast plot graph {name} --sub-networks {count} --out docs/graphs/{name}.svg"
    )


def test_no_other_pictures():
    assert {file.stem for file in PICTURES.iterdir()} == set(methods.available())


def test_every_box_and_every_arrow_is_there(tmp_path):
    graph = DistillGraph.okddip(3)
    draw_graph(graph, tmp_path / "a.svg", "title", 4)
    found = texts(tmp_path / "a.svg")
    assert {*graph.names, "title", "CE"} <= set(found)
    assert found.count("CE") == 4
    assert arrows(tmp_path / "a.svg") == len(graph.edges)
    assert any("dashed arrow" in line for line in found)
    assert any("dotted lines" in line for line in found)


def test_weights_are_written_beside_their_arrows(tmp_path):
    graph = DistillGraph(3, (1.0, 0.25, 0.0), (), ((2, 0, 0.7), (2, 1, 1.0)))
    draw_graph(graph, tmp_path / "a.svg", "t", 2, ("feature/a", "feature/b"))
    found = texts(tmp_path / "a.svg")
    assert found.count("0.7") == 1
    assert "0.25 CE" in found
    assert "further terms: feature/a, feature/b" in found
    assert not any("dashed" in line or "dotted" in line for line in found)


def test_a_method_of_the_users_own(tmp_path, monkeypatch):
    (tmp_path / "theirs.py").write_text(
        "from fflfast import DistillGraph\nfrom fflfast.methods import Method\n\n\nclass Theirs(Method):\n"
        "    extra_term_names = ('own/term',)\n\n    def __init__(self, cohort, num_classes, options=None):\n"
        "        super().__init__(cohort, num_classes, options)\n        self.graph = DistillGraph.cl(len(cohort))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    state = torch.get_rng_state()
    file = plot_graph("theirs:Theirs", 4)
    assert file == Path("Theirs.svg")
    assert {"Theirs, 4 networks", "others3", "further terms: own/term"} <= set(texts(file))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_png(tmp_path):
    assert plot_graph("dml", out=tmp_path / "a.PNG").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("fll", None, "a.svg"), "METHOD: .*did you mean 'ffl'"),
        (("ffl", 1, "a.svg"), "--sub-networks 1: .*at least 2"),
        (("single", 2, "a.svg"), "--sub-networks 2: .*at most 1"),
        (("ffl", 0, "a.svg"), "--sub-networks: expected at least 1, got 0"),
        (("ffl", 2, "a.xyz"), r"--out a\.xyz: expected a file that ends in \..*svg"),
        (("ffl", 2, "there.svg"), r"--out there\.svg: expected a file"),
        (("ffl", 2, "file/a.svg"), r"--out file/a\.svg: "),
    ],
)
def test_what_cannot_be_drawn(tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    Path("there.svg").mkdir()
    Path("file").write_text("")
    with pytest.raises(ConfigError, match=words):
        plot_graph(*arguments)
    assert {path.name for path in tmp_path.iterdir()} == {"there.svg", "file"}
