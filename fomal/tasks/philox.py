"""Counter-based random numbers: every value is a pure function of (seed, stream, index, sample).

Philox4x32-10 of Salmon, Moraes, Dror & Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3",
in integer torch arithmetic, so that a value is the same on every device, worker, rank and restart.
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST_SEED = 2**64 - 1
_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox4x32-10: four 32-bit words from a 128-bit counter and a 64-bit key.

    Args:
        counter: four int64 tensors of one shape (or broadcastable), each holding values in [0, 2**32).
        key: two integers in [0, 2**32).

    Returns:
        Four int64 tensors holding values in [0, 2**32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # int64 products wrap, which keeps the 64 bits; >> is arithmetic, hence the mask after it.
        p0 = c0 * _MULTIPLIERS[0]
        p1 = c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK) ^ c1 ^ k0,
            p1 & _MASK,
            ((p0 >> 32) & _MASK) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def random_words(seed: int, stream: int | Tensor, index: Tensor, samples: int) -> Tensor:
    """Uniform 32-bit words, `samples` for each index.

    Args:
        seed: any integer in [0, 2**64).
        stream: which of the independent streams of this seed, in [0, 2**32); an int64 scalar tensor where it is known
            on the device alone.
        index: (T,) int64, e.g. episode numbers, >= 0.
        samples: words per index.

    Returns:
        (T, samples) int64 with values in [0, 2**32); row t depends on (seed, stream, index[t]) alone.
    """
    blocks = -(-samples // 4)
    if not isinstance(stream, Tensor):
        stream = torch.full((), stream, dtype=torch.int64, device=index.device)  # as_tensor would wait for the device
    counter = (
        torch.arange(blocks, device=index.device)[None, :],
        stream.view(1, 1),
        (index & _MASK)[:, None],
        ((index >> 32) & _MASK)[:, None],
    )
    words = philox(counter, (seed & _MASK, (seed >> 32) & _MASK))
    return torch.stack(words, dim=-1).reshape(len(index), -1)[:, :samples]  # (T, samples)


def uniform(words: Tensor, low: float = 0.0, high: float = 1.0) -> Tensor:
    """Map 32-bit words to float64 uniform in [low, high)."""
    return low + (high - low) * (words.to(torch.float64) * 2.0**-32)


def normal(words: Tensor) -> Tensor:
    """Map 32-bit words to float64 standard normal values, by the method of Box & Muller 1958.

    Args:
        words: (..., 2 m).

    Returns:
        (..., 2 m), independent.
    """
    radius, angle = words.to(torch.float64).chunk(2, -1)
    radius = (-2 * torch.log((radius + 1) * 2.0**-32)).sqrt()  # + 1: the logarithm of 0 is not finite
    angle = angle * (2 * torch.pi * 2.0**-32)
    return torch.cat([radius * angle.cos(), radius * angle.sin()], -1)


def below(words: Tensor, bound: Tensor | int) -> Tensor:
    """Map 32-bit words to integers uniform in [0, bound); `bound` < 2**31.

    Multiply-shift; the probability of any value is off by at most a factor 1 + bound / 2**32.
    """
    return (words * bound) >> 32


def distinct(words: Tensor, population: Tensor | int) -> Tensor:
    """Sample without replacement: `words.shape[-1]` distinct integers below `population`, in random order.

    Args:
        words: (..., m) 32-bit words.
        population: an integer >= m, or an int64 tensor of shape `words.shape[:-1]`.

    Returns:
        (..., m) int64, distinct along the last axis; every ordered selection is equally likely.
    """
    chosen = torch.empty_like(words)
    for j in range(words.shape[-1]):
        rank = below(words[..., j], population - j)  # (...), among the values not chosen yet
        earlier, _ = chosen[..., :j].sort(dim=-1)  # (..., j)
        # The value of that rank: skip each earlier choice c_(i) with c_(i) - i <= rank.
        skipped = (earlier - torch.arange(j, device=words.device) <= rank[..., None]).sum(-1)
        chosen[..., j] = rank + skipped
    return chosen


def permutations(words: Tensor) -> Tensor:
    """Random permutations of range(m) from (..., m) 32-bit words: (..., m) int64, by sorting random keys."""
    return words.argsort(dim=-1, stable=True)
