"""CIFAR-100 with the CMIM loss: ResNet-18, class-balanced batches, batch centroids.

    python examples/train_cifar100.py --data DIR
    torchrun --nproc-per-node 4 examples/train_cifar100.py --data DIR
    python examples/train_cifar100.py --synthetic

Each process draws 16 classes with 8 images each, so that every cluster of a batch has a centroid worth the
name. `--cmi-weight 0` is the cross-entropy baseline on the same batches. The default weight is a starting
point and has not been tuned on this data set: raise it while the validation accuracy holds.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import training_common as common
from arguments import count
from torch import nn
from torch.utils.data import DataLoader, Dataset

from cmim_kernels import CMIMLoss, TemperatureSpectrum
from cmim_kernels.samplers import ClassBalancedBatchSampler

CLASSES = 100
MEAN, DEVIATION = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)


def datasets(options: argparse.Namespace, process: common.Process) -> tuple[Dataset[Any], Dataset[Any]]:
    """Training images with augmentation, test images without."""
    if options.synthetic:
        return common.SyntheticImages(800, CLASSES, 32, 0), common.SyntheticImages(201, CLASSES, 32, 1)
    data, transforms = common.torchvision_module("datasets"), common.torchvision_module("transforms")
    to_tensor = [transforms.ToTensor(), transforms.Normalize(MEAN, DEVIATION)]
    augmented = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(), *to_tensor]
    if options.download and process.leads:
        data.CIFAR100(options.data, download=True)
    if process.group is not None:
        dist.barrier()
    try:
        return (
            data.CIFAR100(options.data, train=True, transform=transforms.Compose(augmented)),
            data.CIFAR100(options.data, train=False, transform=transforms.Compose(to_tensor)),
        )
    except RuntimeError as error:  # torchvision's, of a folder without the data set
        raise SystemExit(f"--data {options.data}: {error}; --download fetches it") from error


def network(options: argparse.Namespace) -> nn.Module:
    """ResNet-18 with a stem for 32x32 images."""
    if options.synthetic:
        return common.small_network(CLASSES)
    model: nn.Module = common.torchvision_module("models").resnet18(num_classes=CLASSES)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model


def main(arguments: list[str] | None = None) -> None:
    parser = common.parser(__doc__, epochs=200, batch_size=128, lr=0.1)
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of torchvision's CIFAR100")
    parser.add_argument("--download", action="store_true", help="fetch the data set into --data first")
    parser.add_argument("--samples-per-class", type=count, default=8)
    options = parser.parse_args(arguments)
    if options.batch_size % options.samples_per_class:
        parser.error("--batch-size must be a multiple of --samples-per-class")
    with common.processes() as process:
        train(options, process)


def train(options: argparse.Namespace, process: common.Process) -> None:
    torch.manual_seed(options.seed)

    train_set, test_set = datasets(options, process)
    batches = ClassBalancedBatchSampler(
        common.labels_of(train_set),
        classes_per_batch=options.batch_size // options.samples_per_class,
        samples_per_class=options.samples_per_class,
        batches=3 if options.synthetic else None,
        seed=options.seed,
        rank=process.rank,
        world_size=process.world_size,
    )
    workers = 0 if options.synthetic else options.workers
    pinned = process.device.type == "cuda"
    loader = DataLoader(train_set, batch_sampler=batches, num_workers=workers, pin_memory=pinned)
    test_loader = common.evaluation_loader(test_set, 256, process, workers)

    model = network(options).to(process.device)
    optimizer = torch.optim.SGD(
        model.parameters(), options.lr, momentum=0.9, weight_decay=5e-4, nesterov=True
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.epochs * len(batches))
    loss = CMIMLoss(temperatures=TemperatureSpectrum.uniform(1.0, 8)).to(process.device)
    training = common.Training.begin(process, model, loss, optimizer, schedule, options)

    last = min(options.epochs, training.epoch + (options.stop_after or options.epochs))
    while training.epoch < last:
        batches.set_epoch(training.epoch)
        mean = training.one_epoch(
            loader, len(batches), options.cmi_weight, options.ramp_epochs * len(batches)
        )
        training.report(mean, *training.evaluate(test_loader, CLASSES))
        training.save(options.output)


if __name__ == "__main__":
    main()
