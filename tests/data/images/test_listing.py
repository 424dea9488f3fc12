"""Which file belongs to which class and split, by folders."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest

from fomal.data.images.listing import Listed, Listing, by_folders, enumerated, split_named, split_within
from fomal.data.images.selection import Selection, tell_left_out
from fomal.data.images.source import Source, open_source
from tests.helpers.listings import tree
from tests.helpers.pictures import zipped


def source(root: Path, *names: str) -> Source:
    return open_source(str(tree(root, *names)))


# -- folders


LAYOUTS = {
    "flat": {"pear": ("pear", ""), "apple": ("apple", "")},
    "split": {"train/pear": ("pear", "train"), "val/fig": ("fig", "val"), "test/apple": ("apple", "test")},
    "common top": {"cifar_fs/train/pear": ("pear", "train"), "cifar_fs/test/fig": ("fig", "test")},
    "two common tops": {"a/b/pear": ("pear", ""), "a/b/fig": ("fig", "")},
    "one class": {"fruit/pear": ("pear", "")},
    "one split": {"fruit/train/pear": ("pear", "train"), "fruit/train/fig": ("fig", "train")},
    "nested": {"Greek/alpha": ("Greek/alpha", ""), "Latin/alpha": ("Latin/alpha", ""), "Latin/b": ("Latin/b", "")},
    "nested in splits": {"x/train/Greek/a": ("Greek/a", "train"), "x/test/Latin/a": ("Latin/a", "test")},
    "uneven": {"pear": ("pear", ""), "nuts/hazel": ("nuts/hazel", "")},
    "a class named train": {"fruit/train": ("train", ""), "fruit/pear": ("pear", ""), "fruit/test": ("test", "")},
    "a class named train in a split": {"train/train": ("train", "train"), "val/test": ("test", "val")},
    "other names of splits": {
        "Training/pear": ("pear", "train"),
        "valid/fig": ("fig", "val"),
        "dev/kiwi": ("kiwi", "val"),
        "TEST_set/apple": ("apple", "test"),
        "evaluation/plum": ("plum", "test"),
    },
    "words of splits": {"seg_train/pear": ("pear", "train"), "seg_test/fig": ("fig", "test")},
    "splits below classes": {"pear/train": ("pear", "train"), "fig/Test": ("fig", "test")},
    "splits between": {"Greek/train/a": ("Greek/a", "train"), "Latin/Validation/b": ("Latin/b", "val")},
    "a word of one split alone": {"dev tools/saw": ("dev tools/saw", ""), "food/fig": ("food/fig", "")},
    "one class in two splits": {"train/pear": ("pear", "train"), "test/pear": ("pear", "test")},
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("as_zip", [False, True], ids=["folder", "zip"])
def test_a_file_belongs_to_the_folder_it_lies_in(
    layout: dict[str, tuple[str, str]], as_zip: bool, tmp_path: Path
) -> None:
    names = [f"{folder}/{file}" for folder in layout for file in ("2.jpg", "1.PNG")]
    ignored = ["README.md", ".hidden/x.png", f"{next(iter(layout))}/._1.png", "__MACOSX/pear/._1.png"]
    root = tree(tmp_path / "tree", *names, *ignored)
    listing = by_folders(open_source(str(zipped(root, tmp_path / "tree.zip") if as_zip else root)))
    expected = [Listed(name, *layout[name.rpartition("/")[0]]) for name in names]
    assert listing[:2] == Listing(sorted(expected, key=lambda file: (file.label, file.name)), [])[:2]
    assert listing.left_out == {"README.md": ".md"}


@pytest.mark.parametrize("as_zip", [False, True], ids=["folder", "zip"])
def test_folders_without_an_image_are_listed(as_zip: bool, tmp_path: Path) -> None:
    names = ["fruit/train/pear/1.png", "fruit/train/empty/", "fruit/train/raw/1.heic", "fruit/lists/train.txt"]
    root = tree(tmp_path / "tree", *names, "fruit/val/")
    listing = by_folders(open_source(str(zipped(root, tmp_path / "tree.zip") if as_zip else root)))
    assert listing.empty == ["fruit/train/empty", "fruit/train/raw", "fruit/val"]
    assert [file.label for file in listing.files] == ["pear"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["1.png", "pear/1.png"], r"has images outside any folder, e.g. '1.png': put the images of each class into a"),
        (["notes.txt"], r"has no images: put the images of each class into a folder of its name, or name their"),
        (["train/pear/1.png", "train/2.png"], r"has images directly in folders of splits, 'train': put those of each"),
        (["train/1.png", "Val/1.png"], r"has images directly in folders of splits, 'Val', 'train': put those of each"),
        (["x/train/1.png", "x/test/1.png"], r"has images directly in folders of splits, 'test', 'train': put those"),
        (["test/a/1.png", "train/a/1.png", "b/1.png"], r"has folders of splits, 'test', 'train', but also 'b': every"),
        (["training/a/1.png", "foo/b/1.png"], r"has folders of splits, 'training', but also 'foo/b': every image"),
        (["a/train/x/1.png", "b/c/y/1.png"], r"has folders of splits, 'train', but also 'b/c/y': every image"),
        (["s_train/a/1.png", "s_test/b/1.png", "s_pred/1.png"], r"has folders of splits, 's_test', 's_train', but als"),
        (["a/1.png", "a/old/2.png"], r"has images in 'a' and in 'a/old' within it: move them, so that each class"),
        (["train/a/1.png", "train/a/x/y/2.png"], r"has images in 'a' and in 'a/x/y' within it: move them"),
    ],
)
def test_folders_that_leave_the_class_open_are_refused(names: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"^root='{tmp_path}' {message}"):
        by_folders(source(tmp_path, *names))


def test_what_names_a_split() -> None:
    for split, names in {
        "train": ("train", "Training", " TRAIN ", "trainset", "train-data", "training_set"),
        "val": ("val", "valid", "Validation", "dev", "val_images"),
        "test": ("test", "TESTING", "eval", "evaluation", "Test Set"),
        "": ("tests", "trainer", "seg_train", "pred", "", "set", "retrain"),
    }.items():
        assert {split_named(name) for name in names} == {split}
    assert [split_within(name) for name in ("seg_train", "x.Val.1", "train_test", "strain")] == ["train", "val", "", ""]


def test_classes_beside_others_may_be_called_as_splits_are_but_it_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        by_folders(source(tmp_path, "pear/1.png", "train/1.png", "test/2.png"))
    assert "'test', 'train' are classes and no splits" in caplog.text + capsys.readouterr().err


def test_patterns_say_which_images_are_meant(tmp_path: Path) -> None:
    """Masks may lie beside the pictures, or in a folder within."""
    names = ["a/1.JPG", "a/1_mask.png", "a/masks/1.jpg", "b/2.jpg", "b/2_Mask.png", "c/3.png", "masks/4.jpg"]
    root = source(tmp_path, *names, "a/notes.txt")
    listing = by_folders(root, Selection.of("*.jpg", ["*masks/*"]))
    assert listing.files == [Listed("a/1.JPG", "a"), Listed("b/2.jpg", "b")]
    assert listing.empty == []
    excluded, other = "that exclude names", "that include does not name"
    assert listing.left_out == {
        **{"a/notes.txt": ".txt", "a/1_mask.png": other, "b/2_Mask.png": other, "c/3.png": other},
        **{"a/masks/1.jpg": excluded, "masks/4.jpg": excluded},
    }
    assert len(by_folders(root, Selection.of(None, ["*_mask.*", "*/masks/*", "masks/*"])).files) == 3
    with pytest.raises(ValueError, match=r"^include=\['\*.jpeg'\] and exclude=\[\] leave none of the 7 images in"):
        by_folders(root, Selection.of(["*.jpeg"], None))
    with pytest.warns(UserWarning, match=r"^exclude: '\*_msk.\*' matches no image in root="):
        by_folders(root, Selection.of("*.jpg", ["*_msk.*", "*masks/*"]))
    with pytest.raises(ValueError, match="^exclude: '' is no pattern"):
        Selection.of(None, [""])
    with pytest.raises(TypeError, match="^include: 3 is no pattern"):
        Selection.of([3], None)  # type: ignore[list-item]


def test_what_is_left_out_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    root = source(tmp_path, "a/1.png", "a/1.txt", "a/2.txt", "b/x", "b/1.csv", "b/2.png")
    with caplog.at_level("INFO"):
        tell_left_out(root.label, by_folders(root, Selection.of(None, "2.*")).left_out)
    said = caplog.text + capsys.readouterr().err
    expected = "2 .txt (e.g. 'a/1.txt'), 1 .csv (e.g. 'b/1.csv'), 1 no suffix (e.g. 'b/x'), 1 that exclude names (e.g."
    assert f"{root.label} has files that are left out: {expected}" in said


# -- names


def test_names_that_differ_in_their_normal_form_alone_are_refused(tmp_path: Path) -> None:
    composed, decomposed = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))
    assert composed != decomposed
    listing = by_folders(source(tmp_path / "one", f"{decomposed}/1.png"))
    assert listing.files == [Listed(f"{decomposed}/1.png", composed)]  # the file keeps the name it has
    message = (
        r"has two classes with one name, 'é', which differ in how its letters are encoded \('e\\u0301' and '\\xe9'"
    )
    with pytest.raises(ValueError, match=message):
        by_folders(source(tmp_path / "two", f"{composed}/1.png", f"{decomposed}/2.png"))


def test_long_lists_are_cut() -> None:
    assert enumerated("abc") == "'a', 'b', 'c'"
    assert enumerated("abcdefg") == "'a', 'b', 'c', 'd', 'e' and 2 more"
