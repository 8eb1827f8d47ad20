"""Several processes that make up a process group, for tests of what crosses them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def on_ranks(world: int, body: Callable[..., None], folder: Path | str, *args: object) -> None:
    """`body(rank, *args)` in `world` processes of one group; what fails in one of them fails here.

    `body` is a function of a module; `folder` has to hold nothing by the name of `rendezvous`.
    """
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    mp.spawn(_rank, (world, body, f"file://{folder}/rendezvous", args), nprocs=world)


def _rank(rank: int, world: int, body: Callable[..., None], address: str, args: tuple[object, ...]) -> None:
    torch.set_num_threads(1)  # the ranks and pytest's other processes share the cores
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world)
    body(rank, *args)
    dist.barrier()  # a group that goes while another rank is busy may leave that one waiting
    dist.destroy_process_group()
