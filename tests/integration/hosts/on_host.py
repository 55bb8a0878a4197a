"""Runs a Python program on a host of ``network.py``.

It is called as ``python`` is: with a file, ``-m`` and a module, or ``-c`` and a text.

The environment names the host's network namespace, and the folders that the host has of its own.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import sys

LIBC = ctypes.CDLL(None, use_errno=True)
CLONE_NEWNS, CLONE_NEWNET = 0x00020000, 0x40000000
MS_BIND, MS_REC, MS_PRIVATE = 4096, 16384, 1 << 18


def check(result: int) -> None:
    """Raise the error of a call of the C library."""
    if result:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def enter() -> None:
    """Move this process to the host."""
    with open(os.environ["HOST_NAMESPACE"]) as namespace:
        check(LIBC.setns(namespace.fileno(), CLONE_NEWNET))
    binds = os.environ["HOST_BINDS"]
    if not binds:
        return
    check(LIBC.unshare(CLONE_NEWNS))
    check(LIBC.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None))
    for pair in binds.split(os.pathsep):
        target, source = (os.fsencode(path) for path in pair.split("="))
        check(LIBC.mount(source, target, None, MS_BIND, None))


def main() -> None:
    """Run the program."""
    enter()
    del sys.argv[0]
    if sys.argv[0] == "-c":
        exec(sys.argv[1], {"__name__": "__main__"})
    elif sys.argv[0] == "-m":
        del sys.argv[0]
        if sys.argv[0] == "torch.distributed.run":
            from torch.distributed.elastic.rendezvous import dynamic_rendezvous

            # For its log, torchrun looks each frame up among all modules. A copy of the template
            # has thousands of them, so that a meeting would take a minute.
            dynamic_rendezvous.get_method_name = lambda depth=2: ""
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
        runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
