"""Which file belongs to which class and split, by folders and by CSV."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest

from fomal.data.listing import Listed, Listing, by_csv, by_folders, enumerated
from fomal.data.source import Source, open_source
from tests.pictures import zipped


def tree(root: Path, *names: str) -> Path:
    """Empty files of these names, and folders for names that end in a slash; nothing here opens them."""
    for name in names:
        path = root / name
        (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
        if not name.endswith("/"):
            path.touch()
    return root


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
    assert listing == Listing(sorted(expected, key=lambda file: (file.label, file.name)), [])


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
        (["train/pear/1.png", "train/2.png"], r"has folders train, but also 'train/2.png': every image must lie in a"),
        (["test/a/1.png", "train/a/1.png", "b/1.png"], r"has folders test, train, but also 'b/1.png': every image"),
        (["a/1.png", "a/old/2.png"], r"has images in 'a' and in 'a/old' within it: move them, so that each class"),
        (["train/a/1.png", "train/a/x/y/2.png"], r"has images in 'a' and in 'a/x/y' within it: move them"),
    ],
)
def test_folders_that_leave_the_class_open_are_refused(names: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"^root='{tmp_path}' {message}"):
        by_folders(source(tmp_path, *names))


# -- CSV


def csv(folder: Path, text: str, encoding: str = "utf-8") -> str:
    folder.mkdir(exist_ok=True)
    (folder / "labels.csv").write_bytes(text.encode(encoding))
    return str(folder / "labels.csv")


def test_a_csv_names_classes_and_splits(tmp_path: Path) -> None:
    root = tree(tmp_path / "root", "a.png", "b, c.png", "sub/d.png", "not named.png")
    text = 'split,label,filename,remark\r\ntest," pear ","b, c.png",x\r\ntrain,é,a.png,\r\nval,fig,sub/d.png,\r\n'
    expected = [Listed("sub/d.png", "fig", "val"), Listed("b, c.png", "pear", "test"), Listed("a.png", "é", "train")]
    outside = csv(tmp_path / "elsewhere", text, "utf-8-sig")
    assert by_csv(open_source(str(root)), outside) == Listing(expected, [])
    assert by_csv(open_source(str(zipped(root, tmp_path / "root.zip"))), outside) == Listing(expected, [])
    csv(root, text)
    assert by_csv(open_source(str(root)), "labels.csv") == Listing(expected, [])


def test_the_images_of_a_csv_may_lie_below_images(tmp_path: Path) -> None:
    root = tree(tmp_path, "images/a.png", "images/b.png", "a.png")  # the last by chance
    listing = by_csv(open_source(str(root)), csv(tmp_path, "filename,label\na.png,x\nb.png,y\n"))
    assert listing.files == [Listed("images/a.png", "x"), Listed("images/b.png", "y")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("filename,class\na.png,x\n", "has no label: give it the columns filename,label"),
        ("a.png,x\nb.png,y\n", "has no filename and no label: give it the columns"),
        ("", "has no filename and no label"),
        ("filename,label\na.png,x\nb.png, \n", "line 3: it needs a filename and a label"),
        ("filename,label\n\na.png,x\n\nb.png\n", "line 5: it needs a filename and a label"),
        ("filename,label\n,x\n", "line 2: it needs a filename"),
        ("filename,label\na.png,x,train\n", "line 2: it needs a filename"),
        ("filename,label,split\na.png,x,train\nb.png,y,dev\n", "line 3: split 'dev' is none of train, val, test"),
        ("filename,label,split\na.png,x,train\nb.png,y,\n", "gives some rows a split and others none: fill the column"),
        ("filename,label\na.png,x\nb.png,y\na.png,z\n", "names 'a.png' twice, as 'x' and as 'z': keep one row"),
        ("filename,label\nc.png,x\nb.png,y\n../b.png,x\n", "names files that root=.* lacks: 'c.png', '../b.png'"),
    ],
)
def test_a_csv_that_cannot_be_used_is_refused(text: str, message: str, tmp_path: Path) -> None:
    root = tree(tmp_path / "root", "a.png", "b.png")
    path = csv(tmp_path, text)
    with pytest.raises(ValueError, match=f"^labels='{path}'.*{message}"):
        by_csv(open_source(str(root)), path)


def test_a_csv_in_another_encoding_or_nowhere_is_refused(tmp_path: Path) -> None:
    root = open_source(str(tree(tmp_path / "root", "a.png")))
    with pytest.raises(ValueError, match="is not a CSV file in UTF-8"):
        by_csv(root, csv(tmp_path, "filename,label\na.png,é\n", "latin1"))
    with pytest.raises(FileNotFoundError, match=r"^labels='no.csv' is neither a file nor one in root='.*root'"):
        by_csv(root, "no.csv")


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
    path = csv(tmp_path, f"filename,label\n1.png,{decomposed}\n2.png,{composed}\n")
    with pytest.raises(ValueError, match=message):
        by_csv(source(tmp_path / "csv", "1.png", "2.png"), path)


def test_long_lists_are_cut() -> None:
    assert enumerated("abc") == "'a', 'b', 'c'"
    assert enumerated("abcdefg") == "'a', 'b', 'c', 'd', 'e' and 2 more"
