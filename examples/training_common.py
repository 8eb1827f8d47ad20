"""What the CIFAR-100 and ImageNet recipes share.

Launched plainly the recipes use one process; under `torchrun --nproc-per-node N` one process per device.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from arguments import amount, count
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset
from tqdm import tqdm

from cmim_kernels import CMIMLoss, TemperatureSpectrum
from cmim_kernels.metrics import ConcentrationSpectrum, StreamingCMI

MEASURED = TemperatureSpectrum.geometric(1 / 8, 64, 16)  # beyond the training grid on both sides


@dataclass(frozen=True)
class Process:
    """This process among those that train together."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def group(self) -> dist.ProcessGroup | None:
        return dist.group.WORLD if self.world_size > 1 else None

    @property
    def leads(self) -> bool:
        return self.rank == 0


@contextmanager
def processes() -> Iterator[Process]:
    """Joins the other processes that torchrun started, and leaves them together at the end.

    Whatever uses the process group has to be gone by then: make it in a function that is called inside.
    """
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
    if world_size > 1:
        dist.init_process_group("nccl" if cuda else "gloo")
    yield Process(rank, world_size, device)
    if world_size > 1:
        dist.barrier()
        dist.destroy_process_group()


def parser(description: str | None, epochs: int, batch_size: int, lr: float) -> argparse.ArgumentParser:
    """The options that both recipes have."""
    options = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--epochs", type=count, default=epochs)
    options.add_argument("--batch-size", type=count, default=batch_size, help="rows per process")
    options.add_argument("--lr", type=amount, default=lr)
    options.add_argument("--workers", type=int, default=8, help="loader processes of each process")
    options.add_argument(
        "--precision",
        choices=("float32", "bfloat16", "float16"),
        default="bfloat16",
        help="of the forward pass",
    )
    options.add_argument("--cmi-weight", type=amount, default=10.0, help="0 trains with plain cross entropy")
    options.add_argument(
        "--ramp-epochs", type=amount, default=5.0, help="cmi_weight is reached linearly over these"
    )
    options.add_argument("--output", type=Path, default=Path("out"), help="where checkpoints go")
    options.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --output")
    options.add_argument("--stop-after", type=count, help="epochs to train now, for jobs of limited length")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument(
        "--synthetic", action="store_true", help="a few steps on random images, for a trial run"
    )
    return options


def torchvision_module(name: str) -> Any:
    """`torchvision.<name>`, imported when it is needed.

    Raises:
        SystemExit: torchvision is not installed.
    """
    import importlib

    try:
        return importlib.import_module(f"torchvision.{name}")
    except ImportError as error:
        raise SystemExit(
            f"this recipe needs torchvision ({error}): pip install torchvision, or try it with --synthetic"
        ) from error


