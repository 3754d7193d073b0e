"""The digits that ship with the package are what their source file says they are."""

import hashlib
import re
from importlib.resources import files

import numpy as np
import pytest

from portable_softmax._cli import digits

DATA = files("portable_softmax") / "data"


@pytest.fixture(scope="module")
def images_and_labels():
    return digits.load()


def test_checksums_of_the_file_and_of_the_values_are_the_documented_ones(images_and_labels):
    images, labels = images_and_labels
    documented = re.findall(r"\b[0-9a-f]{64}\b", (DATA / "SOURCE.txt").read_text("utf-8"))
    of_file = hashlib.sha256((DATA / "digits.npz").read_bytes()).hexdigest()
    of_values = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()
    assert documented == [of_file, of_values]


def test_the_source_file_names_source_citation_and_licence():
    text = (DATA / "SOURCE.txt").read_text("utf-8")
    for word in ("archive.ics.uci.edu", "Alpaydin", "10.24432/C50P49", "CC BY 4.0"):
        assert word in text


def test_the_data_is_compact():
    assert len((DATA / "digits.npz").read_bytes()) < 100 * 1024


def test_shapes_ranges_and_class_counts(images_and_labels):
    images, labels = images_and_labels
    assert images.shape == (1797, 8, 8)
    assert labels.shape == (1797,)
    assert images.dtype == labels.dtype == np.uint8
    assert (images.min(), images.max()) == (0, 16)
    counts = [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert np.bincount(labels).tolist() == counts


def test_split_holds_out_a_fifth_of_every_class_and_loses_no_digit(images_and_labels):
    images, labels = images_and_labels
    split = digits.split(images, labels, np.random.default_rng(0))
    every, held_out = np.bincount(labels), np.bincount(split.held_out_t)
    assert np.all(np.abs(held_out - every / 5) < 1)
    together = np.concatenate([split.train_x, split.held_out_x]) * 16
    assert sorted(map(bytes, together.astype(np.uint8))) == sorted(map(bytes, images))
    assert np.array_equal(np.bincount(split.train_t) + held_out, every)


def test_split_follows_its_generator(images_and_labels):
    first, same, other = (
        digits.split(*images_and_labels, np.random.default_rng(seed)).held_out_x
        for seed in (0, 0, 1)
    )
    assert np.array_equal(first, same)
    assert not np.array_equal(first, other)
