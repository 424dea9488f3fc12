"""Episodes per second of fomal's stream beside learn2learn's taskset, on the same images of the same episodes.

    python -m tests.benchmarks.stream [--threads N] [--rounds N] [--omniglot DIR] [--cifar ZIP]

Three kinds of files: drawings (Omniglot, 105 x 105 to 28 x 28), thumbnails (CIFAR-FS, 32 x 32 to 84 x 84) and
photographs (JPEG 500 x 375 to 84 x 84, made at random as smooth noise). 5 ways, 1 shot and 15 queries: 80 images an
episode. All sides run in turn in one process, without workers; their first episodes are compared.

learn2learn reads torchvision's ImageFolder with Resize and ToTensor: it has no cache of its own for image files. It is
told which tasks to make, so that the time in which it would draw them is not counted; "own" counts it. fomal's stream
is uint8, as it goes to the device; "floats" has it made float32 on the CPU; "workers" is what two loader processes
deliver, of which learn2learn has none. For comparison, learn2learn with all images in memory as float32, as it has its
Mini-ImageNet.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms
from torchvision.datasets import ImageFolder

from fomal.data import ImageFolderDataModule
from fomal.tasks.sampler import choose

WAYS, SHOTS, QUERIES = 5, 1, 15
TASKS = 10  # episodes in a measurement, of fomal drawn together as a meta-batch
BATCHES = 10  # meta-batches in a measurement of what is quick
FEW = 3  # of learn2learn when it decodes
CLASSES, IMAGES = 40, 20


def write_photographs(folder: Path) -> None:
    """JPEGs of smooth noise, 500 x 375."""
    rng = np.random.default_rng(0)
    for label in range(CLASSES):
        (folder / f"c{label:02}").mkdir(parents=True)
        for number in range(IMAGES):
            small = Image.fromarray(rng.integers(0, 256, (38, 50, 3), np.uint8))
            pixels = np.asarray(small.resize((500, 375), Image.Resampling.BICUBIC)) + rng.normal(0, 8, (375, 500, 3))
            picture = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
            picture.save(folder / f"c{label:02}" / f"{number:02}.jpg", quality=90)


def write_first(archive: Path, folder: Path, pattern: str) -> None:
    """The first images of the first classes of a zip, whose names match: the group is the class."""
    count: dict[str, int] = {}
    with zipfile.ZipFile(archive) as source:
        for name in sorted(source.namelist()):
            if (found := re.fullmatch(pattern, name)) and (len(count) < CLASSES or found[1] in count):
                label = found[1].replace("/", "_")
                count[found[1]] = number = count.get(found[1], 0) + 1
                if number <= IMAGES:
                    (folder / label).mkdir(parents=True, exist_ok=True)
                    (folder / label / Path(name).name).write_bytes(source.read(name))


def ours(folder: Path, size: int, gray: bool, cache_gb: float, cache: Path) -> ImageFolderDataModule:
    """fomal's side."""
    data = ImageFolderDataModule(
        str(folder),
        image_size=size,
        color="gray" if gray else "rgb",
        fit="stretch",
        val_share=0.0,
        test_share=0.0,
        ways=WAYS,
        train_shots=SHOTS,
        train_query_shots=QUERIES,
        cache_gb=cache_gb,
        cache_dir=str(cache),
    )
    data.prepare_data()
    data.classes = data.load()
    return data


def delivered_per_second(data: ImageFolderDataModule, workers: int) -> float:
    """Episodes per second that so many loader processes deliver, once what they made in advance is used up."""
    data.num_workers, data.meta_batch_size = workers, TASKS
    stream = iter(data.train_dataloader())
    for _ in range(1 + 2 * workers):  # they make two batches each in advance
        next(stream)
    start = time.perf_counter()
    for _ in range(3 * workers):
        next(stream)
    return 3 * workers * TASKS / (time.perf_counter() - start)  # the processes end with `stream`


