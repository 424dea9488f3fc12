"""JAX: the whole meta-iteration one compiled function, `scan` over steps, `vmap` (or `lax.map`) over tasks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from fomal.models import MLP, Conv4
from tests.benchmarks.peers.peer import Peer
from tests.benchmarks.works import Work

Weights = dict[str, Any]


class Jax(Peer):
    """Channels last, as is usual there; compiled before it is timed.

    Args:
        over_tasks: "vmap" adapts all tasks at once; "map" one after the other, in the same compiled function, since
            XLA's grouped convolutions, which `vmap` makes, are slow on a CPU.
    """

    package = "jax"
    optimizers: ClassVar[dict[str, str]] = {
        "reptile": "adam",
        "fomaml": "adam",
        "query_fomaml": "adam",
        "maml": "sgd",
        "evaluation": "adam",
    }

    def __init__(self, over_tasks: str) -> None:
        self.over_tasks = over_tasks
        self.name = "jax" if over_tasks == "vmap" else f"jax_{over_tasks}"

    def available(self, device: str) -> str | None:
        """See `Peer`."""
        if (reason := super().available(device)) or device == "cpu":
            return reason
        try:
            self.imported().devices("gpu")
        except RuntimeError as error:
            return f"installed without CUDA ({error})"
        return None

    def prepare(self, work: Work, kind: str) -> Callable[[], dict[str, Tensor]]:
        """See `Peer`."""
        jax = self.imported()
        jax.config.update("jax_default_matmul_precision", "highest")  # float32, as torch's side
        network, episode = work.network(), work.episode(kind)
        indices = work.indices(kind, episode)
        place = jax.devices("gpu" if work.device == "cuda" else "cpu")[0]
        layout = Layout(network)
        images = episode.support_x.ndim == 5
        arrays = [x.movedim(2, -1) if images else x for x in (episode.support_x, episode.query_x)]
        arrays += [episode.support_y, episode.query_y, torch.stack(indices, 1)]  # the indices (T, k, B)
        compiled = jax.jit(build(jax, self.over_tasks, layout, work, kind))
        double = work.dtype == torch.float64
        with jax.enable_x64(double):
            weights = {name: p.detach().cpu().numpy() for name, p in network.named_parameters()}
            inputs = [weights, *(x.contiguous().cpu().numpy() for x in arrays)]
            inputs = jax.device_put([inputs[0], *map(narrow, inputs[1:])], place)

        def run() -> dict[str, Tensor]:
            with jax.enable_x64(double):
                found = jax.block_until_ready(compiled(*inputs))
            return {name: torch.from_dlpack(value) for name, value in found.items()}

        return run


def narrow(x: np.ndarray) -> np.ndarray:
    """Integers as JAX has them."""
    return x.astype(np.int32) if x.dtype == np.int64 else x


class Layout:
    """The network as a function of weights in JAX's layout, and the way there and back from torch's."""

    def __init__(self, network: nn.Module) -> None:
        if not isinstance(network, Conv4 | MLP):
            raise TypeError(f"{type(network).__name__} is written in JAX nowhere: use Conv4 or MLP.")
        self.is_conv = isinstance(network, Conv4)
        if isinstance(network, Conv4):
            self.stride = network.blocks[0].conv.stride[0]
            self.eps, self.filters = network.blocks[0].norm.eps, network.blocks[0].conv.out_channels
        else:
            self.linear = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]

    def there(self, weights: Weights) -> Weights:
        """OIHW to HWIO; a linear layer's rows, which follow channels, height and width, to those of channels last."""
        return {name: self._there(name, w) for name, w in weights.items()}

    def _there(self, name: str, w: Any) -> Any:
        if w.ndim == 4:
            return w.transpose(2, 3, 1, 0)
        if name == "head.weight" and self.is_conv:
            w = w.reshape(len(w), self.filters, -1).transpose(0, 2, 1).reshape(w.shape)
        return w.T

    def back(self, weights: Weights) -> Weights:
        """The inverse of `there`."""
        return {name: self._back(name, w) for name, w in weights.items()}

    def _back(self, name: str, w: Any) -> Any:
        if w.ndim == 4:
            return w.transpose(3, 2, 0, 1)
        w = w.T
        if name == "head.weight" and self.is_conv:
            w = w.reshape(len(w), -1, self.filters).transpose(0, 2, 1).reshape(w.shape)
        return w

    def forward(self, jax: Any, w: Weights, x: Any) -> Any:
        """(B, *input) to (B, outputs)."""
        jnp = jax.numpy
        if not self.is_conv:
            for i, name in enumerate(self.linear):
                x = (jnp.tanh(x) if i else x) @ w[f"{name}.weight"] + w[f"{name}.bias"]
            return x
        for i in range(4):
            stride, block = (self.stride, self.stride), f"blocks.{i}"
            x = jax.lax.conv_general_dilated(
                x, w[f"{block}.conv.weight"], stride, "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            mean, variance = x.mean((0, 1, 2)), x.var((0, 1, 2))
            x = (x - mean) * jax.lax.rsqrt(variance + self.eps) * w[f"{block}.norm.weight"] + w[f"{block}.norm.bias"]
            if self.stride == 1:
                x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "SAME")
            x = jax.nn.relu(x)
        return x.reshape(len(x), -1) @ w["head.weight"] + w["head.bias"]


