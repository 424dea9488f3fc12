"""A model adapted to a user's own classes: predict, save and load."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor, nn

from fomal.adaptation.folder import (
    ABOUT,
    AGAIN,
    SUPPORT,
    WEIGHTS,
    image_format_of,
    make_network,
    read_about,
    read_support,
)
from fomal.adaptation.inputs import ImageLike, decode_all
from fomal.data.images.image_format import ImageFormat
from fomal.inner.objective import Objective
from fomal.models.norm import has_batch_norm, uses_support
from fomal.run.schema import MODEL_FORMAT, Mismatch
from fomal.utils.checks import first_line
from fomal.utils.files import naming
from fomal.utils.tree import Tree, detach

_TOGETHER = 256  # images in a forward pass, where each to be predicted brings the support set along


class Predictions(NamedTuple):
    """A model's predictions for Q images.

    Attributes:
        labels: the most probable class of each.
        probabilities: (Q, N) float32, rows sum to 1, in the order of the model's classes.
    """

    labels: list[str]
    probabilities: Tensor


class Adapted:
    """A network adapted to N classes, with the examples it was adapted to.

    Attributes:
        network: with the adapted weights, in evaluation mode.
        classes: the N names, in the order of the outputs.
        image_format: how files become the network's images.
        support: (S, C, H, W) uint8, the examples; batch norm sees each image together with all of them, as in the
            evaluation of the checkpoint it came from.
        labels: (S,) int64, their classes.
        about: where it came from: checkpoint, settings, versions.
    """

    def __init__(
        self,
        network: nn.Module,
        classes: Sequence[str],
        image_format: ImageFormat,
        support: Tensor,
        labels: Tensor,
        about: Mapping[str, Any],
    ) -> None:
        self.network = network.eval()
        self.classes = list(classes)
        self.image_format = image_format
        self.support = support
        self.labels = labels
        self.about = dict(about)
        self._objective: Objective | None = None

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.network.parameters()).device

    def predict(self, images: ImageLike | Iterable[ImageLike], transductive: bool = False) -> Predictions:
        """Classify images.

        Args:
            images: files, images of Pillow's, arrays or tensors, each of any size, or a single one; (Q, C, H, W) uint8;
                or the path of a folder or an archive, of which all images are taken, sorted by name.
            transductive: forward all images together, so that batch norm sees them alone; what is said of one then
                depends on the others. Otherwise each is forwarded with the support set and nothing else.

        Raises:
            FileNotFoundError: there is no such file or folder.
            TypeError: `images` is nothing of the kind.
            ValueError: an image cannot be read; or `transductive` with one image and batch norm.
        """
        return self.predict_pixels(torch.from_numpy(decode_all(images, self.image_format)), transductive)

    @torch.no_grad()
    def predict_pixels(self, images: Tensor, transductive: bool = False) -> Predictions:
        """Do as `predict`, for images (Q, C, H, W) uint8 that have the format already.

        Raises:
            ValueError: `transductive` of one image, with batch norm.
        """
        alone = transductive and len(images) == 1
        if alone and has_batch_norm(self.network) and not uses_support(self.network):
            raise ValueError("transductive=True of one image leaves batch norm nothing to compare it with: give more.")
        params, support = {name: p[None] for name, p in self._parameters().items()}, self._inputs(self.support)
        objective = self._settled(support)
        logits = [torch.empty(1, 0, len(self.classes))]
        if transductive:
            x = self._inputs(images)[None]
            logits.append(objective.predict(params, x, objective.support_for(support[None], x)))
        few = max(1, _TOGETHER // (1 + len(support)))
        for start in range(0, 0 if transductive else len(images), few):
            x = self._inputs(images[start : start + few])
            logits.append(objective.predict_inductive(params, support[None], x[None]))
        probabilities = torch.cat([part.float().cpu() for part in logits], 1)[0].softmax(-1)
        return Predictions([self.classes[i] for i in probabilities.argmax(-1).tolist()], probabilities)

    def _parameters(self) -> Tree:
        return detach(dict(self.network.named_parameters()))

    def _inputs(self, images: Tensor) -> Tensor:
        x = self.image_format.normalize(images.to(self.device))
        return x.to(next(self.network.parameters()).dtype)

    def _settled(self, support: Tensor) -> Objective:
        """Tell whether images can be vectorised over is found out once."""
        if self._objective is None or self._objective.network is not self.network:
            self._objective = Objective(self.network)
        if not self._objective.is_settled(second_order=False):
            x, y = (t.expand(2, *t.shape) for t in (support, self.labels.to(self.device)))
            self._objective.settle(self._parameters(), x, y)
        return self._objective

    def save(self, folder: str | Path) -> None:
        """Write a folder that needs nothing else: weights, examples, and a JSON of the rest.

        Raises:
            FileExistsError: there is such a folder already.
            ValueError: the network was made in Python, so that no configuration says how to make it again.
        """
        folder = Path(folder)
        refuse_existing(folder)
        if not self.about.get("network"):
            raise ValueError(
                "the network was not made from a configuration, so that nothing says how to make it again: adapt a "
                "checkpoint of `fomal fit`, or save network.state_dict() yourself."
            )
        unfinished = folder.with_name(f".{secrets.token_hex(8)}.unfinished")
        with naming(folder):
            unfinished.mkdir(parents=True)
        try:
            # A copy of each, since safetensors refuses tensors that share memory, as tied weights do.
            state = self.network.state_dict().items()
            weights = {name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in state}
            # Not save_file, whose files are private to the user.
            (unfinished / WEIGHTS).write_bytes(save(weights))
            examples = {"images": self.support.contiguous(), "labels": self.labels}
            (unfinished / SUPPORT).write_bytes(save(examples))
            about = {"format": MODEL_FORMAT, "classes": self.classes, "image_format": asdict(self.image_format)}
            (unfinished / ABOUT).write_text(json.dumps(about | self.about, indent=2) + "\n")
            os.replace(unfinished, folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)

    @classmethod
    def load(
        cls, folder: str | Path, device: torch.device | str = "cpu", trust: Collection[str] | None = None
    ) -> Adapted:
        """Read a folder of `save`.

        Args:
            folder: may be somebody else's: nothing in it is run.
            device: where the network goes.
            trust: names of classes, or packages, that the folder may use beside fomal's and torch's, which it is
                otherwise refused for, before they are imported; see `fomal.run.trust`.

        Raises:
            FileNotFoundError: it lacks a file.
            OSError: a file is no regular one, is too large, or may not be read.
            ValueError: a file is damaged, does not fit the others, is of a newer format, or names what is not
                trusted.
        """
        folder = Path(folder)
        about = read_about(folder)
        classes = about["classes"]
        try:
            image_format = image_format_of(about)
            support, labels = read_support(folder, image_format, len(classes))
            network = make_network(folder, about, trust).to(device)
            rest = {key: value for key, value in about.items() if key not in ("format", "classes", "image_format")}
            model = cls(network, classes, image_format, support, labels, rest)
            model._refuse_misfit()
        except Mismatch as error:
            raise ValueError(f"{folder} cannot be used: {error}. {AGAIN}") from error
        except Exception as error:  # a network of whatever class is made and tried
            raise ValueError(f"{folder} cannot be used: {first_line(error)}") from error
        return model

    @torch.no_grad()
    def _refuse_misfit(self) -> None:
        """Raise `Mismatch` for a network that does not give one output for each class of images of this format."""
        outputs = self.network(self._inputs(self.support[:2]))
        if outputs.shape[1:] != (len(self.classes),):
            raise Mismatch(f"its network has outputs {tuple(outputs.shape[1:])} for {len(self.classes)} classes")


def refuse_existing(folder: Path, name: str = "folder") -> None:
    """Raise FileExistsError where `folder`, given as `name`, exists: an adapted model is never written over."""
    if folder.exists():
        raise FileExistsError(f"{name}={folder} exists already: give another folder, or remove it.")
