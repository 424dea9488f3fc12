"""The choice of examples: seeded N-way K-shot choices and the indices of inner mini-batches, vectorised over tasks.

Everything here is a pure function of (seed, split, episode number).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fomal.tasks.philox import distinct, permutations, random_words

SPLITS = ("train", "val", "test")

# Streams keep the choices of one episode independent of each other: stream = 16 * split + purpose.
_CLASSES, _EXAMPLES, _BATCHES, _VALUES, _SHUFFLE, _NOISE, _AUGMENT = range(7)

MinibatchIndices = tuple[Tensor, ...]
"""An inner schedule: for each inner step, int64 indices (T, B) into the S support examples of each task."""


def _stream(split: int, purpose: int) -> int:
    return 16 * split + purpose


def choose(
    seed: int, split: int, number: Tensor, population: Tensor, ways: int, examples: int
) -> tuple[Tensor, Tensor]:
    """Choose the classes of each task and the examples of each class, without replacement.

    Args:
        seed: seed of the stream.
        split: place of the split in `SPLITS`.
        number: (T,) int64 episode numbers.
        population: (C,) int64, the number of examples each class has.
        ways: classes per task, <= C.
        examples: examples per class, <= every population.

    Returns:
        classes: (T, ways) int64 in [0, C), distinct in each row.
        members: (T, ways, examples) int64, distinct in the last axis, in [0, population of the class).
    """
    tasks = len(number)
    words = random_words(seed, _stream(split, _CLASSES), number, ways)  # (T, ways)
    classes = distinct(words, len(population))  # (T, ways)
    words = random_words(seed, _stream(split, _EXAMPLES), number, ways * examples)
    words = words.view(tasks, ways, examples)
    return classes, distinct(words, population.to(number.device)[classes])  # (T, ways, examples)


def task_words(seed: int, split: int, number: Tensor, samples: int) -> Tensor:
    """(T, samples) 32-bit words for tasks that are sampled from a formula, e.g. a sine's amplitude and phase."""
    return random_words(seed, _stream(split, _VALUES), number, samples)


def noise_words(seed: int, split: int, number: Tensor, step: Tensor, samples: int) -> Tensor:
    """(T, samples) 32-bit words for the noise of inner step `step`, an int64 scalar below 2**24, of each task."""
    return random_words(seed, _stream(split, _NOISE) + 256 * (step % 2**24), number, samples)


def augment_words(seed: int, split: int, number: Tensor, samples: int) -> Tensor:
    """(T, samples) 32-bit words, seeds of the random transforms of each task's images."""
    return random_words(seed, _stream(split, _AUGMENT), number, samples)


def shuffled(seed: int, n: int) -> Tensor:
    """A permutation of range(n), (n,) int64, that depends on the seed alone: for splits of classes."""
    return permutations(random_words(seed, _stream(0, _SHUFFLE), torch.zeros(1, dtype=torch.int64), n))[0]


def minibatch_indices(
    seed: int,
    split: int,
    number: Tensor,
    examples: int,
    steps: int,
    batch_size: int,
    replacement: bool = False,
) -> MinibatchIndices:
    """Cut mini-batches from each task's examples.

    Cycling (`replacement=False`): shuffled passes over the examples, batches running across the pass
    boundary, so every pass holds every example once. Replacement: each batch is sampled independently,
    without repeats inside a batch. Both as in the released code of Nichol et al. 2018 (`_mini_batches`).

    Args:
        seed: seed of the stream.
        split: place of the split in `SPLITS`.
        number: (T,) int64 episode numbers.
        examples: support examples of each task, S.
        steps: number of mini-batches, k; may be 0.
        batch_size: examples in a mini-batch, B.
        replacement: sample every batch independently.

    Returns:
        k tensors (T, B), int64 in [0, S).

    Raises:
        ValueError: `replacement` with more examples in a batch than in the task.
    """
    if not steps:
        return ()
    stream = _stream(split, _BATCHES)
    tasks = len(number)
    if replacement:
        if batch_size > examples:
            raise ValueError(
                f"batch_size={batch_size} exceeds the {examples} support examples of a task, and batches "
                f"are sampled without repeats: use batch_size <= {examples} or replacement: false."
            )
        words = random_words(seed, stream, number, steps * batch_size)
        picks = distinct(words.view(tasks, steps, batch_size), examples)  # (T, k, B)
    else:
        passes = -(-steps * batch_size // examples)
        words = random_words(seed, stream, number, passes * examples)
        picks = permutations(words.view(tasks, passes, examples)).flatten(1)  # (T, passes * S)
        picks = picks[:, : steps * batch_size].view(tasks, steps, batch_size)
    return picks.unbind(1)


def separate_tail(
    examples: int, ways: int, tail_shots: int, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """Reserve the first `tail_shots` examples of each class, for the last mini-batch alone.

    A task lists its examples class by class, those of a class in random order, so taking the first is
    taking any. As `_split_train_test` in the released code.

    Args:
        examples: support examples of a task, S, equally many of each class.
        ways: number of classes.
        tail_shots: examples to reserve per class.
        device: where the indices will be.

    Returns:
        head: (S - ways * tail_shots,) int64, indices of the others.
        tail: (ways * tail_shots,) int64, indices of the reserved ones.

    Raises:
        ValueError: `tail_shots` reserves nothing, or leaves nothing to adapt on.
    """
    shots = examples // ways
    if not 0 < tail_shots < shots:
        raise ValueError(
            f"tail_shots={tail_shots} does not split a task with {shots} support examples per class: "
            f"use 0 < tail_shots < {shots}, or raise data.train_shots."
        )
    order = torch.arange(examples, device=device).view(ways, shots)
    return order[:, tail_shots:].flatten(), order[:, :tail_shots].flatten()
