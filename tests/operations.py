"""Which operators are called."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class Operations(TorchDispatchMode):
    """The operators called in its scope, in order: "aten.sort.stable"."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.append(str(func))
        return func(*args, **(kwargs or {}))

    @property
    def seen(self) -> set[str]:
        """Their names, without namespace and overload."""
        return {call.split(".")[1] for call in self.calls}