def episodes(data: ImageFolderDataModule, first: int, floats: bool = False) -> Tensor:
    """`TASKS` episodes, the support of each."""
    episode = data.episodes("train", torch.arange(first, first + TASKS))
    if floats:
        episode = data.on_after_batch_transfer(episode, 0)
    return torch.cat([episode.support_x[:1], episode.query_x[:1]], 1)[0]  # of the first, for the check


class InMemory(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """All images as float32, as learn2learn has mini-ImageNet."""

    def __init__(self, files: ImageFolder) -> None:
        self.x = torch.stack([x for x, _ in files])
        self.y = files.targets

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.x[index], self.y[index]

    def __len__(self) -> int:
        return len(self.y)


def theirs(folder: Path, size: int, gray: bool, cached: bool, data: ImageFolderDataModule) -> tuple[Any, Any]:
    """learn2learn's side: a taskset that is told fomal's episodes, and one that draws its own."""
    import learn2learn as l2l

    steps: list[Any] = [transforms.Grayscale()] if gray else []
    steps += [transforms.Resize((size, size)), transforms.ToTensor()]
    files = ImageFolder(str(folder), transforms.Compose(steps))
    meta = l2l.data.MetaDataset(InMemory(files) if cached else files)
    own_transforms = [
        l2l.data.transforms.NWays(meta, WAYS),
        l2l.data.transforms.KShots(meta, SHOTS + QUERIES),
        l2l.data.transforms.LoadData(meta),
        l2l.data.transforms.RemapLabels(meta),
        l2l.data.transforms.ConsecutiveLabels(meta),
    ]
    own = l2l.data.Taskset(meta, own_transforms, num_tasks=-1)
    told = l2l.data.Taskset(meta, [], num_tasks=10**6)
    place = {Path(path).relative_to(folder).as_posix(): i for i, (path, _) in enumerate(files.samples)}
    listing = data.find()[1].files
    classes = data.classes["train"]

    def describe(number: int) -> None:
        chosen, members = choose(0, 0, torch.tensor([number]), classes.counts, WAYS, SHOTS + QUERIES)
        rows = classes.rows[classes.first[chosen][..., None] + members][0]  # (W, K + Q)
        order = torch.cat([rows[:, :SHOTS].flatten(), rows[:, SHOTS:].flatten()]).tolist()
        description = [l2l.data.DataDescription(place[listing[row].name]) for row in order]
        for one in description:
            one.transforms.append(lambda index: meta[index])
        told.sampled_descriptions[number] = description

    told.describe_for_benchmark = describe
    return told, own


def per_second(run: Callable[[int], object], count: int, first: int) -> float:
    """Episodes per second of `run`, which makes `count` of them from number `first` on."""
    start = time.perf_counter()
    run(first)
    return count / (time.perf_counter() - start)


def compare(folder: Path, size: int, rounds: int, work: Path) -> dict[str, Any]:
    """Check that all give the same images, then time them in turn."""
    gray = size == 28
    cached, decoded = (ours(folder, size, gray, gigabytes, work / "cache") for gigabytes in (4.0, 0.0))
    told, own = theirs(folder, size, gray, False, cached)
    in_memory, _ = theirs(folder, size, gray, True, cached)
    for taskset in (told, in_memory):
        taskset.describe_for_benchmark(0)
    images = [episodes(cached, 0, True), episodes(decoded, 0, True), told[0][0], in_memory[0][0]]
    differences = [float((images[0] - other).abs().mean()) for other in images[1:]]
    if differences[0] or max(differences) > 0.02 or (gray and max(differences) > 1e-6):
        raise SystemExit(f"the sides give other images: {differences} apart on average")  # JPEGs differ by the draft
    sides: dict[str, tuple[int, Callable[[int], object]]] = {
        "fomal cached": (BATCHES * TASKS, lambda n: [episodes(cached, n + i) for i in range(BATCHES)]),
        "fomal cached, floats": (BATCHES * TASKS, lambda n: [episodes(cached, n + i, True) for i in range(BATCHES)]),
        "fomal decoded": (TASKS, lambda n: episodes(decoded, n)),
        "learn2learn": (FEW, lambda n: [told[i] for i in range(n, n + FEW)]),
        "learn2learn, own": (FEW, lambda n: [own.sample() for _ in range(FEW)]),
        "learn2learn in memory": (TASKS, lambda n: [in_memory[i] for i in range(n, n + TASKS)]),
    }
    rates: dict[str, list[float]] = {name: [] for name in (*sides, "fomal decoded, workers")}
    for number in range(rounds):
        first = (1 + number) * TASKS
        for i in range(first, first + TASKS):
            told.describe_for_benchmark(i)
            in_memory.describe_for_benchmark(i)
        random.seed(number)
        for name, (count, run) in sides.items():
            rates[name].append(per_second(run, count, first))
        rates["fomal decoded, workers"].append(delivered_per_second(decoded, 2))
    result: dict[str, Any] = {f"{name}, episodes/s": round(statistics.median(r), 1) for name, r in rates.items()}
    for name, other in (
        ("fomal cached", "learn2learn"),
        ("fomal cached, floats", "learn2learn"),
        ("fomal decoded", "learn2learn"),
        ("fomal decoded, workers", "learn2learn"),
        ("fomal cached", "learn2learn in memory"),
    ):
        ratios = [a / b for a, b in zip(rates[name], rates[other], strict=True)]
        low, high = min(ratios), max(ratios)
        result[f"{name} / {other}"] = f"{statistics.median(ratios):.1f} ({low:.1f} to {high:.1f})"
    result["mean difference of pixels, of 1"] = round(max(differences), 5)
    return result


def memory(folder: Path, size: int, cache_gb: float, cache: Path) -> dict[str, float]:
    """Resident memory, MiB, of a process before the stream and at its peak, over 2,000 images' worth of episodes."""
    arguments = [str(folder), str(size), str(cache_gb), str(cache)]
    command = [sys.executable, "-m", "tests.benchmarks.stream", "--memory", *arguments]
    return dict(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))


