"""Samples: pictures in files, and how they look in a prompt."""

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


def make(n: int, channels: int = 3, height: int = 4, width: int = 6) -> Samples:
    """Noise, so that every picture differs and none can be compressed."""
    return of(np.random.default_rng(0).integers(0, 256, (n, height, width, channels), dtype=np.uint8))


def of(array: NDArray[Any]) -> Samples:
    return Samples(array=array, seeds=tuple(range(len(array))), conditioning={}, timings=Timings(noise=0, steps=(0,), decode=0, total=0))


def pixels(path: Path) -> NDArray[np.uint8]:
    with Image.open(path) as image:
        return np.asarray(image)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_one_picture(tmp_path: Path, channels: int, mode: str) -> None:
    samples = make(1, channels)
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
    samples = make(n, channels)
    sheet = pixels(samples.save(str(tmp_path / "grid.png"), columns=columns))
    rows, across = layout
    assert sheet.shape[:2] == (rows * 4, across * 6)
    for i in range(rows * across):
        top, left = i // across * 4, i % across * 6
        cell = sheet[top : top + 4, left : left + 6].reshape(4, 6, channels)
        np.testing.assert_array_equal(cell, samples.array[i] if i < n else 0, err_msg=f"picture {i}")


@pytest.mark.parametrize("ending", [".png", ".PNG", ".bmp", ".gif", ".jpg", ".jpeg", ".tiff", ".webp"])
def test_formats(tmp_path: Path, ending: str) -> None:
    path = make(4).save(tmp_path / f"grid{ending}")
    with Image.open(path) as image:
        assert image.size == (12, 8)
        assert image.format == Image.EXTENSION[ending.lower()]


@pytest.mark.parametrize("name", ["grid", "grid.xyz", "grid.psd", ".png"])  # psd: Pillow reads it only
def test_an_unknown_ending(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidArgumentError, match=r"unknown picture format '.*'\. Use an ending such as \.png"):
        make(1).save(tmp_path / name)
    assert tree(tmp_path) == {}


def test_folders_are_made(tmp_path: Path) -> None:
    assert make(1).save(tmp_path / "a" / "b" / "one.png").is_file()


def test_a_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert make(1).save("one.png") == Path("one.png")
    assert sorted(tree(tmp_path)) == ["one.png"]


def test_the_file_has_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    path = make(1).save(tmp_path / "one.png")
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_file_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "one.png"
    path.write_bytes(b"before")
    samples = make(1)
    samples.save(path)
    np.testing.assert_array_equal(pixels(path), samples.array[0])
    assert sorted(tree(tmp_path)) == ["one.png"]


@pytest.mark.parametrize("ending", [".png", ".jpg", ".bmp", ".tiff"])
def test_a_full_disk_leaves_the_earlier_file(tmp_path: Path, ending: str) -> None:
    (tmp_path / f"one{ending}").write_bytes(b"before")
    with full_disk(1000), pytest.raises(OutputError, match=r"cannot write '.*one\..*': File too large\. Choose a folder .* disk with room"):
        make(4, height=32, width=32).save(tmp_path / f"one{ending}")
    assert tree(tmp_path) == {f"one{ending}": b"before"}


def test_an_interrupt_leaves_the_earlier_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "one.png").write_bytes(b"before")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    for place, name in ((samples_module, "grid"), (Path, "write_bytes"), (Path, "replace")):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, interrupted)
            with pytest.raises(KeyboardInterrupt):
                make(1).save(tmp_path / "one.png")
        assert tree(tmp_path) == {"one.png": b"before"}, name


def test_a_folder_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "one.png").mkdir()
    with pytest.raises(OutputError, match=r"cannot write '.*one\.png': Is a directory"):
        make(1).save(tmp_path / "one.png")
    assert tree(tmp_path) == {"one.png": None}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda path: make(2).save(path, columns=0), "columns must be at least 1, got 0"),
        (lambda path: of(np.zeros((2, 3, 8, 8), np.float32)).save(path), "are latents: use output_type='pil' or 'np'"),
    ],
    ids=["columns", "latents"],
)
def test_arguments(tmp_path: Path, call: Callable[[Path], object], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        call(tmp_path / "one.png")
    assert tree(tmp_path) == {}


def test_len_and_repr() -> None:
    assert len(make(3)) == 3
    assert repr(make(3)) == "Samples(uint8 [3, 4, 6, 3], seeds 0, 1, 2)"
    assert len(repr(make(500))) < 100
    assert repr(make(500)).endswith("6, 7, …)")


def test_images_are_made_once() -> None:
    samples = make(2)
    assert samples.images is samples.images
    assert len(samples.images) == 2


def test_samples_can_be_compared_and_kept_in_a_set() -> None:
    one, other = make(2), make(2)
    assert one == one
    assert one != other
    assert len({one, other}) == 2


def test_the_umask_is_kept(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        assert make(1).save(tmp_path / "one.png").stat().st_mode & 0o777 == 0o640
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)


@pytest.mark.parametrize(
    ("name", "width", "said"), [("grid.ico", 300, r"ICO shrinks 300 x 40 pixels to \d+ x \d+"), ("grid.webp", 17000, "WEBP cannot represent 17000 x 40 pixels")]
)
def test_a_picture_that_its_format_does_not_hold(name: str, width: int, said: str, tmp_path: Path) -> None:
    samples = Samples(np.zeros((1, 40, width, 3), np.uint8), (0,), {}, Timings(0, (), 0, 0))
    with pytest.raises(InvalidArgumentError, match=rf"cannot write '.*{name}': {said}.*Use \.png"):
        samples.save(tmp_path / name)
    assert not list(tmp_path.iterdir())