class SyntheticImages(TensorDataset):
    """Random images (rows, 3, size, size), with `targets` that take turns."""

    def __init__(self, rows: int, classes: int, size: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.classes = [f"class {c}" for c in range(classes)]
        self.targets = [i % classes for i in range(rows)]
        super().__init__(torch.randn(rows, 3, size, size, generator=generator), torch.tensor(self.targets))


def small_network(classes: int) -> nn.Module:
    """Stands in for the real network in a synthetic run."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(64, classes),
    )


@dataclass
class Training:
    """Everything that changes while training, and is therefore in a checkpoint."""

    process: Process
    model: nn.Module  # wrapped in DistributedDataParallel where there are several processes
    loss: CMIMLoss
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler
    precision: torch.dtype
    seed: int
    epoch: int = 0

    @staticmethod
    def begin(
        process: Process,
        model: nn.Module,
        loss: CMIMLoss,
        optimizer: torch.optim.Optimizer,
        schedule: torch.optim.lr_scheduler.LRScheduler,
        options: argparse.Namespace,
    ) -> Training:
        """With `options` of `parser`; takes over the last checkpoint where they say --resume."""
        if process.world_size > 1:
            devices = [process.device.index] if process.device.type == "cuda" else None
            model = DistributedDataParallel(model, device_ids=devices)
        dtype: torch.dtype = getattr(torch, options.precision)
        # Only float16's small exponents need the loss to be scaled.
        scaler = torch.amp.GradScaler(process.device.type, enabled=dtype == torch.float16)
        training = Training(process, model, loss, optimizer, schedule, scaler, dtype, options.seed)
        if options.resume:
            training.load(options.output)
        return training

    def autocast(self) -> AbstractContextManager[Any]:
        if self.precision == torch.float32:
            return nullcontext()
        return torch.autocast(self.process.device.type, self.precision)

    def one_epoch(self, loader: Iterable[Any], steps: int, cmi_weight: float, ramp_steps: float) -> float:
        """Trains for one epoch of `steps` steps; returns the mean loss of this process's batches."""
        # Of augmentation and dropout: another one in every process and epoch, the same after a resumption.
        torch.manual_seed((self.seed * 1_000_003 + self.epoch) * self.process.world_size + self.process.rank)
        self.model.train()
        self.loss.train()
        total = torch.zeros((), device=self.process.device)
        bar = tqdm(loader, total=steps, desc=f"epoch {self.epoch + 1}", disable=not self.process.leads)
        for step, (images, target) in enumerate(bar):
            images = images.to(self.process.device, non_blocking=True)
            target = target.to(self.process.device, non_blocking=True)
            done = self.epoch * steps + step
            self.loss.cmi_weight = cmi_weight * min(1.0, (done + 1) / max(ramp_steps, 1))
            self.optimizer.zero_grad(set_to_none=True)
            with self.autocast():
                logits = self.model(images)
            value = self.loss(logits, target)  # float32 inside, whatever the logits are
            self.scaler.scale(value).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.schedule.step()
            total += value.detach()
        self.epoch += 1
        return float(total) / max(steps, 1)

    @property
    def plain_model(self) -> nn.Module:
        return self.model.module if isinstance(self.model, DistributedDataParallel) else self.model

    @torch.no_grad()
    def evaluate(self, loader: Iterable[Any], classes: int) -> tuple[float, ConcentrationSpectrum]:
        """Accuracy and figures over all processes' shares, with the first one's running statistics."""
        model = self.plain_model.eval()  # the wrapper would want the same number of batches everywhere
        if self.process.group is not None:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)
        right = torch.zeros(2, dtype=torch.float64, device=self.process.device)
        metric = StreamingCMI(classes, MEASURED, device=self.process.device)
        for images, target in loader:
            target = target.to(self.process.device)
            with self.autocast():
                logits = model(images.to(self.process.device))
            metric.update(logits, target)
            right += torch.stack([(logits.argmax(1) == target).sum(), target.new_tensor(len(target))])
        if self.process.group is not None:
            dist.all_reduce(right)
            metric.all_reduce(self.process.group)
        return float(right[0] / right[1]), metric.compute()

    def save(self, folder: Path) -> None:
        """Writes folder/last.pt, whole or not at all."""
        if not self.process.leads:
            return
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / "last.pt.partial"
        state: dict[str, Any] = {name: part.state_dict() for name, part in self._parts().items()}
        torch.save(state | {"epoch": self.epoch}, partial)
        os.replace(partial, folder / "last.pt")

    def load(self, folder: Path) -> None:
        """Takes over folder/last.pt.

        Raises:
            SystemExit: there is none.
        """
        path = folder / "last.pt"
        if not path.is_file():
            raise SystemExit(f"--resume: no checkpoint {path}")
        state = torch.load(path, map_location=self.process.device, weights_only=True)
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        self.epoch = state["epoch"]

    def report(self, loss: float, accuracy: float, spectrum: ConcentrationSpectrum) -> None:
        if self.process.leads:
            peak = int(spectrum.cmi.argmax())
            temperature = 1 / float(spectrum.inverse_temperatures[peak])
            print(
                f"epoch {self.epoch}: loss {loss:.4f}, validation accuracy {100 * accuracy:.2f} %, "
                f"largest CMI {spectrum.cmi[peak]:.2e} nats at T = {temperature:.2g}, "
                f"NCMI there {spectrum.ncmi[peak]:.2e}",
                flush=True,
            )

    def _parts(self) -> dict[str, Any]:
        return {
            "model": self.plain_model,
            "loss": self.loss,  # holds the centroid bank, if there is one
            "optimizer": self.optimizer,
            "schedule": self.schedule,
            "scaler": self.scaler,
        }


def evaluation_loader(
    dataset: Dataset[Any], batch_size: int, process: Process, workers: int
) -> DataLoader[Any]:
    """This process's share of a data set, every row in exactly one share."""
    rows = range(process.rank, len(labels_of(dataset)), process.world_size)
    return DataLoader(Subset(dataset, rows), batch_size, num_workers=workers)


def labels_of(dataset: Dataset[Any]) -> Tensor:
    """The labels of a torchvision data set (or of `SyntheticImages`), without reading an image."""
    return torch.as_tensor(dataset.targets)  # type: ignore[attr-defined]
