"""Operations of image networks for many tasks at once, each task with weights of its own, in one memory layout.

torch's own rules under `vmap` make a grouped convolution of a per-task one, and copy its inputs and outputs between
layouts on the way. Here all of them keep a batch (B, T * C, H, W) with the channels of all tasks innermost, in which
the convolution libraries of CPUs are at their best; nothing is copied from one operation to the next.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.overrides import TorchFunctionMode

from fomal.models.norm import batch_norm

aten = torch.ops.aten
NO_OUTPUT_PADDING = (False, (0, 0))  # not a transposed convolution


class StackedOperations(TorchFunctionMode):
    """Within it, 2-d convolution, batch norm, max-pooling and zero padding of images have the rules below.

    What is called in another form (strings for the padding, other dimensions) runs as it would without.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replace the calls that have a rule."""
        rule = _RULES.get(func)
        found = rule(*args, **(kwargs or {})) if rule else NotImplemented
        return func(*args, **(kwargs or {})) if found is NotImplemented else found


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    """As `torch.nn.functional.conv2d`: x (B, C, H, W) and weight (O, C / groups, kH, kW) to (B, O, H', W')."""
    if isinstance(padding, str) or x.dim() != 4:
        return NotImplemented  # type: ignore[no-any-return]
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        # Under vmap torch's own does not reach a convolution with stacked weights.
        x, weight = (t.to(torch.get_autocast_dtype(device)) for t in (x, weight))
    beside, extent = _pair(padding), [d * (k - 1) + 1 for d, k in zip(_pair(dilation), weight.shape[2:], strict=True)]
    if x.dtype == torch.bfloat16 and any(size < e for size, e in zip(x.shape[2:], extent, strict=True)):
        # oneDNN leaves the gradient of weights that meet the padding alone as the memory was.
        x, beside = pad(x, [beside[1], beside[1], beside[0], beside[0]]), [0, 0]
    y: Tensor = _Convolution.apply(x, weight, _pair(stride), beside, _pair(dilation), groups)
    return y if bias is None else y + bias.to(y.dtype).view(-1, 1, 1)


def normalise(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Batch norm of x (B, C, H, W) with the statistics of the batch, scale (C,) and shift (C,)."""
    if x.dim() != 4:
        return NotImplemented  # type: ignore[no-any-return]
    y: Tensor = _BatchNorm.apply(x, weight, bias, eps)[0]
    return y


def pad(x: Tensor, pad: Any, mode: str = "constant", value: float | None = None) -> Tensor:
    """As `torch.nn.functional.pad` with zeros, on the last two axes."""
    if mode != "constant" or value or x.dim() != 4 or len(pad) > 4 or min(pad) < 0:
        return NotImplemented  # type: ignore[no-any-return]
    padded: Tensor = _Pad.apply(x, [*pad, *[0] * (4 - len(pad))])
    return padded


