"""Comparison of a network's shapes with a file's weights, before any memory is taken for the network."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.nn.modules import module as registry

from fomal.models.norm import use_batch_statistics
from fomal.models.usable import refuse_unusable
from fomal.run.schema import Mismatch, check_tensors

# What a constructor may make beside the tensors that a file has, such as a head that is replaced by a smaller one.
_TENSORS, _NUMBERS = 1_000, 2**26


def check_shapes(
    make: Callable[[], nn.Module], weights: Mapping[str, Tensor], what: str, whose: str, prefix: str = ""
) -> None:
    """Make a network on torch's meta device, where tensors have no values, and compare it with a file's weights.

    A network whose constructor looks at values cannot be made there: it is compared once it is made. torch's and
    Python's random numbers go on as if nothing had been made.

    Args:
        make: makes the network, of settings that may be another's.
        weights: what the file has.
        what: the name of `weights`, for the message.
        whose: to what the network belongs, likewise.
        prefix: what the names of the weights begin with, before those in the network.

    Raises:
        Mismatch: naming the tensor and both shapes, or for far more tensors or numbers than the file has.
        ValueError: as the constructor raises it.
    """
    made = _Made(weights)
    try:
        with isolate_rng(include_cuda=False), torch.device("meta"), made.counting():
            network = make()
            refuse_unusable(network)
            use_batch_statistics(network)
    except Exception as error:  # constructors raise many kinds
        made.refuse_excess(what, whose)
        if isinstance(error, ValueError) and "meta" not in str(error):
            raise
        return
    state = network.state_dict(prefix=prefix)
    found, expected = ({name: t for name, t in part.items() if isinstance(t, Tensor)} for part in (weights, state))
    check_tensors(found, expected, what, whose)
    made.refuse_excess(what, whose)


class _Made:
    """Counts the tensors that are given to modules, and stops a constructor that makes them without end."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        sizes = [t.numel() for t in weights.values() if isinstance(t, Tensor)]
        self.most_tensors, self.most_numbers = 2 * len(sizes) + _TENSORS, 2 * sum(sizes) + _NUMBERS
        self.tensors = self.numbers = 0

    @contextmanager
    def counting(self) -> Iterator[None]:
        handles = [
            registry.register_module_parameter_registration_hook(self._count),
            registry.register_module_buffer_registration_hook(self._count),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _count(self, module: nn.Module, name: str, tensor: Tensor | None) -> None:
        if tensor is None or nn.parameter.is_lazy(tensor):
            return
        self.tensors += 1
        self.numbers += tensor.numel()
        if self.tensors > self.most_tensors:
            raise RuntimeError("too many tensors")

    def refuse_excess(self, what: str, whose: str) -> None:
        if self.tensors > self.most_tensors or self.numbers > self.most_numbers:
            raise Mismatch(
                f"{whose} makes {self.tensors} tensors of {self.numbers} numbers or more, far more than {what} has"
            )
