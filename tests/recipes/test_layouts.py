import dataclasses

import pytest
import torch
from PIL import Image
from recipe_toys import picture

from we_surgery.errors import InputError
from we_surgery.recipes.layouts import EXPECTED, IGNORED_LABEL, Clips, open_dataset
from we_surgery.recipes.loaders import make_transform
from we_surgery.recipes.recipe import Data


def data(layout, **settings):
    return Data(layout, classes=2, input_size=(3, 8, 8), **settings)


def test_an_image_folder_is_read(image_folder):
    dataset = open_dataset(data("imagefolder"), image_folder, is_training=True)
    assert len(dataset) == 8
    dataset.transform = make_transform(data("imagefolder"), "classification", is_training=True)
    assert dataset[7][0].shape == (3, 8, 8)
    assert [dataset[index][1] for index in range(8)] == [0] * 4 + [1] * 4


def test_tiny_imagenet_is_read(tmp_path):
    for name in ("n01", "n02"):
        picture(tmp_path / "train" / name / "images" / f"{name}_0.JPEG")
    for number in range(3):
        picture(tmp_path / "val" / "images" / f"val_{number}.JPEG")
    lines = "val_0.JPEG\tn02\t0\t0\t9\t9\nval_1.JPEG\tn01\t0\t0\t9\t9\nval_2.JPEG\tn02\t0\t0\t9\t9"
    (tmp_path / "val" / "val_annotations.txt").write_text(lines)
    train = open_dataset(data("tiny-imagenet"), tmp_path, is_training=True)
    validation = open_dataset(data("tiny-imagenet"), tmp_path, is_training=False)
    assert [label for _, label in train] == [0, 1]
    assert [label for _, label in validation] == [1, 0, 1]


def test_voc_is_read_with_the_masks_of_its_split(tmp_path):
    root = tmp_path / "VOCdevkit" / "VOC2012"
    picture(root / "JPEGImages" / "a.jpg", size=(20, 16))
    picture(root / "SegmentationClassAug" / "a.png", size=(20, 16), mode="L", high=2)
    (root / "ImageSets" / "Segmentation").mkdir(parents=True)
    (root / "ImageSets" / "Segmentation" / "trainaug.txt").write_text("a\n")
    settings = data("voc", train="trainaug", crop="scaled")
    dataset = open_dataset(settings, tmp_path, is_training=True)
    dataset.transform = make_transform(settings, "segmentation", is_training=True)
    image, mask = dataset[0]
    assert (image.shape, mask.shape) == ((3, 8, 8), (8, 8))
    assert set(mask.unique().tolist()) <= {0, 1, IGNORED_LABEL}
    # Evaluated whole.
    dataset.transform = make_transform(settings, "segmentation", is_training=False)
    assert dataset[0][0].shape == (3, 16, 20)
    assert dataset[0][1].shape == (16, 20)


def test_cityscapes_is_read_with_the_classes_that_count(tmp_path):
    stem = "aachen_000000_000019"
    picture(tmp_path / "leftImg8bit" / "val" / "aachen" / f"{stem}_leftImg8bit.png")
    labels = tmp_path / "gtFine" / "val" / "aachen" / f"{stem}_gtFine_labelIds.png"
    labels.parent.mkdir(parents=True)
    # Road, sidewalk, unlabelled, bicycle.
    Image.fromarray(torch.tensor([[7, 8], [0, 33]], dtype=torch.uint8).numpy()).save(labels)
    dataset = open_dataset(data("cityscapes"), tmp_path, is_training=False)
    assert dataset[0][1].tolist() == [[0, 1], [IGNORED_LABEL, 18]]


def test_frame_folders_are_read(tmp_path):
    for frame in range(5):
        picture(tmp_path / "videos" / "one" / f"{frame}.jpg", seed=frame)
    (tmp_path / "val.txt").write_text("videos/one 5 1\n")
    settings = data("frames", frames=3)
    dataset = open_dataset(settings, tmp_path, is_training=False)
    dataset.transform = make_transform(settings, "video", is_training=False)
    clip, label = dataset[0]
    assert (clip.shape, label) == ((3, 3, 8, 8), 1)


@pytest.mark.parametrize(
    ("sampling", "available", "expected"),
    [
        ("dense", 9, [3, 4, 5]),
        ("dense", 2, [0, 1, 0]),
        ("strided", 9, [1, 4, 7]),
        ("strided", 2, [0, 0, 1]),
    ],
)
def test_clips_are_sampled_in_the_middle_when_evaluated(sampling, available, expected):
    assert Clips([], 3, sampling, at_random=False)._positions(available) == expected


@pytest.mark.parametrize("sampling", ["dense", "strided"])
def test_clips_are_sampled_at_random_in_training(sampling):
    clips = Clips([], 3, sampling, at_random=True)
    drawn = [clips._positions(30) for _ in range(20)]
    assert len({tuple(positions) for positions in drawn}) > 5
    assert all(
        0 <= p < 30 and positions == sorted(positions) for positions in drawn for p in positions
    )


@pytest.mark.parametrize("layout", EXPECTED)
def test_missing_images_are_one_error_that_says_what_to_put_where(layout, tmp_path):
    with pytest.raises(InputError) as caught:
        open_dataset(data(layout, frames=3), tmp_path, is_training=True)
    assert "'train'" in caught.value.cause
    assert caught.value.cure == f"Put them there as {EXPECTED[layout].format(split='train')}."


def test_a_video_without_frames_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "train.txt").write_text("empty 0\n")
    dataset = open_dataset(data("frames", frames=3), tmp_path, is_training=True)
    with pytest.raises(InputError, match="empty has no frames"):
        dataset[0]


def test_padded_crops_keep_the_size():
    settings = dataclasses.replace(data("cifar10"), crop="padded", crop_pct=1.0)
    image = Image.new("RGB", (8, 8))
    for is_training in (True, False):
        transform = make_transform(settings, "classification", is_training=is_training)
        assert transform(image).shape == (3, 8, 8)
