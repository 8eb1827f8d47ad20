"""Peak memory of a forward and backward, inputs apart, as the operating system or GPU allocator saw it."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import re
from pathlib import Path

import torch

from benchmarks.cases import Case
from benchmarks.contenders import CONTENDERS, LossFunction

WARM_UP = Case(8, 16, 4)


def peak_bytes(name: str, case: Case, device: str) -> int:
    """On a CPU in a fresh process, where memory that was freed before cannot hide what the contender takes.

    A GPU's allocator counts what tensors hold, whoever freed memory before.
    """
    if device != "cpu":
        return _peak(name, case, device)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.memory"])
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_measure, args=(sender, name, case, torch.get_num_threads()))
    child.start()
    sender.close()  # so that the child's death ends recv
    try:
        return int(receiver.recv())
    finally:
        child.join()


def _measure(sender: multiprocessing.connection.Connection, name: str, case: Case, threads: int) -> None:
    torch.set_num_threads(threads)
    sender.send(_peak(name, case, "cpu"))


def _peak(name: str, case: Case, device: str) -> int:
    contender = CONTENDERS[name]
    _run(contender(WARM_UP, device), WARM_UP, device)
    loss = contender(case, device)
    logits, target = case.data(device)
    gc.collect()
    if device == "cpu":
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
        before = _status("VmRSS")
        torch.autograd.grad(loss(logits, target), logits)
        return _status("VmHWM") - before
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.autograd.grad(loss(logits, target), logits)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _run(loss: LossFunction, case: Case, device: str) -> None:
    logits, target = case.data(device)
    torch.autograd.grad(loss(logits, target), logits)


def _status(field: str) -> int:
    found = re.search(rf"{field}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    if found is None:
        raise OSError(f"/proc/self/status has no {field}")
    return 1024 * int(found.group(1))
