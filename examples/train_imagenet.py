"""ImageNet with the CMIM loss: ResNet-50, ordinary shuffled batches, centroids kept in a bank.

    torchrun --nproc-per-node 8 examples/train_imagenet.py --data DIR
    python examples/train_imagenet.py --synthetic

DIR/train and DIR/val hold one folder of images per class; a part of ImageNet's classes will do. A batch of
256 images has rarely two of one class among 1000, and a cluster of one row has no spread: the centroids are a
moving average over the batches of all processes (`CentroidBank`, 32 MB). `--cmi-weight 0` is the
cross-entropy baseline. The default weight is a starting point and has not been tuned on this data set.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import training_common as common
from arguments import amount
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from cmim_kernels import CentroidBank, CMIMLoss, TemperatureSpectrum

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def datasets(options: argparse.Namespace) -> tuple[Dataset[Any], Dataset[Any]]:
    """Training images with augmentation, validation images cropped at the centre."""
    if options.synthetic:
        rows = 3 * options.batch_size * 2
        return common.SyntheticImages(rows, 1000, 32, 0), common.SyntheticImages(64, 1000, 32, 1)
    data, transforms = common.torchvision_module("datasets"), common.torchvision_module("transforms")
    to_tensor = [transforms.ToTensor(), transforms.Normalize(MEAN, DEVIATION)]
    augmented = [transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip(), *to_tensor]
    plain = [transforms.Resize(256), transforms.CenterCrop(224), *to_tensor]
    try:
        train_set = data.ImageFolder(options.data / "train", transforms.Compose(augmented))
        val_set = data.ImageFolder(options.data / "val", transforms.Compose(plain))
    except FileNotFoundError as error:
        raise SystemExit(f"--data {options.data} must hold train and val: {error}") from error
    if train_set.classes != val_set.classes:
        raise SystemExit(f"--data {options.data}: train and val must have folders of the same names")
    return train_set, val_set


def network(options: argparse.Namespace, classes: int) -> nn.Module:
    if options.synthetic:
        return common.small_network(classes)
    model: nn.Module = common.torchvision_module("models").resnet50(num_classes=classes)
    return model


def without_decay(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups: biases and normalisation layers are not decayed."""
    vectors = [p for p in model.parameters() if p.dim() == 1]
    matrices = [p for p in model.parameters() if p.dim() > 1]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def main(arguments: list[str] | None = None) -> None:
    parser = common.parser(__doc__, epochs=90, batch_size=32, lr=0.1)
    parser.add_argument("--data", type=Path, default=Path("data/imagenet"), help="folder with train and val")
    parser.add_argument("--decay", type=float, default=0.9, help="of the centroids' moving average")
    parser.add_argument("--warmup-epochs", type=amount, default=5.0)
    options = parser.parse_args(arguments)
    with common.processes() as process:
        train(options, process)


def train(options: argparse.Namespace, process: common.Process) -> None:
    torch.manual_seed(options.seed)

    train_set, val_set = datasets(options)
    classes = len(train_set.classes)  # type: ignore[attr-defined]
    share: DistributedSampler[Any] = DistributedSampler(
        train_set, process.world_size, process.rank, seed=options.seed, drop_last=True
    )
    workers = 0 if options.synthetic else options.workers
    loader = DataLoader(
        train_set,
        options.batch_size,
        sampler=share,
        num_workers=workers,
        pin_memory=process.device.type == "cuda",
        drop_last=True,
    )
    val_loader = common.evaluation_loader(val_set, 256, process, workers)

    model = network(options, classes).to(process.device)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    lr = options.lr * options.batch_size * process.world_size / 256  # the rate is for 256 rows
    optimizer = torch.optim.SGD(without_decay(model, 1e-4), lr, momentum=0.9, nesterov=True)
    warmup = max(1, round(options.warmup_epochs * len(loader)))
    rest = max(1, options.epochs * len(loader) - warmup)
    schedule = SequentialLR(
        optimizer, [LinearLR(optimizer, 0.01, 1.0, warmup), CosineAnnealingLR(optimizer, rest)], [warmup]
    )
    spectrum = TemperatureSpectrum.uniform(1.0, 8)
    bank = CentroidBank(classes, temperatures=spectrum, decay=options.decay, process_group=process.group)
    loss = CMIMLoss(temperatures=spectrum, centroids=bank).to(process.device)
    training = common.Training.begin(process, model, loss, optimizer, schedule, options)

    last = min(options.epochs, training.epoch + (options.stop_after or options.epochs))
    while training.epoch < last:
        share.set_epoch(training.epoch)
        mean = training.one_epoch(loader, len(loader), options.cmi_weight, options.ramp_epochs * len(loader))
        training.report(mean, *training.evaluate(val_loader, classes))
        training.save(options.output)


if __name__ == "__main__":
    main()
