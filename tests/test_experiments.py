"""The experiments' common ground: jobs, the rule of choice, tables. The scripts themselves take hours."""
import importlib
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "experiments"))
import common


@pytest.mark.parametrize("name", sorted(p.stem for p in (ROOT / "experiments").glob("[ds]sd_*.py")))
def test_scripts_import_and_say_what_they_do(name):
    module = importlib.import_module(name)
    assert f"python experiments/{name}.py" in module.__doc__ and callable(module.main)


def test_a_job_trains_once_and_measures_what_is_asked(tmp_path, ckpt, monkeypatch):
    monkeypatch.setattr(common, "ROOT", tmp_path)
    command = f"issd --ckpt {ckpt} --nfe 3 --only-step 1 --steps 2 --batch-size 4 --data digits"
    rows = [[3, 1.0, None, 0, {"elsewhere": ckpt}], [2, 1.0, None, 0, {"only_node": None}]]
    first = common.one((command, "last.pt", rows))
    made = (tmp_path / common.path(command)).stat().st_mtime_ns
    assert [set(m) for m in first] == [{"digits-cnn", "digits-mlp"}] * 2 and first[0] != first[1]
    assert common.one((command, "last.pt", rows[:1])) == first[:1] and (tmp_path / common.path(command)).stat().st_mtime_ns == made


def test_the_rule_of_choice_and_paired_gains(capsys):
    numbers = {"base": (20.0, 1.0, 0.98), "wild": (10.0, 1.1, 0.98), "sloppy": (11.0, 0.9, 0.97), "good": (15.0, 0.9, 0.978), "better": (14.0, 1.0, 0.98)}
    get = lambda command, row: {n: dict(zip(("fd", "pixel_fd", "accuracy"), (numbers[command][0] + row, *numbers[command][1:]))) for n in common.NETWORKS}
    cells = lambda name: [[(name, 0)], [(name, 4)]]  # two teachers, the second worse by 4 in every row
    assert common.choose(get, cells("base"), {n: cells(n) for n in ("wild", "sloppy", "good", "better")}) == "better"
    assert common.choose(get, cells("base"), {n: cells(n) for n in ("wild", "sloppy")}) == "wild"  # none keeps both: the least distance
    capsys.readouterr()
    common.table(get, {"base": cells("base"), "good": cells("good")}, against=("base",))
    assert "| good | 17.00 +- 2.83 | 17.00 +- 2.83 | 0.900 +- 0.000 | 0.978 +- 0.000 | 5.00 (se 0.00), 5.00 (se 0.00) |" in capsys.readouterr().out