def max_pool2d(
    x: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor:
    """As `torch.nn.functional.max_pool2d`."""
    if return_indices or x.dim() != 4:
        return NotImplemented  # type: ignore[no-any-return]
    kernel = _pair(kernel_size)
    window = (kernel, _pair(stride) if stride else kernel, _pair(padding), _pair(dilation), ceil_mode)
    y: Tensor = _MaxPool.apply(x, window)[0]
    return y


_RULES: dict[Any, Any] = {
    torch.conv2d: conv2d,
    batch_norm: normalise,
    F.pad: pad,
    F.max_pool2d: max_pool2d,
    torch.max_pool2d: max_pool2d,
}


# -- layouts


def _pair(value: Any) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value) * (2 // len(value))


def _tasks_first(t: Tensor, dim: int | None, tasks: int) -> Tensor:
    return t.expand(tasks, *t.shape) if dim is None else t.movedim(dim, 0)


def _merge(x: Tensor, dim: int | None, tasks: int) -> Tensor:
    """Images of all tasks, (B, C, H, W) with T at `dim`, as (B, T * C, H, W), channels last; no copy where it is so."""
    x = _tasks_first(x, dim, tasks)
    batch, channels, height, width = x.shape[1:]
    inner = x.permute(1, 3, 4, 0, 2).reshape(batch, height, width, tasks * channels)
    return inner.contiguous().permute(0, 3, 1, 2)  # a view may have other strides


def _split(x: Tensor, tasks: int) -> Tensor:
    """(B, T * C, H, W) as (B, T, C, H, W)."""
    return x.reshape(len(x), tasks, -1, *x.shape[2:])


def _merge_weight(weight: Tensor, dim: int | None, tasks: int) -> Tensor:
    """(O, C, kH, kW) with T at `dim` as (T * O, C, kH, kW), channels last like the images."""
    weight = _tasks_first(weight, dim, tasks)
    return weight.permute(0, 1, 3, 4, 2).flatten(0, 1).contiguous().permute(0, 3, 1, 2)


def _flat(t: Tensor, dim: int | None, tasks: int) -> Tensor:
    """(C,) with T at `dim` as (T * C,)."""
    return _tasks_first(t, dim, tasks).reshape(-1)


# -- operations; each calls itself within its rule, so that rules nest


class _Convolution(Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, stride: Any, padding: Any, dilation: Any, groups: int) -> Tensor:
        y: Tensor = aten.convolution(x, weight, None, stride, padding, dilation, *NO_OUTPUT_PADDING, groups)
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, weight, *ctx.settings = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        x, weight = ctx.saved_tensors
        wanted = list(ctx.needs_input_grad[:2])  # of the first layer's images none is
        return *_ConvolutionBackward.apply(gradients[0], x, weight, *ctx.settings, wanted), *[None] * 4

    @staticmethod
    def vmap(
        info: Any, dims: Any, x: Tensor, weight: Tensor, stride: Any, padding: Any, dilation: Any, groups: int
    ) -> Any:
        tasks = info.batch_size
        if dims[1] is None:  # one weight for all: the tasks are a larger batch
            many = _tasks_first(x, dims[0], tasks)
            y = _Convolution.apply(many.flatten(0, 1), weight, stride, padding, dilation, groups)
            return y.view(tasks, -1, *y.shape[1:]), 0
        x, weight = _merge(x, dims[0], tasks), _merge_weight(weight, dims[1], tasks)
        y = _Convolution.apply(x, weight, stride, padding, dilation, groups * tasks)
        return _split(y, tasks), 1


class _ConvolutionBackward(Function):
    @staticmethod
    def forward(gradient: Tensor, x: Tensor, weight: Tensor, *settings: Any) -> Any:
        stride, padding, dilation, groups, wanted = settings
        found = aten.convolution_backward(
            gradient, x, weight, None, stride, padding, dilation, *NO_OUTPUT_PADDING, groups, [*wanted, False]
        )
        return found[:2]

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *tensors, stride, padding, dilation, groups, _ = inputs
        ctx.save_for_backward(*tensors)
        ctx.settings = stride, padding, dilation, groups
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """A convolution is linear in images and in weights, so its own forms are all there is to it."""
        gradient, x, weight = ctx.saved_tensors
        by_x, by_weight = gradients
        found: list[Any] = [None, None, None]
        if by_x is not None:
            found[0] = _Convolution.apply(by_x, weight, *ctx.settings)
            found[2] = _ConvolutionBackward.apply(gradient, by_x, weight, *ctx.settings, [False, True])[1]
        if by_weight is not None:
            more = _Convolution.apply(x, by_weight, *ctx.settings)
            found[0] = more if found[0] is None else found[0] + more
            if ctx.needs_input_grad[1]:
                found[1] = _ConvolutionBackward.apply(gradient, x, by_weight, *ctx.settings, [True, False])[0]
        return *found, *[None] * 5

    @staticmethod
    def vmap(info: Any, dims: Any, gradient: Tensor, x: Tensor, weight: Tensor, *settings: Any) -> Any:
        tasks = info.batch_size
        stride, padding, dilation, groups, wanted = settings
        gradient, x = _merge(gradient, dims[0], tasks), _merge(x, dims[1], tasks)
        weight = _merge_weight(weight, dims[2], tasks)
        by_x, by_weight = _ConvolutionBackward.apply(
            gradient, x, weight, stride, padding, dilation, groups * tasks, wanted
        )
        found = (
            _split(by_x, tasks) if wanted[0] else None,
            by_weight.reshape(tasks, -1, *by_weight.shape[1:]).contiguous() if wanted[1] else None,
        )
        return found, (1 if wanted[0] else None, 0 if wanted[1] else None)


class _BatchNorm(Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Any:
        return aten.native_batch_norm(x, weight, bias, None, None, True, 0.0, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, weight, _, ctx.eps = inputs
        ctx.save_for_backward(x, weight, *output[1:])
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return *_BatchNormBackward.apply(gradients[0], *ctx.saved_tensors, ctx.eps), None

    @staticmethod
    def vmap(info: Any, dims: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Any:
        tasks = info.batch_size
        weight, bias = _flat(weight, dims[1], tasks), _flat(bias, dims[2], tasks)
        y, mean, rstd = _BatchNorm.apply(_merge(x, dims[0], tasks), weight, bias, eps)
        return (_split(y, tasks), mean.view(tasks, -1), rstd.view(tasks, -1)), (1, 0, 0)


class _BatchNormBackward(Function):
    @staticmethod
    def forward(gradient: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, eps: float) -> Any:
        return aten.native_batch_norm_backward(
            gradient, x, weight, None, None, mean, rstd, True, eps, [True, True, True]
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        gradient, x, weight, _, _, ctx.eps = inputs
        ctx.save_for_backward(gradient, x, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        def written_out(gradient: Tensor, x: Tensor, weight: Tensor) -> Any:
            return _batch_norm_backward(gradient, x, weight, ctx.eps)

        pull: Any = torch.func.vjp(written_out, *ctx.saved_tensors)[1]
        return *pull(gradients), None, None, None

    @staticmethod
    def vmap(
        info: Any, dims: Any, gradient: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, eps: float
    ) -> Any:
        tasks = info.batch_size
        gradient, x = _merge(gradient, dims[0], tasks), _merge(x, dims[1], tasks)
        flat = (_flat(t, dim, tasks) for t, dim in zip((weight, mean, rstd), dims[2:5], strict=True))
        by_x, by_weight, by_bias = _BatchNormBackward.apply(gradient, x, *flat, eps)
        return (_split(by_x, tasks), by_weight.view(tasks, -1), by_bias.view(tasks, -1)), (1, 0, 0)


def _batch_norm_backward(gradient: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of batch norm by x (B, C, H, W), scale and shift, in operations with derivatives of their own."""
    axes = [0, 2, 3]
    apart = x - x.mean(axes, keepdim=True)
    rstd = (apart.square().mean(axes, keepdim=True) + eps).rsqrt()
    normal = apart * rstd
    by_weight, by_bias = (gradient * normal).sum(axes), gradient.sum(axes)
    count = x.numel() // x.shape[1]
    means = (by_bias.view(-1, 1, 1) + normal * by_weight.view(-1, 1, 1)) / count
    return weight.view(-1, 1, 1) * rstd * (gradient - means), by_weight, by_bias


class _Pad(Function):
    @staticmethod
    def forward(x: Tensor, pad: list[int]) -> Tensor:
        padded: Tensor = aten.constant_pad_nd(x, pad, 0.0)
        return padded

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.pad = inputs[1]

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        left, right, top, bottom = ctx.pad
        height, width = gradients[0].shape[-2:]
        return gradients[0][..., top : height - bottom, left : width - right], None

    @staticmethod
    def vmap(info: Any, dims: Any, x: Tensor, pad: list[int]) -> Any:
        return _split(_Pad.apply(_merge(x, dims[0], info.batch_size), pad), info.batch_size), 1


class _MaxPool(Function):
    @staticmethod
    def forward(x: Tensor, window: Any) -> Any:
        return aten.max_pool2d_with_indices(x, *window)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.window = inputs[1]
        ctx.save_for_backward(inputs[0], output[1])
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return _MaxPoolBackward.apply(gradients[0], *ctx.saved_tensors, ctx.window), None

    @staticmethod
    def vmap(info: Any, dims: Any, x: Tensor, window: Any) -> Any:
        tasks = info.batch_size
        y, index = _MaxPool.apply(_merge(x, dims[0], tasks), window)
        return (_split(y, tasks), _split(index, tasks)), (1, 1)


class _MaxPoolBackward(Function):
    @staticmethod
    def forward(gradient: Tensor, x: Tensor, index: Tensor, window: Any) -> Tensor:
        by_x: Tensor = aten.max_pool2d_with_indices_backward(gradient, x, *window, index)
        return by_x

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[2])

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (index,) = ctx.saved_tensors
        return gradients[0].flatten(2).gather(2, index.flatten(2)).view(index.shape), None, None, None

    @staticmethod
    def vmap(info: Any, dims: Any, gradient: Tensor, x: Tensor, index: Tensor, window: Any) -> Any:
        tasks = info.batch_size
        merged = [_merge(t, dim, tasks) for t, dim in zip((gradient, x, index), dims[:3], strict=True)]
        return _split(_MaxPoolBackward.apply(*merged, window), tasks), 1
