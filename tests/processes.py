"""Commands in processes of their own: started, waited for, sent signals.

A real start of Python imports torch for seconds. So a server imports the libraries once, and a
command is a fork of it: a process of its own, in which our files are read anew.
"""
import multiprocessing
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch._dynamo", "torchvision", "scipy.linalg", "tqdm"])


class Command:
    """`python WORDS`, running. It is used as subprocess.Popen is.

    group: in a process group of its own, whose number is its pid.
    """

    def __init__(self, words, cwd=None, env=None, group=False):
        self.folder = Path(tempfile.mkdtemp())
        for name in ("stdout", "stderr"):
            (self.folder / name).touch()
        self.process = FORKS.Process(target=become, args=(
            [str(w) for w in words], str(cwd or ROOT), environment(env), str(self.folder),
            group))
        self.process.start()
        self.pid = self.process.pid

    def poll(self):
        return self.process.exitcode

    @property
    def returncode(self):
        return self.process.exitcode

    def kill(self):
        self.process.kill()

    def communicate(self, timeout=None):
        """Wait for its end; returns (stdout, stderr)."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise TimeoutError(f"no end after {timeout} s")
        texts = [(self.folder / name).read_text() for name in ("stdout", "stderr")]
        shutil.rmtree(self.folder)
        return texts


def environment(changes=None):
    """The environment of a command."""
    own = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    own.update({k: str(v) for k, v in (changes or {}).items()})
    return own


def become(words, cwd, env, folder, group):
    """In the fork: run `python WORDS`."""
    if group:
        os.setpgid(0, 0)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{folder}/{name}", os.O_WRONLY), number)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    multiprocessing.set_start_method(None, force=True)  # what Python starts with
    tests = str(ROOT / "tests")
    inherited = [p for p in sys.path if p not in ("", str(ROOT)) and not p.startswith(tests)]
    named = [p for p in env.get("PYTHONPATH", "").split(os.pathsep) if p]
    sys.path[:] = [*named, *inherited]
    if words[0] == "-c":
        sys.path.insert(0, cwd)
        sys.argv = ["-c", *words[2:]]
        exec(words[1], {"__name__": "__main__"})
    elif words[0] == "-m":
        sys.path.insert(0, cwd)
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str(Path(words[0]).resolve().parent))
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


# ---- Whole runs --------------------------------------------------------------------------------


def script(*words, check=True, timeout=300, cwd=None, env=None):
    """Run `python WORDS`, in the project unless cwd is given. Returns its exit code and output."""
    return finish([Command(words, cwd, env)], check, timeout)


def workers(n, *words, check=True, timeout=300, cwd=None, env=None):
    """The same on n processes. Returns the largest exit code and the output of all."""
    return finish(start_workers(n, words, cwd, env), check, timeout)


def start_workers(n, words, cwd=None, env=None, group=False):
    """The command, running on n processes. Each is told what torchrun would tell it, and the store
    in which they meet is kept here, as torchrun keeps it."""
    from torch.distributed import TCPStore
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    started = []
    for rank in range(n):
        told = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=n, LOCAL_WORLD_SIZE=n,
                    MASTER_ADDR="127.0.0.1", MASTER_PORT=store.port,
                    TORCHELASTIC_USE_AGENT_STORE=True, TORCHELASTIC_RESTART_COUNT=0)
        started.append(Command(words, cwd, {**told, **(env or {})}, group))
        started[-1].store = store
    return started


def finish(started, check=True, timeout=300):
    """Wait for started commands."""
    try:
        outs, errs = zip(*[p.communicate(timeout) for p in started])
    finally:
        for p in started:
            p.kill()
    code = max(abs(p.returncode) for p in started)
    assert not check or code == 0, "".join(outs + errs)
    return subprocess.CompletedProcess(None, code, "".join(outs), "".join(errs))


def start_python(*words, cwd=None, env=None):
    """The command, running after a real start of Python."""
    return subprocess.Popen([sys.executable, *map(str, words)], cwd=cwd or ROOT,
                            env=environment(env), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True)


def python(*words, check=True, timeout=300, cwd=None, env=None):
    """As script(), by a real start of Python."""
    return finish([start_python(*words, cwd=cwd, env=env)], check, timeout)


TORCHRUN = "-m torch.distributed.run --standalone --nproc_per_node".split()


def torchrun(n, *words, **kw):
    """As workers(), by torchrun itself."""
    return python(*TORCHRUN, n, *words, **kw)


# ---- Signals -----------------------------------------------------------------------------------


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


def wait_for_step(p, out, step):
    """Wait until the started command p has logged step `step` in the folder out."""
    log = out / "log.jsonl"
    deadline = time.time() + 120
    while not log.exists() or len(log.read_text().splitlines()) < 1 + step:  # 1: the arguments
        assert time.time() < deadline and p.poll() is None, p.communicate()
        time.sleep(0.002)


def start_and_signal(command, out, step, sig):
    """Start the command, wait until step `step` is logged, send the signal. Returns the ended
    process."""
    p = Command(command)
    wait_for_step(p, out, step)
    os.kill(p.pid, sig)
    p.output = p.communicate(timeout=60)
    return p
