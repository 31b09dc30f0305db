"""Starting commands, waiting for a step, sending signals."""
import os
import subprocess
import sys
import time

from conftest import ROOT


def children(pid):
    """The processes whose parent is pid."""
    found = []
    for p in os.listdir("/proc"):
        if not p.isdigit():
            continue
        try:
            with open(f"/proc/{p}/stat") as f:
                parent = int(f.read().rsplit(")", 1)[1].split()[1])
        except OSError:  # it has ended meanwhile
            continue
        if parent == pid:
            found.append(int(p))
    return found


def start(command, out, step):
    """Start the command, wait until step `step` is logged; returns the process."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    p = subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, env=env,
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log = out / "log.jsonl"
    deadline = time.time() + 120
    while not log.exists() or len(log.read_text().splitlines()) < 1 + step:  # 1: the arguments
        assert time.time() < deadline and p.poll() is None, p.communicate()
        time.sleep(0.002)
    return p


def start_and_signal(command, out, step, sig, workers=False):
    """Start the command, wait until step `step` is logged, send the signal (workers: to every
    worker of torchrun); returns the ended process."""
    p = start(command, out, step)
    for pid in children(p.pid) if workers else [p.pid]:
        os.kill(pid, sig)
    p.output = p.communicate(timeout=60)
    return p
