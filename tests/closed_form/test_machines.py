"""What a machine has: cards that are not there are played by the answers torch.cuda would give."""
import types

import pytest
import torch
import torch.distributed as dist
from processes import script

from kit import processes
from kit.cli import UserError, arguments
from kit.processes import Processes


@pytest.fixture
def card(monkeypatch):
    """card(major, gpus): torch.cuda answers as a machine with such cards does."""
    def play(major=9, gpus=1):
        answers = dict(
            is_available=lambda: True, device_count=lambda: gpus, set_device=lambda d: None,
            get_device_properties=lambda d=None: types.SimpleNamespace(major=major, minor=0),
            is_bf16_supported=lambda *a, **k: True)  # also where it is only emulated
        for name, answer in answers.items():
            monkeypatch.setattr(torch.cuda, name, answer)
        monkeypatch.setattr(processes.Processes, "has_said", False, raising=False)
        monkeypatch.delattr(processes.Processes, "has_said")
    return play


@pytest.mark.parametrize("major, amp, wanted", [
    (7, "auto", False), (8, "auto", True), (9, "auto", True), (7, "bf16", True), (9, "off", False)])
def test_bf16_is_for_cards_that_have_it(card, capsys, major, amp, wanted):
    """T4, V100 and RTX 20 (compute capability 7) call bf16 supported and emulate it."""
    card(major)
    assert Processes(amp).bf16 == wanted
    told = "no bf16 in hardware: networks run in float32" in capsys.readouterr().out
    assert told == (major == 7 and amp == "auto")


def ranks(monkeypatch, local_rank, seen):
    """This process as one of several, which see the GPUs `seen`: (machine, visible, index)."""
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    monkeypatch.setenv("WORLD_SIZE", str(len(seen)))
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: local_rank)
    monkeypatch.setattr(dist, "get_world_size", lambda: len(seen))

    def gather(into, own):
        into[:] = seen
    monkeypatch.setattr(dist, "all_gather_object", gather)


def test_each_task_sees_its_own_gpu(card, monkeypatch):
    """srun --gpus-per-task 1: local rank 1, and one GPU there."""
    card(gpus=1)
    ranks(monkeypatch, 1, [("a", "0", 0), ("a", "1", 0)])
    assert Processes().device == torch.device("cuda", 0)


@pytest.mark.parametrize("gpus, seen", [
    (1, [("a", None, 0), ("a", None, 0)]), (2, [("a", None, i) for i in range(3)])])
def test_more_processes_than_gpus(card, monkeypatch, gpus, seen):
    card(gpus=gpus)
    ranks(monkeypatch, len(seen) - 1, seen)
    with pytest.raises(UserError, match=f"number of GPUs, {gpus}"):
        Processes()


@pytest.mark.parametrize("variable", ["SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_tasks_that_do_not_know_of_one_another(monkeypatch, variable):
    monkeypatch.setenv(variable, "4")
    with pytest.raises(UserError, match="started 4 tasks that do not know of one another"):
        Processes()
    monkeypatch.setenv("RANK", "0")  # torchrun inside one task
    Processes()
    monkeypatch.delenv("RANK")
    monkeypatch.setenv(variable, "1")
    Processes()


@pytest.mark.parametrize("told, refused", [
    (dict(SLURM_NTASKS=4, SLURM_PROCID=0), False),                    # the script of sbatch itself
    (dict(SLURM_NTASKS=4, SLURM_PROCID=2), True),
    (dict(SLURM_NTASKS=4, SLURM_PROCID=0, SLURM_STEP_ID=0), True),
    (dict(SLURM_NTASKS=4, SLURM_PROCID=0, SLURM_STEP_ID=0, SLURM_STEP_NUM_TASKS=1), False)])
def test_slurm_tells_steps_from_scripts(monkeypatch, told, refused):
    for name, value in told.items():
        monkeypatch.setenv(name, str(value))
    if not refused:
        Processes()
        return
    with pytest.raises(UserError, match="srun started 4 tasks"):
        Processes()


def test_apple_gpus_are_not_used_and_that_is_said(monkeypatch, capsys):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.delattr(processes.Processes, "has_said", raising=False)
    assert Processes().device.type == "cpu"
    assert "the Apple GPU (MPS) is not used" in capsys.readouterr().out


def test_where_nothing_can_be_compiled(monkeypatch, capsys, tiny):
    """A default is given up in one line; what was asked for is an error of one line."""
    import train

    def no_compiler(*args):
        raise RuntimeError("InvalidCxxCompiler: no working C++ compiler\n\nmany more lines")
    monkeypatch.setattr(torch, "compile", no_compiler)
    proc = Processes()
    assert not proc.can_compile(False)
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "no working C++ compiler): networks run uncompiled" in said
    args = arguments(train.parser(), compile=True, steps=5)
    with pytest.raises(UserError, match="--compile: torch.compile does not work here .Invalid"):
        Processes().place(tiny, args)


def test_no_home_folder():
    """A user id that no list of users knows: nothing asks for the home folder at import, and
    MINDISTILL_CACHE is enough."""
    look = ("import pathlib\n"
            "def home(): raise RuntimeError('Could not determine home directory.')\n"
            "pathlib.Path.home = home\n"
            "from kit import cli\n"
            "import train, sample\n"
            "try: print(cli.cache_folder())\n"
            "except cli.UserError as e: print(e)")
    assert script("-c", look, env={"MINDISTILL_CACHE": "/x"}).stdout == "/x\n"
    said = script("-c", look, env={"MINDISTILL_CACHE": ""}).stdout
    assert "name one in MINDISTILL_CACHE" in said and said.count("\n") == 1