def measure_memory(folder: str, size: str, cache_gb: str, cache: str) -> None:
    """In a process of its own: stream, and print."""

    def status(name: str) -> int:
        return int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) // 1024

    data = ours(Path(folder), int(size), False, float(cache_gb), Path(cache))
    episodes(data, 0)
    before = status("VmRSS")
    for number in range(60):
        episodes(data, number * TASKS)
    print(json.dumps({"before": before, "after 600 episodes": status("VmRSS"), "peak": status("VmHWM")}))


def main() -> None:
    """Run and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=None, help="torch's threads, which also decode; default: all")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--omniglot", type=Path, default=Path("../shared/data/omniglot"))
    parser.add_argument("--cifar", type=Path, default=Path("../shared/data/cifar_fs/cifar_fs_100.zip"))
    parser.add_argument("--memory", nargs=4, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory:
        measure_memory(*args.memory)
        return
    if args.threads:
        torch.set_num_threads(args.threads)
    results: dict[str, Any] = {"threads": torch.get_num_threads(), "images per episode": WAYS * (SHOTS + QUERIES)}
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        write_first(args.omniglot / "images_background.zip", work / "drawings", r"images_background/(\w+/\w+)/\w+\.png")
        write_first(args.cifar, work / "thumbnails", r"cifar_fs/train/(\w+)/\w+\.png")
        write_photographs(work / "photographs")
        for kind, size in (("drawings", 28), ("thumbnails", 84), ("photographs", 84)):
            results[f"{kind}, {size} x {size}"] = compare(work / kind, size, args.rounds, work)
        results["resident MiB, photographs cached"] = memory(work / "photographs", 84, 4.0, work / "cache")
        results["resident MiB, photographs decoded"] = memory(work / "photographs", 84, 0.0, work / "cache")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
