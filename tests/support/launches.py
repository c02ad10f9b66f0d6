"""Count the Triton kernels and torch operations that a pass starts on a device."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import GridExecutor
from triton.runtime.jit import JITFunction

# These operations start nothing on the device: they return a view, allocate, or run on the host.
SILENT = {
    *("_reshape_alias", "_unsafe_view", "alias", "as_strided", "detach", "expand", "permute"),
    *("reshape", "select", "slice", "split", "split_with_sizes", "squeeze", "t", "transpose"),
    *("unbind", "unsqueeze", "view", "view_as", "lift_fresh", "is_same_size", "promote_types"),
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"),
}


@contextmanager
def count_launches() -> Iterator[dict[str, int]]:
    """Yield a counter, kept up to date, of how many times each kernel and operation has started."""
    counter = _Counter()
    with pytest.MonkeyPatch.context() as patch, counter:
        for owner, name in ((GridExecutor, "__call__"), (JITFunction, "run")):
            patch.setattr(owner, name, counter.counting(getattr(owner, name)))
        yield counter.counts


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}
        self._is_inside = False

    def counting(self, run: Callable) -> Callable:
        def count(kernel: Any, *args: Any, **kwargs: Any) -> Any:
            function = getattr(kernel, "fn", kernel)
            self._add(getattr(function, "__name__", str(function)))
            self._is_inside = True  # the interpreter computes with torch's operations
            try:
                return run(kernel, *args, **kwargs)
            finally:
                self._is_inside = False

        return count

    def _add(self, name: str) -> None:
        self.counts[name] = self.counts.get(name, 0) + 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not self._is_inside and name not in SILENT:
            self._add(name)
        return func(*args, **(kwargs or {}))