def build(jax: Any, over_tasks: str, layout: Layout, work: Work, kind: str) -> Callable[..., Weights]:
    """What is compiled: weights, support and query inputs and labels, and the indices, to what `Peer.prepare` says."""
    jnp, tree = jax.numpy, jax.tree.map
    step, begin = optimizer(jax, layout, work, Jax.optimizers[kind])

    def adapt(phi: Weights, x: Any, y: Any, indices: Any) -> Any:
        return jax.lax.scan(lambda carry, index: (step(carry, x[index], y[index]), None), begin(phi), indices)[0]

    def task(phi: Weights, x: Any, query_x: Any, y: Any, query_y: Any, indices: Any) -> Weights:
        """One task's outer gradient, or for MAML its query loss."""
        if kind == "fomaml":
            before = adapt(phi, x, y, indices[:-1])
            return tree(jnp.subtract, before[0], step(before, x[indices[-1]], y[indices[-1]])[0])
        adapted = adapt(phi, x, y, indices)[0]
        if kind == "reptile":
            return tree(jnp.subtract, phi, adapted)
        if kind == "evaluation":
            alone = jax.vmap(lambda q: layout.forward(jax, adapted, jnp.concatenate([x, q[None]]))[-1])(query_x)
            return {"alone": alone, "together": layout.forward(jax, adapted, query_x)}
        if kind == "query_fomaml":
            return jax.grad(loss_of(jax, layout))(adapted, query_x, query_y)
        return loss_of(jax, layout)(adapted, query_x, query_y)

    def all_tasks(phi: Weights, *data: Any) -> Any:
        if over_tasks == "vmap":
            return jax.vmap(task, in_axes=(None, 0, 0, 0, 0, 0))(phi, *data)
        return jax.lax.map(lambda one: task(phi, *one), data)

    def whole(phi: Weights, *data: Any) -> Weights:
        phi = layout.there(phi)
        if kind == "evaluation":
            return all_tasks(phi, *data)
        if kind == "maml":
            return layout.back(jax.grad(lambda weights: all_tasks(weights, *data).mean())(phi))
        return layout.back(tree(lambda g: g.mean(0), all_tasks(phi, *data)))

    return whole


def loss_of(jax: Any, layout: Layout) -> Callable[[Weights, Any, Any], Any]:
    """Cross-entropy, or the mean squared error of a regression."""

    def loss(weights: Weights, x: Any, y: Any) -> Any:
        output = layout.forward(jax, weights, x)
        if jax.numpy.issubdtype(y.dtype, jax.numpy.floating):
            return jax.numpy.square(output - y).mean()
        return -jax.numpy.take_along_axis(jax.nn.log_softmax(output), y[:, None], 1).mean()

    return loss


def optimizer(
    jax: Any, layout: Layout, work: Work, name: str
) -> tuple[Callable[[Any, Any, Any], Any], Callable[[Weights], Any]]:
    """A step from (weights, state) to the next, and the first of these; the step counts from 1."""
    jnp, tree, gradient = jax.numpy, jax.tree.map, jax.grad(loss_of(jax, layout))

    def sgd(carry: Any, x: Any, y: Any) -> Any:
        weights, state = carry
        return tree(lambda w, g: w - work.sgd_lr * g, weights, gradient(weights, x, y)), state

    def adam(carry: Any, x: Any, y: Any) -> Any:
        weights, (second, count) = carry
        g, count = gradient(weights, x, y), count + 1
        second = tree(lambda v, g: 0.999 * v + 0.001 * g * g, second, g)
        root = jnp.sqrt(1 - 0.999 ** count.astype(next(iter(weights.values())).dtype))
        moved = tree(lambda w, g, v: w - work.adam_lr * g / (jnp.sqrt(v) / root + 1e-8), weights, g, second)
        return moved, (second, count)

    if name == "sgd":
        return sgd, lambda phi: (phi, ())
    return adam, lambda phi: (phi, (tree(jnp.zeros_like, phi), jnp.int32(0)))
