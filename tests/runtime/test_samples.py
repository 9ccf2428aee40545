"""``Samples``: saving images to files, ``images``, ``len`` and ``repr``."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from scm_runtime import InvalidArgumentError, OutputError, Samples, Timings
from scm_runtime import samples as samples_module
from support import full_disk, tree


def random_samples(n: int, channels: int = 3, height: int = 4, width: int = 6) -> Samples:
    """Return samples of noise, so that all images differ and do not compress."""
    return make_samples(np.random.default_rng(0).integers(0, 256, (n, height, width, channels), dtype=np.uint8))


def make_samples(array: NDArray[Any]) -> Samples:
    return Samples(array=array, seeds=tuple(range(len(array))), conditioning={}, timings=Timings(noise=0, steps=(0,), decode=0, total=0))


def pixels(path: Path) -> NDArray[np.uint8]:
    with Image.open(path) as image:
        return np.asarray(image)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_one_image(tmp_path: Path, channels: int, mode: str) -> None:
    samples = random_samples(1, channels)
    path = samples.save(tmp_path / "one.png")
    assert path == tmp_path / "one.png"
    with Image.open(path) as image:
        assert (image.format, image.mode, image.size) == ("PNG", mode, (6, 4))
    np.testing.assert_array_equal(pixels(path).reshape(4, 6, channels), samples.array[0])
    assert samples.images[0].mode == mode


@pytest.mark.parametrize(
    ("n", "columns", "layout"), [(2, None, (1, 2)), (5, None, (2, 3)), (9, None, (3, 3)), (5, 5, (1, 5)), (5, 2, (3, 2)), (3, 1, (3, 1)), (2, 8, (1, 2))]
)
@pytest.mark.parametrize("channels", [1, 3])
def test_a_grid(tmp_path: Path, n: int, columns: int | None, layout: tuple[int, int], channels: int) -> None:
    samples = random_samples(n, channels)
    sheet = pixels(samples.save(str(tmp_path / "grid.png"), columns=columns))
    rows, across = layout
    assert sheet.shape[:2] == (rows * 4, across * 6)
    for i in range(rows * across):
        top, left = i // across * 4, i % across * 6
        cell = sheet[top : top + 4, left : left + 6].reshape(4, 6, channels)
        np.testing.assert_array_equal(cell, samples.array[i] if i < n else 0, err_msg=f"image {i}")


@pytest.mark.parametrize("extension", [".png", ".PNG", ".bmp", ".gif", ".jpg", ".jpeg", ".tiff", ".webp"])
def test_formats(tmp_path: Path, extension: str) -> None:
    path = random_samples(4).save(tmp_path / f"grid{extension}")
    with Image.open(path) as image:
        assert image.size == (12, 8)
        assert image.format == Image.EXTENSION[extension.lower()]


@pytest.mark.parametrize("name", ["grid", "grid.xyz", "grid.psd", ".png"])  # Pillow reads psd but does not write it
def test_an_unknown_file_extension(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidArgumentError, match=r"unknown picture format '.*'\. Use an ending such as \.png"):
        random_samples(1).save(tmp_path / name)
    assert tree(tmp_path) == {}


def test_missing_folders_are_created(tmp_path: Path) -> None:
    assert random_samples(1).save(tmp_path / "a" / "b" / "one.png").is_file()


def test_a_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert random_samples(1).save("one.png") == Path("one.png")
    assert sorted(tree(tmp_path)) == ["one.png"]


def test_the_file_has_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    path = random_samples(1).save(tmp_path / "one.png")
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_an_existing_file_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "one.png"
    path.write_bytes(b"before")
    samples = random_samples(1)
    samples.save(path)
    np.testing.assert_array_equal(pixels(path), samples.array[0])
    assert sorted(tree(tmp_path)) == ["one.png"]


@pytest.mark.parametrize("extension", [".png", ".jpg", ".bmp", ".tiff"])
def test_a_full_disk_leaves_the_existing_file(tmp_path: Path, extension: str) -> None:
    (tmp_path / f"one{extension}").write_bytes(b"before")
    with full_disk(1000), pytest.raises(OutputError, match=r"cannot write '.*one\..*': File too large\. Choose a folder .* disk with room"):
        random_samples(4, height=32, width=32).save(tmp_path / f"one{extension}")
    assert tree(tmp_path) == {f"one{extension}": b"before"}


def test_an_interrupt_leaves_the_existing_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "one.png").write_bytes(b"before")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    for owner, name in ((samples_module, "grid"), (Path, "write_bytes"), (Path, "replace")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, interrupt)
            with pytest.raises(KeyboardInterrupt):
                random_samples(1).save(tmp_path / "one.png")
        assert tree(tmp_path) == {"one.png": b"before"}, name


def test_a_path_that_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "one.png").mkdir()
    with pytest.raises(OutputError, match=r"cannot write '.*one\.png': Is a directory"):
        random_samples(1).save(tmp_path / "one.png")
    assert tree(tmp_path) == {"one.png": None}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda path: random_samples(2).save(path, columns=0), "columns must be at least 1, got 0"),
        (lambda path: make_samples(np.zeros((2, 3, 8, 8), np.float32)).save(path), "are latents: use output_type='pil' or 'np'"),
    ],
    ids=["columns", "latents"],
)
def test_invalid_arguments(tmp_path: Path, call: Callable[[Path], object], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        call(tmp_path / "one.png")
    assert tree(tmp_path) == {}


def test_len_and_repr() -> None:
    assert len(random_samples(3)) == 3
    assert repr(random_samples(3)) == "Samples(uint8 [3, 4, 6, 3], seeds 0, 1, 2)"
    assert len(repr(random_samples(500))) < 100
    assert repr(random_samples(500)).endswith("6, 7, …)")


def test_images_are_created_once() -> None:
    samples = random_samples(2)
    assert samples.images is samples.images
    assert len(samples.images) == 2


def test_samples_compare_by_identity_and_are_hashable() -> None:
    one, other = random_samples(2), random_samples(2)
    assert one == one
    assert one != other
    assert len({one, other}) == 2


def test_files_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        assert random_samples(1).save(tmp_path / "one.png").stat().st_mode & 0o777 == 0o640
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)


@pytest.mark.parametrize(
    ("name", "width", "message"),
    [("grid.ico", 300, r"ICO shrinks 300 x 40 pixels to \d+ x \d+"), ("grid.webp", 17000, "WEBP cannot represent 17000 x 40 pixels")],
)
def test_an_image_that_its_format_cannot_represent(name: str, width: int, message: str, tmp_path: Path) -> None:
    samples = Samples(np.zeros((1, 40, width, 3), np.uint8), (0,), {}, Timings(0, (), 0, 0))
    with pytest.raises(InvalidArgumentError, match=rf"cannot write '.*{name}': {message}.*Use \.png"):
        samples.save(tmp_path / name)
    assert not list(tmp_path.iterdir())
