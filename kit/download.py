"""Downloads as fid.py does them: once per machine, resumed where they broke off, and checked before
they count. Here their errors are UserErrors."""
import socket

import fid
from kit.cli import user_errors


@user_errors()
def local_first(work, lock=None):
    """work() on local rank 0 and, when that has ended well, on the other ranks.

    For what other libraries download: the other ranks find the files that local rank 0 has fetched.
    lock: a path that stands for these files. Of several jobs that want them one works at a time,
    the others wait and say so. Returns what work() returns. An error on one rank is raised on all
    ranks.
    """
    def patient_work():
        timeout = socket.getdefaulttimeout()
        try:
            socket.setdefaulttimeout(fid.TIMEOUT)  # torchvision sets none
            return work()
        finally:
            socket.setdefaulttimeout(timeout)

    return fid.local_first(patient_work, lock)


@user_errors()
def fetch(url, folder, check, sha256="", flag="--ckpt", tries=3):
    """fid.fetch, which raises UserError here; check(path) raises UserError for a wrong file."""
    return fid.fetch(url, folder, sha256, check, flag, tries)
