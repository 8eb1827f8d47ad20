"""`python -m cmim_kernels.audit FILE`: the audit of a file of logits; see `--help`."""

from __future__ import annotations

import argparse
import importlib
import math
import sys
from collections.abc import Sequence

from .attacks import registered_attacks, resolve_attacks
from .data import AuditData, load_audit_data
from .render import to_text
from .run import audit
from .students import StudentFactory, StudentTraining, mlp
from .tuning import tune_training


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status: 0 done, 2 bad input, 130 interrupted."""
    options = _parser().parse_args(arguments)
    if options.list:
        for attack in registered_attacks().values():
            print(f"{attack.name:12} {attack.threat:10} {attack.paper}")
        return 0
    if options.file is None:
        return _refuse("no file given; see --help")
    try:
        _run(options)
    except (ValueError, TypeError, OSError) as error:
        return _refuse(str(error))
    except KeyboardInterrupt:
        print(f"\naudit: interrupted; the same command goes on from {options.out}", file=sys.stderr)
        return 130
    return 0


def _run(options: argparse.Namespace) -> None:
    data = load_audit_data(options.file)
    student = _student(options, data)
    resolve_attacks(options.attacks)  # a wrong name is told before anything is trained
    seeds = options.seeds if options.seeds is not None else data.splits or 5
    training = StudentTraining(options.steps, options.batch_size, options.lr, options.weight_decay)
    if options.tune:
        training = tune_training(
            data, student, seeds=seeds, training=training, label_smoothing=options.label_smoothing
        )
        print(f"tuned: --lr {training.lr:g} --weight-decay {training.weight_decay:g}", file=sys.stderr)
    report = audit(
        data,
        student,
        attacks=options.attacks,
        seeds=seeds,
        training=training,
        label_smoothing=options.label_smoothing,
        out=options.out,
        fresh=options.fresh,
    )
    print(to_text(report))
    print(f"Written to {options.out}")


def _parser() -> argparse.ArgumentParser:
    training = StudentTraining()
    parser = argparse.ArgumentParser(
        prog="python -m cmim_kernels.audit",
        description="Does a student distilled from these logits beat one trained alone with label smoothing?",
    )
    parser.add_argument(
        "file",
        nargs="?",
        help=".npz or .pt with inputs, labels, teacher_logits (or teachers.NAME), test_inputs, test_labels, "
        "and optionally extra_inputs with extra_logits (or extra_logits.NAME)",
    )
    parser.add_argument("--list", action="store_true", help="list the attacks with their papers and stop")
    parser.add_argument(
        "--attacks", nargs="+", metavar="NAME", help="default: every attack that the file allows"
    )
    parser.add_argument(
        "--student",
        default="mlp",
        metavar="mlp|MODULE:FUNCTION",
        help="function without arguments that makes a student",
    )
    parser.add_argument("--hidden", type=int, nargs="*", default=[64, 64], help="hidden widths of the mlp")
    parser.add_argument("--seeds", type=int, help="default: 5, or as many as the file holds data sets")
    parser.add_argument("--steps", type=int, default=training.steps)
    parser.add_argument("--batch-size", type=int, default=training.batch_size)
    parser.add_argument("--lr", type=float, default=training.lr)
    parser.add_argument("--weight-decay", type=float, default=training.weight_decay)
    parser.add_argument(
        "--tune",
        action="store_true",
        help="take, of a grid of learning rates and weight decays, those with the best student to beat",
    )
    parser.add_argument("--label-smoothing", type=float, default=0.1, help="of the student to beat")
    parser.add_argument(
        "--out", default="audit", help="folder for audit.json, .md and .png; gone on with if there is one"
    )
    parser.add_argument("--fresh", action="store_true", help="do not resume, start again")
    return parser


def _student(options: argparse.Namespace, data: AuditData) -> StudentFactory:
    if options.student == "mlp":
        features = math.prod(data.inputs.shape[data.labels.dim() :])
        return mlp(features, options.hidden, data.num_classes)
    module, _, name = options.student.partition(":")
    try:
        factory: StudentFactory = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"--student {options.student!r} is neither 'mlp' nor a MODULE:FUNCTION: {error}"
        ) from error
    if not callable(factory):
        raise ValueError(f"--student {options.student!r} must be a function, got {type(factory).__name__}")
    return factory


def _refuse(message: str) -> int:
    print(f"audit: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
