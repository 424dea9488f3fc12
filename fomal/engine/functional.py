"""Networks as functions of their tensors, in forms that can be vectorised and differentiated twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from fomal.models.parameters import buffers, slots
from fomal.utils.pytree import Data, leaves
from fomal.utils.tree import Tree

SHORT = (torch.bfloat16, torch.float16)


def forward(network: nn.Module, params: Tree, x: Data) -> Any:
    """`network(x)` with other values of its parameters.

    Args:
        network: any module; one parameter may be in several of its places (tied weights), and a module likewise.
        params: some of the parameters by their first names. 16-bit networks have them in 16 bits within.
        x: inputs, a tensor or nested dicts of tensors, which the network gets as they are.

    Raises:
        ValueError: a name is of no parameter.
    """
    given = {slot: params[name] for slot, name in slots(network).items() if name in params}
    dtypes = [t.dtype for t in leaves(x) if t.is_floating_point()]
    if short := [dtype for dtype in dtypes if dtype in SHORT]:  # the inner loop's own parameters are kept in 32 bits
        given = {slot: p.to(short[0]) for slot, p in given.items()}
    elif not dtypes:
        own = {slot: network.get_parameter(slot).dtype for slot in given} if is_short(network) else {}
        given = {slot: p.to(own.get(slot)) if p.dtype == torch.float32 else p for slot, p in given.items()}
    if len(given) < len(params) and (unknown := params.keys() - slots(network).values()):
        raise ValueError(f"{min(unknown)!r} is no parameter of {type(network).__name__}, or not its first name.")
    # Each place is given, so torch need not look for ties, of which it swaps one place twice.
    return functional_call(network, given, (x,), tie_weights=False)


def is_short(network: nn.Module) -> bool:
    """Tell whether there are parameters in 16 bits."""
    return any(p.dtype in SHORT for p in network.parameters())


def helpers(network: nn.Module, given: set[str]) -> Tree:
    """All that the network's results depend on beside the parameters `given`: the others and the buffers, by place."""
    parameters = ((slot, network.get_parameter(slot)) for slot, name in slots(network).items() if name not in given)
    tensors: Tree = {**dict(parameters), **buffers(network)}
    return {slot: t for slot, t in tensors.items() if t.layout == torch.strided}


class _Within(nn.Module):
    """Runs a function in which the network is used."""

    def __init__(self, network: nn.Module, function: Callable[..., Any]) -> None:
        super().__init__()
        self.network, self.function = network, function

    def forward(self, *args: Any) -> Any:
        return self.function(*args)


def with_helpers(network: nn.Module, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function of (tensors, *args) that is `function(*args)` with these tensors in the network's places."""

    def whole(tensors: Tree, *args: Any) -> Any:
        named = {f"network.{slot}": t for slot, t in tensors.items()}
        return functional_call(_Within(network, function), named, args, tie_weights=False)

    return whole


@contextmanager
def plain_attention(kernels: bool = True) -> Iterator[None]:
    """Compute attention by operations, most of which have second derivatives and rules under `vmap` everywhere.

    Args:
        kernels: also without the kernels of `scaled_dot_product_attention`, which take less memory, but have no second
            derivative, and on the CPU no rule.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH) if kernels else nullcontext():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Compute 32-bit products and convolutions in 32 bits, whatever shorter format is allowed for them (TF32, say)."""
    libraries: dict[str, Any] = {"cuda": torch.backends.cudnn, "cpu": torch.backends.mkldnn}
    parts: list[Any] = [torch.backends.cuda.matmul] if device.type == "cuda" else []
    if library := libraries.get(device.type):
        parts += [getattr(library, kind) for kind in ("matmul", "conv", "rnn") if hasattr(library, kind)]
    before = [(part, part.fp32_precision) for part in parts if part.fp32_precision not in ("none", "ieee")]
    try:
        for part, _ in before:
            part.fp32_precision = "ieee"
        yield
    finally:
        for part, value in before:
            part.fp32_precision = value
