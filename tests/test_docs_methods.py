"""docs/methods.md says of each method what its class says."""

from __future__ import annotations

import dataclasses
import re

import pytest
from training_runs import REPOSITORY

from fflfast import methods
from fflfast.methods.base import CIFAR_RECIPE, MethodOptions

TEXT = (REPOSITORY / "docs" / "methods.md").read_text(encoding="utf-8")


def rows(head):
    """The cells of each method's row in the table with this head."""
    lines = TEXT[TEXT.index(head) :].partition("\n\n")[0].splitlines()[2:]
    cells = [[cell.strip() for cell in line[1:-1].split("|")] for line in lines]
    return {re.search(r"`(\w+)`", row[0])[1]: row for row in cells}


def short(value):
    """A number as the page writes it, 2.5e-4."""
    return f"{value:g}" if value >= 0.01 else re.sub(r"\.?0*e-0", "e-", f"{value:.3e}")


LOSSES = rows("| method | loss |")
NEEDS = rows("| method | networks | unlike")
RECIPES = rows("| method | recipe, where")


def test_every_method_is_on_the_page():
    names = set(methods.available())
    assert set(LOSSES) == set(NEEDS) == names
    assert set(RECIPES) == names - {"single"}
    recommended = TEXT[TEXT.index("| you want |") :].partition("\n\n")[0]
    assert set(re.findall(r"\| `(\w+)` \|", recommended)) == names
    assert set(re.findall(r"\]\(graphs/(\w+)\.svg\)", TEXT)) == names
    for name, row in LOSSES.items():
        assert f"(../fflfast/methods/{name}.py)" in row[0]


@pytest.mark.parametrize("name", methods.available())
def test_what_it_needs(name):
    kind, row = methods.resolve(name), NEEDS[name]
    assert row[1].startswith(str(kind.min_sub_networks))
    assert (kind.max_sub_networks is None) == ("or more" in row[1])
    if name != "single":
        assert (row[3] == "nothing") == (kind.shared_stages == -1)
    assert ("--teacher" in row[4]) == kind.needs_teacher
    assert ("stages" in row[4]) == kind.needs_stages


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_and_options(name):
    kind, (_, recipe, constants, own) = methods.resolve(name), RECIPES[name]
    options = kind.Options()
    ramp = f"{options.ramp_up_epochs:g}" if options.ramp_up_epochs else "–"
    assert constants == f"{options.temperature:g}, {ramp}"
    known = {field.name for field in dataclasses.fields(kind.Options)} - {
        f.name for f in dataclasses.fields(MethodOptions)
    }
    values = {str(getattr(options, field)) for field in known} | {"naive", "linear", "batch", "figure"}
    assert set(re.findall(r"`(\w+)`", own)) - values == known
    differs = {key: value for key, value in kind.recipe.items() if CIFAR_RECIPE.get(key) != value}
    said = {
        "weight_decay": lambda v: f"weight decay {short(v)}" if v else "no weight decay",
        "lr": lambda v: f"from {short(v)}",
        "batch_size": lambda v: f"batches of {v}",
        "epochs": lambda v: f"{v} epochs",
        "optimizer": lambda v: v,
        "schedule": lambda v: v,
        "milestones": lambda v: f"×0.1 at {v[0]} and {v[1]}",
        "rotation": lambda v: f"±{v:g}°",
        "scale": lambda v: f"±{100 * v:g} %",
    }
    for key in differs.keys() & said.keys():
        assert said[key](differs[key]) in recipe.lower(), key
    if not differs:
        assert not re.search(r"batches|epochs|cosine", recipe)


def test_the_output_by_which_each_is_judged():
    for name, row in LOSSES.items():
        bold = re.search(r"\*\*(.+?)\*\*", row[2])[1]
        assert bold == {"mcl_okd": "the last sub", "kd": "sub0", "single": "sub0"}.get(
            name, methods.resolve(name).main_output
        )
