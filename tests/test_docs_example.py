"""The method of one's own in docs/methods.md: the file is the one shown, and the commands run it as a user would."""

from __future__ import annotations

import json
import re
import shlex
import shutil

import pytest
import torch
from method_truths import CLASSES, assert_learns, batch, ce, kl, make_cohort
from training_runs import REPOSITORY, start

from fflfast.cohort import Learner
from fflfast.methods import Method
from fflfast.training import ConfigError

DOCUMENT = (REPOSITORY / "docs" / "methods.md").read_text(encoding="utf-8")
SECTION = DOCUMENT[DOCUMENT.index("## A method of your own") :]
EXAMPLE = REPOSITORY / "docs" / "examples" / "leave_one_out.py"


@pytest.fixture
def example(monkeypatch):
    """The module, imported from outside the package."""
    monkeypatch.syspath_prepend(str(EXAMPLE.parent))
    import leave_one_out

    return leave_one_out


def test_the_page_shows_the_file_and_it_is_short():
    text = EXAMPLE.read_text(encoding="utf-8")
    assert re.search(r"```python\n(.*?)```", SECTION, re.DOTALL)[1] == text
    assert len(text.splitlines()) <= 45


def test_the_commands_of_the_page(tmp_path):
    shutil.copy(EXAMPLE, tmp_path)
    shown = re.search(r"```\n(fflfast plot .*?)```", SECTION, re.DOTALL)[1].replace("\\\n", "")
    commands = [shlex.split(line) for line in shown.splitlines()]
    assert [command[1] for command in commands] == ["plot", "train", "eval"]
    output = {}
    for program, *arguments in commands:
        process = start("-m", program, *arguments, cwd=tmp_path)
        out, err = process.communicate(timeout=300)
        assert (process.returncode, err) == (0, ""), out
        output[arguments[0]] = out
    assert (tmp_path / "LeaveOneOut.svg").read_text(encoding="utf-8").count("teacher2") == 1
    records = [json.loads(line) for line in (tmp_path / "runs/mine/metrics.jsonl").read_text().splitlines()]
    assert {"ce/sub2", "kl/teacher0→sub0"} <= records[-1].keys()
    assert "own_weight: 0.1" in (tmp_path / "runs/mine/config.yaml").read_text(encoding="utf-8")
    assert all(f"  {name} " in output["eval"] for name in ("sub0", "sub1", "sub2", "ensemble"))


@pytest.mark.parametrize("own", [0.0, 0.25])
def test_its_loss_is_what_it_says(example, own):
    def formula(learner, output):
        z, terms = output.logits, []
        for i in range(3):
            teacher = own * z[i] + (1 - own) / 2 * sum(z[j] for j in range(3) if j != i)
            terms.append((0.5, kl(teacher.detach(), z[i], 2.0)))
        return [*((1.0, ce(logits, given.target)) for logits in z), *terms]

    given, cohort = batch(dtype=torch.float64), make_cohort(3, dtype=torch.float64)
    options = example.LeaveOneOutOptions(kl_weight=0.5, own_weight=own)
    assert_learns(Learner(cohort, example.LeaveOneOut(cohort, CLASSES, options)), given, formula)


def test_a_wrong_option_is_one_line(example):
    from fflfast.training import TrainConfig, resolve

    config = TrainConfig(
        data="digits", arch=["tiny", "tiny"], method="leave_one_out:LeaveOneOut", options={"own_weight": 1.0}
    )
    with pytest.raises(ConfigError, match=r"^--options: LeaveOneOutOptions: own_weight must be in \[0, 1\), got 1.0$"):
        resolve(config)


def test_every_hook_of_the_table_is_one_of_the_base():
    table = SECTION[SECTION.index("| to | write |") : SECTION.index("Three rules")]
    written = " ".join(line.split(" | ")[1] for line in table.splitlines()[2:] if line)
    named = set(re.findall(r"`(\w+)(?:\([\w, ]*\))?`", written)) - {"__init__"}
    assert len(named) > 12
    assert [name for name in named if not hasattr(Method, name)] == []
