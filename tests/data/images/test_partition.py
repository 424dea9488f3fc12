"""Which classes are trained on, validated on and tested on."""

from __future__ import annotations

import math
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fomal.data.images.listing import Listed
from fomal.data.images.partition import partition


def files(*labels: str, split: str = "") -> list[Listed]:
    """Two images of each class."""
    return [Listed(f"{split}/{label}/{i}.png", label, split) for label in labels for i in range(2)]


GIVEN = [*files("a", "b", split="train"), *files("c", split="val"), *files("d", "e", split="test")]
FLAT = files(*"abcdefgh")


# -- as given


def test_given_splits_are_kept() -> None:
    assert partition(GIVEN, "given") == {"train": ["a", "b"], "val": ["c"], "test": ["d", "e"]}
    assert partition([*files("a", split="train"), *files("b", split="test")], "given") == {
        "train": ["a"],
        "val": ["a"],
        "test": ["b"],
    }
    assert partition(files("a", split="test"), "given") == {"test": ["a"]}


@pytest.mark.parametrize("how", ["auto", "given"])
def test_a_class_in_two_splits_is_refused(how: str) -> None:
    both = [*files("a", "b", split="train"), *files("b", split="val"), *files("c", "a", split="test")]
    message = (
        r"^the splits train and val have the same classes, 'b', but a few-shot learner is tested on classes it has "
        r"not seen: use data.split: share, which divides the classes of all folders anew, or lists of classes\.$"
    )
    with pytest.raises(ValueError, match=message):
        partition(both, how)
    remedied = partition(both, "share", shares=(0.3, 0.3))
    assert sorted(label for labels in remedied.values() for label in labels) == ["a", "b", "c"]
    assert partition(both, "auto", {"train": ["b"], "test": ["a"]}) == {"train": ["b"], "val": ["b"], "test": ["a"]}


def test_classes_of_two_splits_that_differ_in_capitals_alone_are_said() -> None:
    both = [*files("Pear", "fig", split="train"), *files("pear", split="test")]
    with pytest.warns(UserWarning, match="train and test have classes whose names differ in capitals alone, 'Pear"):
        partition(both)


# -- by lists


def test_lists_choose_classes_and_leave_the_others_out(tmp_path: Path) -> None:
    (tmp_path / "val.txt").write_text("\ufeffg\n\n  b \n", "utf-8")
    lists = {"train": ["h", "a"], "val": str(tmp_path / "val.txt"), "test": ("c",)}
    assert partition(FLAT, "lists", lists) == {"train": ["h", "a"], "val": ["g", "b"], "test": ["c"]}
    assert partition(FLAT, "lists", {**lists, "val": None}) == {"train": ["h", "a"], "val": ["h", "a"], "test": ["c"]}
    assert partition(FLAT, "lists", {"test": ["c"]}) == {"test": ["c"]}


def test_a_list_may_spell_letters_in_either_normal_form() -> None:
    composed, decomposed = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))
    assert partition(files(composed), "lists", {"train": [decomposed]})["train"] == [composed]


@pytest.mark.parametrize(
    ("lists", "error", "message"),
    [
        (
            {"train": ["a", "x"]},
            ValueError,
            r"^train_classes names classes that there are not: 'x'; there are 'a', 'b'",
        ),
        ({"train": ["a"], "val": ["b", "c", "b"]}, ValueError, r"^val_classes names 'b' twice"),
        ({"train": ["a", "b"], "test": ["b"]}, ValueError, r"^the splits train and test have the same classes, 'b'"),
        ({"test": "no.txt"}, FileNotFoundError, r"^test_classes='no.txt' is no file: give a list of classes, or a"),
        ({"train": None}, ValueError, r"^split='lists' needs data.train_classes, and data.val_classes and"),
    ],
)
def test_lists_that_cannot_be_used_are_refused(lists: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        partition(FLAT, "lists", lists)


# -- by share


@given(
    classes=st.integers(1, 60),
    val=st.integers(0, 60),
    test=st.integers(0, 60),
    seed=st.integers(0, 2**32),
    shuffle=st.randoms(),
)
def test_a_share_of_the_classes(classes: int, val: int, test: int, seed: int, shuffle) -> None:
    """Sizes are exact, rounded up; all classes are divided; the choice depends on names and seed alone."""
    names = [f"class {i}" for i in range(classes)]
    sizes = [-(-classes * percent // 100) for percent in (val, test)]  # in integers
    shares = val / 100, test / 100
    listed = files(*names)
    if sum(sizes) >= classes:
        with pytest.raises(ValueError, match=f"^val_share={shares[0]} and test_share={shares[1]} leave none of the "):
            partition(listed, "share", shares=shares, seed=seed)
        return
    splits = partition(listed, "share", shares=shares, seed=seed)
    assert sorted(splits["train"] + splits.get("test", []) + (splits["val"] if val else [])) == sorted(names)
    assert len(splits.get("test", [])) == sizes[1]
    assert len(splits["val"]) == (sizes[0] or len(splits["train"]))
    if not val:
        assert splits["val"] == splits["train"]
    shuffle.shuffle(listed)
    again = [file._replace(name=f"other {file.name}", split=shuffle.choice(["train", "test"])) for file in listed]
    assert partition(again, "share", shares=shares, seed=seed) == splits


def test_shares_as_they_are_written_are_exact() -> None:
    hundred = files(*map(str, range(100)))
    for percent in range(1, 50):
        splits = partition(hundred, "share", shares=(percent / 100, percent / 100))
        assert [len(splits[split]) for split in ("val", "test")] == [percent, percent]
    assert len(partition(hundred, "share", shares=(0.001, 1 / 3))["val"]) == 1
    assert len(partition(hundred, "share", shares=(0.001, 1 / 3))["test"]) == math.ceil(100 / 3)


def test_every_class_is_as_likely_to_be_tested_on() -> None:
    draws = 1000
    tested = [label for seed in range(draws) for label in partition(FLAT, "share", seed=seed)["test"]]
    assert len(tested) == 2 * draws
    for label in "abcdefgh":  # binomial, 1/4: five standard deviations
        assert abs(tested.count(label) / draws - 1 / 4) < 5 * math.sqrt(3 / 16 / draws)


# -- which of them


def test_auto_takes_lists_before_what_is_given_before_a_share() -> None:
    assert partition(GIVEN, lists={"train": ["e"]}) == {"train": ["e"], "val": ["e"]}
    assert partition(GIVEN, lists={"train": None}) == partition(GIVEN, "given")
    assert partition(FLAT, seed=3) == partition(FLAT, "share", seed=3)
    assert partition(GIVEN, "share") != partition(GIVEN, "given")
    with pytest.raises(ValueError, match=r"^split='given' needs folders train/, val/ and test/ or a column split"):
        partition(FLAT, "given")
