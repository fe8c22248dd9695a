"""Pathfinder: drawn pictures, read again from their pixels; folders in the released form; the command."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from sat.data import Pathfinder
from sat.data import pathfinder as module
from sat.data.pathfinder import __main__ as command
from sat.data.pathfinder import contours
from sat.data.pathfinder.contours import SETTINGS, Drawn, Settings, draw, draw_some, settings_of


@pytest.fixture(scope="module", params=SETTINGS)
def drawn(request: pytest.FixtureRequest) -> tuple[Settings, Drawn]:
    """A few pictures of each size."""
    settings = settings_of(request.param)
    return settings, draw_some(settings, 8, np.random.default_rng(3))


def ends(paddles: np.ndarray, length: float) -> np.ndarray:
    """Beginning and end of paddles ``[..., 3]``: ``[..., 2, 2]``, y and x."""
    step = np.stack([np.sin(paddles[..., 2]), np.cos(paddles[..., 2])], -1) * length
    return np.stack([paddles[..., :2], paddles[..., :2] + step], -2)


def points(paddle: np.ndarray, length: float) -> np.ndarray:
    first, last = ends(paddle, length)
    return first + np.linspace(0, 1, 40)[:, None] * (last - first)


def test_the_discs_in_the_picture_mark_the_ends_that_the_label_says(drawn: tuple[Settings, Drawn]):
    settings, some = drawn
    assert some.labels.tolist().count(1) == 4
    for picture, label, paddles in zip(some.pictures, some.labels, some.paddles, strict=True):
        assert picture.shape == (settings.size, settings.size)
        # A disc is the brightest place of its size, and the other one the brightest at some distance from it.
        blurred = ndimage.gaussian_filter(picture.astype(float), settings.marker_radius * 0.7)
        centres = []
        for _ in range(2):
            centre = np.array(np.unravel_index(blurred.argmax(), blurred.shape))
            distance = np.linalg.norm(np.indices(blurred.shape) - centre[:, None, None], axis=0)
            blurred[distance < 2 * settings.marker_radius] = 0
            centres.append(centre + 0.5)
        length = settings.contour_length
        tips = np.stack([ends(paddles[i * length : (i + 1) * length], settings.paddle_length) for i in range(2)])
        tips = tips.reshape(2, -1, 2)[:, [0, -1]]  # [contour, beginning or end, 2]
        marked = [divmod(int(np.linalg.norm(tips.reshape(4, 2) - centre, axis=1).argmin()), 2) for centre in centres]
        assert {end for _, end in marked} == {0, 1}  # one beginning and one end, which the picture does not tell apart
        assert (marked[0][0] == marked[1][0]) == bool(label)
        for centre, (contour, end) in zip(centres, marked, strict=True):
            assert np.linalg.norm(tips[contour, end] - centre) < 1.5


def test_contours_have_their_length_and_go_on_smoothly(drawn: tuple[Settings, Drawn]):
    settings, some = drawn
    length = settings.contour_length
    assert some.paddles.shape[1] == 2 * length + settings.num_distractors * settings.distractor_length
    long = some.paddles[:, : 2 * length].reshape(8, 2, length, 3)
    assert np.isfinite(long).all()
    turns = np.abs((np.diff(long[..., 2], axis=2) + np.pi) % (2 * np.pi) - np.pi)
    assert turns.max() < np.pi / 2 / settings.continuity
    assert turns.max() > np.pi / 8
    tips = ends(long, settings.paddle_length)
    gaps = np.linalg.norm(tips[:, :, 1:, 0] - tips[:, :, :-1, 1], axis=-1)
    assert gaps.max() <= 2 * max(settings.margins) + 1e-3
    assert gaps.min() > min(settings.margins)
    # The seeds of the two, and their distance from the border.
    seeds = long[:, :, 0, :2]
    assert (np.minimum(seeds, settings.size - seeds)[:, 0] >= 2 * settings.seed_distance).all()
    assert np.allclose(np.linalg.norm(seeds[:, 0] - seeds[:, 1], axis=-1), settings.seed_distance, atol=1e-3)
    assert tips.min() > 1
    assert tips.max() < settings.size - 1


def test_paddles_keep_apart(drawn: tuple[Settings, Drawn]):
    settings, some = drawn
    for paddles in some.paddles[:3]:
        contour = np.repeat(np.arange(2), settings.contour_length).tolist()
        contour += np.repeat(np.arange(settings.num_distractors) + 2, settings.distractor_length).tolist()
        shown = [(i, contour[i], points(paddle, settings.paddle_length)) for i, paddle in enumerate(paddles)]
        for i, of, first in shown:
            for j, other, second in shown[i + 1 :]:
                if np.isnan(first).any() or np.isnan(second).any() or (of == other and j == i + 1):
                    continue
                nearest = np.linalg.norm(first[:, None] - second, axis=-1).min()
                # A pixel of the finer grid may lie on the other side.
                assert nearest > 2 * min(settings.margins) + settings.paddle_thickness - 1.5 * (
                    1 + (settings.size > 64)
                )
                assert nearest > settings.paddle_thickness


def test_every_paddle_can_be_seen_as_one_piece():
    settings = settings_of(128)
    some = draw_some(settings, 4, np.random.default_rng(0))
    for picture, paddles in zip(some.pictures, some.paddles, strict=True):
        _, pieces = ndimage.label(picture > 60, np.ones((3, 3)))
        count = int(np.isfinite(paddles[:, 0]).sum())
        assert count >= 28 + 4 * 4
        assert count - 4 <= pieces <= count + 2  # discs hide a paddle each, or join it to the next


def test_the_border_stays_empty(drawn: tuple[Settings, Drawn]):
    settings, some = drawn
    border = settings.padding - 1  # whose pixels lines and discs at the edge of the inside may touch
    assert settings.padding == (22 if settings.size == 256 else 1)
    radius = math.ceil(settings.marker_radius)  # discs lie around the ends of paddles
    inside = np.s_[:, border - radius : radius - border, border - radius : radius - border]
    outside = some.pictures.copy()
    if border > radius:
        outside[inside] = 0
        assert not outside.any()
    tips = ends(some.paddles, settings.paddle_length)
    assert np.nanmin(tips) >= settings.padding
    assert np.nanmax(tips) <= settings.size - settings.padding


def test_at_32_pixels_what_distracts_is_brighter():
    settings = settings_of(32)
    some = draw_some(settings, 64, np.random.default_rng(0))
    brightness: list[list[int]] = [[], []]
    for picture, paddles, discs in zip(some.pictures, some.paddles, some.discs, strict=True):
        for number, (y, x) in enumerate(ends(paddles, settings.paddle_length / 2)[:, 1]):  # their middles
            far = np.linalg.norm(discs - (y, x), axis=1).min() > settings.marker_radius + 1
            if far and not np.isnan(y):
                brightness[number >= 2 * settings.contour_length].append(picture[int(y), int(x)])
    assert np.mean(brightness[1]) / np.mean(brightness[0]) == pytest.approx(4 / 3, rel=0.1)


def test_other_contours_can_be_asked_for():
    some = draw_some(settings_of(32, contour_length=6, num_distractors=0), 4, np.random.default_rng(0))
    assert some.paddles.shape == (4, 12, 3)


def test_the_seed_decides_and_the_number_of_workers_does_not(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(contours, "PIXELS_AT_ONCE", 0)  # 16 pictures at once
    settings = settings_of(16)

    def pictures(count: int, seed: int, workers: int) -> tuple[np.ndarray, np.ndarray]:
        parts: list[tuple[int, Drawn]] = []
        draw(settings, count, seed, lambda start, part: parts.append((start, part)), workers)
        assert [start for start, _ in parts] == list(range(0, count, 16))
        return np.concatenate([p.pictures for _, p in parts]), np.concatenate([p.labels for _, p in parts])

    one, labels = pictures(40, 5, 1)
    assert labels.sum() == 20
    assert np.array_equal(one, pictures(40, 5, 3)[0])
    assert np.array_equal(one[:32], pictures(32, 5, 2)[0])
    assert not np.array_equal(one, pictures(40, 6, 1)[0])
    assert len(np.unique(one.reshape(40, -1), axis=0)) == 40


def make(folder: Path, **arguments: Any) -> Pathfinder:
    options = {"cache_dir": str(folder / "cache"), "batch_size": 4, "image_size": 16, "num_samples": 50, **arguments}
    data = Pathfinder(**options)
    data.prepare_data()
    data.setup()
    return data


def test_the_data_module_draws_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    data = make(tmp_path)
    assert (data.seq_len, data.vocab_size, data.num_classes, data.has_padding) == (256, 256, 2, False)
    assert {name: len(rows) for name, (_, rows) in data._rows.items()} == {"train": 40, "validation": 5, "test": 5}
    batch = next(iter(data.train_dataloader()))
    assert batch["input_ids"].shape == (4, 256)
    assert batch["input_ids"].max() == 255
    monkeypatch.setattr(module, "draw", None)  # would fail
    again = make(tmp_path, seed=0)
    assert all(a.equal(b) for a, b in zip(next(iter(again.train_dataloader())).values(), batch.values(), strict=True))
    for other in ({"draw_seed": 1}, {"num_distractors": 1}, {"num_samples": 40}, {"contour_length": 4}):
        with pytest.raises(TypeError):
            make(tmp_path, **other)


def write(folder: Path, count: int = 20, size: int = 16) -> Path:
    """As the command writes it: picture i has the gray value i."""
    (folder / "metadata").mkdir(parents=True)
    for part in range(2):
        (folder / "imgs" / str(part)).mkdir(parents=True)
        lines = []
        for i in range(part * count // 2, (part + 1) * count // 2):
            Image.fromarray(np.full((size, size), i, np.uint8)).save(folder / "imgs" / str(part) / f"sample_{i}.png")
            lines.append(f"imgs/{part} sample_{i}.png {i} {i % 2} 1.0 14 4 2 0.5 1 1\n")
        (folder / "metadata" / f"{part}.npy").write_text("".join(lines))
    return folder


@pytest.mark.parametrize("inside", ["", "curv_contour_length_14"])
def test_released_folders(tmp_path: Path, inside: str):
    write(tmp_path / "data" / inside)
    data = make(tmp_path, path=str(tmp_path / "data"))
    seen = []
    for split, size in (("train", 16), ("validation", 2), ("test", 2)):
        tensors, rows = data._rows_of(split)
        assert len(rows) == size
        batch = data.dataset(tensors, rows)[list(range(size))]
        assert (batch["input_ids"] == batch["input_ids"][:, :1]).all()
        assert (batch["input_ids"][:, 0] % 2).equal(batch["labels"])
        seen += batch["input_ids"][:, 0].tolist()
    assert sorted(seen) == list(range(20))
    assert seen != sorted(seen)


def test_the_file_that_is_empty_in_the_release_is_left_out(tmp_path: Path):
    write(tmp_path / "data")
    (tmp_path / "data/imgs/0/sample_172.png").touch()
    with (tmp_path / "data/metadata/0.npy").open("a") as file:
        file.write("imgs/0 sample_172.png 172 1 1.0\n")
    assert make(tmp_path, path=str(tmp_path / "data"))._rows["train"][1].numel() == 16


def damage_size(folder: Path) -> None:
    Image.fromarray(np.zeros((8, 16), np.uint8)).save(folder / "imgs/1/sample_13.png")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda f: (f / "imgs/1/sample_12.png").unlink(),
            "1 of the 20 pictures .* missing or empty, such as imgs/1/samp",
        ),
        (lambda f: (f / "imgs/1/sample_12.png").write_bytes(b""), "1 of the 20 pictures .* unpack the whole archive"),
        (lambda f: (f / "imgs/1/sample_12.png").write_bytes(b"x"), "the picture in row .* cannot be decoded"),
        (lambda f: (f / "metadata/1.npy").unlink(), "has no metadata/1.npy, which says the labels of imgs/1; unpack"),
        (
            lambda f: (f / "metadata/1.npy").write_text("imgs/1 sample_12.png 3"),
            "line 1 of .*1.npy is 'imgs/1 sample_12",
        ),
        (
            lambda f: (f / "metadata/1.npy").write_text("imgs/1 sample_12.png 3 2"),
            "expected a folder, a file, a number",
        ),
        (lambda f: (f / "metadata/1.npy").write_text("../.. secret.png 3 1"), "such as ../../secret.png"),
        (lambda f: (f / "metadata/1.npy").write_bytes(b"\x93NUMPY\x01\x00v\xff"), "line 1 of .* expected a folder"),
        (lambda f: (f / "metadata").rename(f / "other"), "has no folders imgs and metadata; point --data.path at"),
        (damage_size, "has 16 x 8 pixels, expected 16 x 16; correct --data.image_size"),
    ],
)
def test_half_downloaded_folders(tmp_path: Path, damage: Callable[[Path], Any], message: str):
    damage(write(tmp_path / "data"))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        make(tmp_path, path=str(tmp_path / "data"))
    assert not any((tmp_path / "cache").glob("*"))


def test_pictures_of_another_size(tmp_path: Path):
    write(tmp_path / "data", size=16)
    with pytest.raises(ValueError, match=r"has 16 x 16 pixels, expected 32 x 32; correct --data.image_size"):
        make(tmp_path, path=str(tmp_path / "data"), image_size=32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_size": 48}, "Pathfinder is drawn at 16, 32, 64, 128, 256 pixels, not at 48; choose one"),
        ({"num_samples": 9}, "num_samples must be an integer of at least 10, got 9"),
        ({"contour_length": 1}, "contour_length must be an integer of at least 2, got 1"),
        ({"num_distractors": -1}, "num_distractors must be an integer of at least 0, got -1"),
        ({"draw_seed": -1}, "draw_seed must be an integer of at least 0"),
        ({"contour_length": 60}, r"220 paddles \(two contours of 60, 5 that distract of 20\) do not fit in 32 x 32"),
    ],
)
def test_impossible_arguments(arguments: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        Pathfinder(**arguments)


def test_contours_that_hardly_ever_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(contours, "HOPELESS_AFTER", 100)
    with pytest.raises(ValueError, match="attempts to fit two contours of 13 paddles into 16 x 16 pixels none has"):
        make(tmp_path, contour_length=13, num_distractors=0)
    assert list((tmp_path / "cache").iterdir()) == []


def test_the_command_draws_what_the_data_module_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "out"
    arguments = ["--size", "16", "--count", "20", "--out", str(out)]
    assert command.main(arguments) == 0
    assert "20 pictures of 16 x 16 pixels lie in" in capsys.readouterr().out
    data = make(tmp_path, path=str(out))
    assert sum(int(tensors["labels"][rows].sum()) for tensors, rows in data._rows.values()) == 10
    drawn = draw_some(settings_of(16), 20, np.random.default_rng([0, 0]))
    assert np.array_equal(np.asarray(Image.open(out / "imgs/0/sample_7.png")), drawn.pictures[7])
    assert command.main(arguments) == 2
    assert "is no empty folder; choose another --out" in capsys.readouterr().err


def test_an_interrupted_command_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    def interrupted(settings: Any, count: int, seed: int, take: Any) -> None:
        take(0, draw_some(settings, 4, np.random.default_rng([0, 0])))
        (folder,) = tmp_path.glob("out.partial-*")  # which a kill leaves: not what was asked for
        assert len([*folder.glob("imgs/0/*.png")]) == 4
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "draw", interrupted)
    (tmp_path / "out").mkdir()
    assert command.main(["--size", "16", "--count", "20", "--out", str(tmp_path / "out")]) == 130
    assert capsys.readouterr().err == "sat.data.pathfinder: interrupted; nothing was kept\n"
    assert [*tmp_path.iterdir()] == [tmp_path / "out"]
    assert not any((tmp_path / "out").iterdir())


def test_pictures_that_changed_are_read_again(tmp_path: Path):
    out = tmp_path / "out"
    command.main(["--size", "16", "--count", "20", "--out", str(out)])
    assert max(int(tensors["pixels"].max()) for tensors, _ in make(tmp_path, path=str(out))._rows.values()) > 0
    for file in out.glob("imgs/*/*.png"):
        Image.fromarray(np.zeros((16, 16), np.uint8)).save(file)
    assert max(int(tensors["pixels"].max()) for tensors, _ in make(tmp_path, path=str(out))._rows.values()) == 0


def test_how_to_draw_does_not_go_with_pictures_that_are_there(tmp_path: Path):
    with pytest.raises(ValueError, match=r"num_distractors are of pictures that are drawn, those in .* leave out"):
        make(tmp_path, path="there", contour_length=3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "20", "--count", "5"], "Pathfinder is drawn at 16, 32, 64, 128, 256 pixels, not at 20"),
        (["--size", "32", "--count", "0"], "count must be at least 1"),
        (["--size", "32", "--count", "5", "--contour_length", "90"], "do not fit in 32 x 32 pixels"),
        (["--size", "16", "--count", "4", "--contour_length", "10", "--num_distractors", "0"], "none has succeeded"),
    ],
)
def test_the_command_refuses_with_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
):
    assert command.main([*arguments, "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
