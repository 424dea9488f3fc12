"""Episodes per second of fomal's stream beside learn2learn's taskset, on the same images of the same episodes.

    python -m tests.benchmarks.stream [--threads N] [--rounds N] [--omniglot DIR] [--cifar ZIP]

Three kinds of files: drawings (Omniglot's zip, 105 x 105 to 28 x 28), thumbnails (CIFAR-FS, 32 x 32 to 84 x 84) and
photographs (JPEG 400 x 300 to 84 x 84, made at random as smooth noise). 5 ways, 1 shot and 15 queries: 80 images an
episode. Both sides give float32 in [0, 1], in one process and without workers, alternately; the first episodes are
compared. Cached: learn2learn has all images in memory as float32, fomal memory-mapped as uint8. Decoded: both decode
each image when an episode needs it; learn2learn through torchvision's ImageFolder, Resize and ToTensor. learn2learn is
given the description of its tasks, so that the time in which it would draw them is not counted; "own" is with it.
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
from tqdm import tqdm

from fomal.data import ImageFolderDataModule
from fomal.data.sampler import choose

WAYS, SHOTS, QUERIES = 5, 1, 15
TASKS = 10  # episodes in a measurement of fomal, drawn together as a meta-batch of 10
CLASSES, IMAGES = 40, 20


def write_photographs(folder: Path) -> None:
    """JPEGs of smooth noise, 400 x 300."""
    rng = np.random.default_rng(0)
    for label in range(CLASSES):
        (folder / f"c{label:02}").mkdir(parents=True)
        for number in range(IMAGES):
            small = Image.fromarray(rng.integers(0, 256, (30, 40, 3), np.uint8))
            pixels = np.asarray(small.resize((400, 300), Image.Resampling.BICUBIC)) + rng.normal(0, 8, (300, 400, 3))
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


def episodes(data: ImageFolderDataModule, first: int) -> Tensor:
    """`TASKS` episodes as the network gets them: (T, W (K + Q), C, H, W), support before query."""
    episode = data.episodes("train", torch.arange(first, first + TASKS))
    return torch.cat([data.preprocess(episode.support_x), data.preprocess(episode.query_x)], 1)


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


def compare(folder: Path, size: int, gray: bool, cached: bool, rounds: int, work: Path) -> dict[str, Any]:
    """Check that both give the same images, then time them in turn."""
    data = ours(folder, size, gray, 4.0 if cached else 0.0, work / "cache")
    told, own = theirs(folder, size, gray, cached, data)
    told.describe_for_benchmark(0)
    mine, other = episodes(data, 0)[0], told[0][0]
    difference = float((mine - other).abs().mean())
    if difference > 0.02 or (size == 28 and difference > 1e-6):  # JPEGs are decoded at a lower scale
        raise SystemExit(f"the two sides give other images: {difference} apart on average")
    few = 2 if not cached else TASKS
    rates: dict[str, list[float]] = {"fomal": [], "learn2learn": [], "learn2learn, own": []}
    for number in tqdm(range(rounds), file=sys.stderr, disable=not sys.stderr.isatty()):
        first = (1 + number) * TASKS
        for i in range(first, first + few):
            told.describe_for_benchmark(i)
        random.seed(number)
        rates["fomal"].append(per_second(lambda n: episodes(data, n), TASKS, first))
        rates["learn2learn"].append(per_second(lambda n: [told[i] for i in range(n, n + few)], few, first))
        rates["learn2learn, own"].append(per_second(lambda n: [own.sample() for _ in range(few)], few, first))
    result: dict[str, Any] = {name: round(statistics.median(values), 1) for name, values in rates.items()}
    for name in ("learn2learn", "learn2learn, own"):
        ratios = [a / b for a, b in zip(rates["fomal"], rates[name], strict=True)]
        low, high = min(ratios), max(ratios)
        result[f"fomal over {name}"] = f"{statistics.median(ratios):.1f} ({low:.1f} to {high:.1f})"
    result["mean difference of pixels"] = round(difference, 5)
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
            for cached in (True, False):
                name = f"{kind}, {size} x {size}, {'cached' if cached else 'decoded'}"
                results[name] = compare(work / kind, size, size == 28, cached, args.rounds, work)
        results["resident MiB, photographs cached"] = memory(work / "photographs", 84, 4.0, work / "cache")
        results["resident MiB, photographs decoded"] = memory(work / "photographs", 84, 0.0, work / "cache")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
