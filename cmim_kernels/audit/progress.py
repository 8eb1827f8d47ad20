"""A progress bar on standard error: tqdm's where it is installed, a counter of our own where it is not."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec


def track(names: Sequence[str], label: str, shown: bool = True) -> Iterator[str]:
    """Yields the names one by one, showing how far the loop is and which name it is at."""
    if not shown or not names:
        yield from names
    elif find_spec("tqdm") is not None:
        from tqdm import tqdm

        width = max(len(name) for name in names)
        with tqdm(total=len(names), unit="run", file=sys.stderr) as bar:
            for name in names:
                bar.set_description(f"{label}: {name:{width}}")
                yield name
                bar.update()
    else:
        for done, name in enumerate(names):
            print(f"\r{label}: {done}/{len(names)} {name:30}", end="", file=sys.stderr, flush=True)
            yield name
        print(f"\r{label}: {len(names)}/{len(names)} {'done':30}", file=sys.stderr)
