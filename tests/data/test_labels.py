"""Which class of a head a folder is: by name, and where it must be assumed, said or refused."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest
import timm
import torch
from timm.data import ImageNetInfo

from data_helpers import encode, picture, write_folder, write_zip
from saccade.backbones.vit import class_names_of, set_class_names
from saccade.core.timm_types import ViT
from saccade.data import ImageSet, class_indices, class_names, head_labels, open_images
from saccade.errors import UserError
from saccade.training.starting import fit_head

PNG = encode(picture())
SYNSETS = ImageNetInfo("imagenet-1k").label_names()


def labelled(tmp_path: Path, *classes: str) -> ImageSet:
    return open_images(write_folder(tmp_path, {f"{name}/1.png": PNG for name in classes}))


def headed(*names: str, classes: int | None = None) -> ViT:
    """A small ViT whose head has these classes, or so many without names."""
    vit = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, embed_dim=12, depth=1, num_heads=1, num_classes=classes or len(names)
    )
    if names:
        set_class_names(vit, names)
    return vit


def taken(images: ImageSet, vit: ViT) -> dict[str, int]:
    """Folder -> class of the head."""
    return {name.split("/")[-2]: i for name, i in zip(images.names, head_labels(images, vit).indices, strict=True)}


def refusal(images: ImageSet, vit: ViT) -> str:
    with pytest.raises(UserError) as error:
        head_labels(images, vit)
    text = str(error.value)
    assert "\n" not in text
    return text


# Heads with names


def test_names_decide_whatever_the_order_and_however_few(tmp_path: Path) -> None:
    vit = headed("fox", "cat", "dog")
    assert taken(labelled(tmp_path / "all", "cat", "dog", "fox"), vit) == {"cat": 1, "dog": 2, "fox": 0}
    assert taken(labelled(tmp_path / "two", "dog", "fox"), vit) == {"dog": 2, "fox": 0}
    assert head_labels(labelled(tmp_path / "one", "dog"), vit).how == ""


def test_as_many_other_classes_are_refused_by_name(tmp_path: Path) -> None:
    vit = headed("cat", "dog", "fox")
    assert "1 of 3 classes" in (said := refusal(labelled(tmp_path / "a", "ant", "cat", "dog"), vit))
    assert "(ant)" in said and "(cat, dog, fox)" in said
    assert "(0, 1, 2)" in refusal(labelled(tmp_path / "n", "0", "1", "2"), vit), "numbers are no names of this head"
    assert "(Cat)" in refusal(labelled(tmp_path / "c", "Cat", "dog"), vit)


def test_numbers_are_compared_as_numbers(tmp_path: Path) -> None:
    text_order = headed(*sorted(str(i) for i in range(12)))  # as a head trained on folders sorted as text
    assert taken(labelled(tmp_path / "s", *map(str, range(12))), text_order)["2"] == 4
    padded = labelled(tmp_path / "p", "02", "10", "11")
    assert taken(padded, text_order) == {"02": 4, "10": 2, "11": 3}
    assert "name one class" in refusal(labelled(tmp_path / "d", "1", "01"), text_order)


def test_a_word_is_the_same_in_either_encoding(tmp_path: Path) -> None:
    composed, apart = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    assert composed != apart
    assert taken(labelled(tmp_path / "mac", apart, "bar"), headed("bar", composed)) == {apart: 1, "bar": 0}
    assert "name one class" in refusal(labelled(tmp_path / "both", apart, composed), headed("bar", composed))


# ImageNet's


def test_synsets_and_indices_map_onto_imagenet(tmp_path: Path) -> None:
    vit = headed(classes=1000)
    assert taken(labelled(tmp_path / "s", "n15075141", "n01440764"), vit) == {"n15075141": 999, "n01440764": 0}
    indices = labelled(tmp_path / "i", "0344", "7", "0999")
    assert taken(indices, vit) == {"0344": 344, "7": 7, "0999": 999}
    assert "taken for class indices of ImageNet-1k" in head_labels(indices, vit).how
    assert class_indices(labelled(tmp_path / "one", "n01440764"), 1000) == [0]
    every = labelled(tmp_path / "all", *map(str, range(1000)))
    assert head_labels(every, vit).how == ""
    assert taken(every, vit)["10"] == 10


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("width", [1, 2, 4])
def test_numbers_without_a_gap_may_be_anybodys(tmp_path: Path, first: int, width: int) -> None:
    images = labelled(tmp_path, *(f"{i:0{width}}" for i in range(first, first + 12)))
    assert "or 12 classes of your own" in refusal(images, headed(classes=1000))


def test_a_larger_imagenet_goes_by_synset(tmp_path: Path) -> None:
    images = labelled(tmp_path, "n02084071", "n00005787")
    names = ImageNetInfo("imagenet-22k").label_names()
    assert class_indices(images, 21841) == [names.index("n00005787"), names.index("n02084071")]


@pytest.mark.parametrize(
    ("classes", "head", "said"),
    [
        (["cat", "dog"], 1000, r"2 classes in .*, 1000 in the model's head; folders \(cat, dog\) are named neither by"),
        (["n01440764", "1"], 1000, "2 classes in"),
        (["999", "1000"], 1000, "2 classes in"),
        (["n01440764", "n15075141"], 10, "2 classes in .*, 10 in the model's head: fine-tune"),
    ],
)
def test_folders_that_do_not_fit_the_head(tmp_path: Path, classes: list[str], head: int, said: str) -> None:
    with pytest.raises(UserError, match=said):
        class_indices(labelled(tmp_path, *classes), head)


# Heads without names


def test_without_names_the_order_is_said(tmp_path: Path) -> None:
    images = labelled(tmp_path, "dog", "cat", "0010")
    found = head_labels(images, headed(classes=3))
    assert found.indices == [0, 1, 2]
    assert "have no names: folders 0010, cat, dog in order of name" in found.how
    assert class_indices(images.subset([2]), 3) == [2]


def test_numbers_are_in_order_of_number(tmp_path: Path) -> None:
    files = {f"{i}/1.png": PNG for i in range(12)}
    for images in (open_images(write_folder(tmp_path / "f", files)), open_images(write_zip(tmp_path / "z.zip", files))):
        assert images.classes == [str(i) for i in range(12)]
        assert taken(images, headed(classes=12)) == {str(i): i for i in range(12)}
        assert "in order of number" in head_labels(images, headed(classes=12)).how


@pytest.mark.parametrize(
    ("classes", "said"),
    [
        ([f"class{i}" for i in range(1, 13)], "class 1 is 'class10' in torchvision's and 'class2' in timm's"),
        (["Zebra", "ant", "bee"], "class 0 is 'Zebra' in torchvision's and 'ant' in timm's"),
        (["-1", "-2"], None),  # both agree
    ],
)
def test_two_orders_are_both_named_and_refused(tmp_path: Path, classes: list[str], said: str | None) -> None:
    images, vit = labelled(tmp_path, *classes), headed(classes=len(classes))
    if said is None:
        assert head_labels(images, vit).indices == [0, 1]
    else:
        assert said in refusal(images, vit)


def test_an_unlabelled_set_has_no_class_indices(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no labels in .*class/name"):
        class_indices(open_images(write_folder(tmp_path, {"1.png": PNG})), 1000)


def test_class_names() -> None:
    names = class_names(1000)
    assert names is not None
    assert (len(names), names[0], names[344]) == (
        1000,
        "tench, Tinca tinca",
        "hippopotamus, hippo, river horse, Hippopotamus amphibius",
    )
    assert class_names(10) is None


# Heads that are about to be trained


def fitted(images: ImageSet, vit: ViT) -> tuple[int, str]:
    """How many classes the head then has, and what is said of it."""
    found = fit_head(vit, images)
    names = class_names_of(vit)
    assert names is not None, "a trained head has names"
    assert [names[i] for i in found.indices] == [name.split("/")[-2] for name in images.names] or names[0] == SYNSETS[0]
    return vit.num_classes, found.how


def test_a_head_is_kept_where_it_knows_all_folders(tmp_path: Path) -> None:
    assert fitted(labelled(tmp_path / "sub", "cat", "fox"), headed("fox", "dog", "cat"))[0] == 3
    assert fitted(labelled(tmp_path / "net", "n01440764", "n15075141"), headed(classes=1000))[0] == 1000
    count, how = fitted(labelled(tmp_path / "four", "0344", "0999"), headed(classes=1000))
    assert count == 1000 and "keeps its 1000 classes; the images are of 2 of them" in how
    count, how = fitted(labelled(tmp_path / "bare", "cat", "fox"), headed(classes=2))
    assert count == 2 and "no names" in how


@pytest.mark.parametrize("classes", [[str(i) for i in range(12)], [f"{i:04}" for i in range(12)], ["7", "101", "344"]])
def test_numbers_of_ones_own_get_a_new_head(tmp_path: Path, classes: list[str]) -> None:
    vit = headed(classes=1000)
    count, how = fitted(labelled(tmp_path, *classes), vit)
    assert count == len(classes) and f"a new head for {len(classes)} classes" in how
    assert class_names_of(vit) == tuple(classes), "in the head's order, by number"
    assert not vit.head.weight.any()


def test_other_classes_of_the_same_number_get_a_new_head(tmp_path: Path) -> None:
    vit = headed("cat", "dog", "fox")
    assert torch.count_nonzero(vit.head.weight)
    assert fitted(labelled(tmp_path, "cat", "dog", "owl"), vit)[0] == 3
    assert class_names_of(vit) == ("cat", "dog", "owl")
    assert not vit.head.weight.any()
