"""Pictures as gray pixels, from hand-made files and folders."""

from __future__ import annotations

import io
import json
import re
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sat.data import CIFAR10, CIFAR10RGB, Digits, INaturalist
from sat.data.pictures import flip_and_shift, read_processor

from .conftest import png

RNG = np.random.default_rng(0)


def test_digits_are_the_pictures_of_scikit_learn_enlarged():
    from sklearn.datasets import load_digits

    small, large = Digits(image_size=8), Digits()
    assert (large.vocab_size, large.num_classes, large.seq_len, large.has_padding) == (17, 10, 1024, False)
    assert small.seq_len == 64
    source = load_digits()
    for digits in (small, large):
        digits.prepare_data()
        digits.setup()
    assert large.class_names == list("0123456789")
    rows = small._rows["test"][1].numpy()
    got = torch.cat([batch["input_ids"] for batch in small.test_dataloader()])
    assert got.tolist() == source.images[rows].reshape(-1, 64).astype(int).tolist()
    batch = next(iter(large.test_dataloader()))
    assert set(batch) == {"input_ids", "labels"}
    assert batch["labels"].tolist() == source.target[rows][:64].tolist()
    # Enlarged by 4, what lies outside of the outermost pixels' centres has their value: corners stay what they are.
    corners = batch["input_ids"][0].view(32, 32)[[0, 0, 31, 31], [0, 31, 0, 31]]
    assert corners.tolist() == source.images[rows[0]][[0, 0, 7, 7], [0, 7, 0, 7]].astype(int).tolist()
    means = batch["input_ids"].view(-1, 8, 4, 8, 4).float().mean((2, 4)).numpy()
    assert np.corrcoef(means.ravel(), source.images[rows][:64].ravel())[0, 1] > 0.97


@pytest.mark.parametrize("column", ["img", "image"])
def test_pictures_become_gray_pixels_row_by_row(picture_folder: Callable[..., Path], column: str):
    colour, gray = RNG.integers(0, 256, (32, 32, 3), np.uint8), RNG.integers(0, 256, (48, 40), np.uint8)
    folder = picture_folder(column, train=[(gray, i % 10) for i in range(20)], test=[(colour, 3), (gray, 9)])
    data = CIFAR10(path=str(folder), cache_dir=str(folder / "cache"), batch_size=2)
    data.prepare_data()
    data.setup()
    (batch,) = data.test_dataloader()
    resized = Image.fromarray(gray).resize((32, 32), Image.Resampling.BILINEAR)
    weights = colour.astype(np.float64) @ [0.299, 0.587, 0.114]  # ITU-R 601-2, as in Pillow's documentation
    assert np.abs(batch["input_ids"][0].numpy() - weights.reshape(-1)).max() <= 1
    assert batch["input_ids"].tolist() == [
        list(Image.fromarray(colour).convert("L").tobytes()),
        list(resized.tobytes()),
    ]
    assert batch["labels"].tolist() == [3, 9]
    assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64


def write_pictures(root: Path, names: list[str]) -> None:
    """One picture a name, whose gray value is the position in the list times 10."""
    for value, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png(np.full((8, 8), 10 * value, np.uint8)))


def splits_of(data: INaturalist) -> dict[str, set[tuple[int, int]]]:
    """(gray value / 10, label) of each sample of each split."""
    data.setup()
    loaders = {"train": data.train_dataloader(), "val": data.val_dataloader(), "test": data.test_dataloader()}
    return {
        name: {
            (int(pixels[0]) // 10, int(label))
            for b in loader
            for pixels, label in zip(b["input_ids"], b["labels"], strict=True)
        }
        for name, loader in loaders.items()
    }


def inaturalist(root: Path, cache: Path, num_classes: int = 2) -> INaturalist:
    return INaturalist(path=str(root), cache_dir=str(cache), num_classes=num_classes, image_size=4, batch_size=1)


def test_class_folders_without_splits(tmp_path: Path):
    root = tmp_path / "root"
    write_pictures(root, [f"{name}/{i}.PNG" for name in ("Aves", "Fungi") for i in range(5)])
    (root / "Aves" / "notes.txt").write_text("no picture")
    data = inaturalist(root, tmp_path)
    splits = splits_of(data)
    assert data.class_names == ["Aves", "Fungi"]
    assert [len(splits[name]) for name in ("train", "val", "test")] == [8, 1, 1]
    assert set.union(*splits.values()) == {(i, i // 5) for i in range(10)}


def test_class_folders_may_be_links(tmp_path: Path):
    write_pictures(tmp_path / "all", [f"{name}/{i}.png" for name in ("Aves", "Fungi", "Plantae") for i in range(5)])
    for split in ("train", "test"):
        (tmp_path / "root" / split).mkdir(parents=True)
        for name in ("Aves", "Fungi"):
            (tmp_path / "root" / split / name).symlink_to(tmp_path / "all" / name)
    data = inaturalist(tmp_path / "root", tmp_path)
    splits = splits_of(data)
    assert data.class_names == ["Aves", "Fungi"]
    assert splits["test"] == {(i, i // 5) for i in range(10)}


@pytest.mark.parametrize("held_out", ["val", "validation"])
def test_class_folders_with_train_and_validation(tmp_path: Path, held_out: str):
    root = tmp_path / "root"
    write_pictures(
        root, [f"train/{n}/{i}.png" for n in "ab" for i in range(5)] + [f"{held_out}/{n}/9.png" for n in "ab"]
    )
    splits = splits_of(inaturalist(root, tmp_path))
    assert splits["test"] == {(10, 0), (11, 1)}
    assert len(splits["train"]) == 9
    assert len(splits["val"]) == 1


def test_the_unpacked_archive_of_the_competition(tmp_path: Path):
    names = [f"train_val2018/{n}/{species}/{i}.jpg" for n in ("Aves", "Fungi") for species in (7, 8) for i in range(3)]
    write_pictures(tmp_path / "root", names)
    official = {"images": [{"id": i, "file_name": names[i]} for i in (0, 8)], "annotations": []}
    (tmp_path / "root" / "val2018.json").write_text(json.dumps(official))
    splits = splits_of(inaturalist(tmp_path / "root", tmp_path))
    assert splits["test"] == {(0, 0), (8, 1)}
    assert splits["train"] | splits["val"] == {(i, i // 6) for i in range(12)} - splits["test"]


@pytest.mark.parametrize(
    "content",
    [
        '{"imgs": []}',
        "[]",
        "7",
        '{"images": null}',
        '{"images": ["train_val2018/Aves/7/0.jpg"]}',
        '{"images": [{"id": 3}]}',
        '{"images": [{"file_name": 3}]}',
        '{"images": [{"file_name": "train_val',
        "",
        "\xff",
    ],
)
def test_a_list_of_validation_pictures_that_is_none(tmp_path: Path, content: str):
    write_pictures(tmp_path / "root", [f"train_val2018/{n}/7/{i}.jpg" for n in ("Aves", "Fungi") for i in range(3)])
    file = tmp_path / "root" / "val2018.json"
    file.write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=f"^{re.escape(str(file))} is cut short or .* expected {{.*; unpack it"):
        inaturalist(tmp_path / "root", tmp_path).prepare_data()


@pytest.mark.parametrize(
    "names", [[], ["train_val2018/Aves/7/99.jpg"], [f"train_val2018/Aves/7/{i}.jpg" for i in (1, 3)]]
)
def test_a_list_of_validation_pictures_that_are_not_there(tmp_path: Path, names: list[str]):
    write_pictures(tmp_path / "root", [f"train_val2018/{n}/7/{i}.jpg" for n in ("Aves", "Fungi") for i in range(3)])
    file = tmp_path / "root" / "val2018.json"
    file.write_text(json.dumps({"images": [{"file_name": name} for name in names]}))
    missing = min(len(names), 1)
    message = (
        f"^{re.escape(str(file))} names {len(names)} validation picture.* of which {missing} are missing.*; unpack"
    )
    with pytest.raises(ValueError, match=message):
        inaturalist(tmp_path / "root", tmp_path).prepare_data()


def test_two_folders_of_one_split_are_refused(tmp_path: Path):
    root = tmp_path / "root"
    write_pictures(
        root, [f"{split}/{n}/{i}.png" for split in ("train", "val", "validation") for n in "ab" for i in (1, 2)]
    )
    with pytest.raises(ValueError, match="two folders of the validation split, val and validation; remove one"):
        inaturalist(root, tmp_path).prepare_data()


def test_a_split_folder_without_pictures_is_refused(tmp_path: Path):
    root = tmp_path / "root"
    write_pictures(root, [f"{split}/{n}/{i}.png" for split in ("train", "val") for n in "ab" for i in range(5)])
    (root / "test").mkdir()
    with pytest.raises(ValueError, match=f"the test split in {re.escape(str(root))} .* has 0 rows; .* or remove it"):
        inaturalist(root, tmp_path).prepare_data()


def test_another_number_of_class_folders_is_refused(tmp_path: Path):
    write_pictures(tmp_path / "root", ["a/1.png", "b/1.png", "c/1.png"])
    with pytest.raises(ValueError, match=r"3 class folders .* expected 2; pass --data\.num_classes 3"):
        inaturalist(tmp_path / "root", tmp_path).prepare_data()


def test_large_photographs_are_decoded_at_a_fraction_of_their_size(tmp_path: Path):
    ramp = np.linspace(0, 255, 640).astype(np.uint8)[None].repeat(480, 0)
    for name in ("a", "b"):
        (tmp_path / "root" / name).mkdir(parents=True)
        for i in range(3):
            Image.fromarray(ramp).convert("RGB").save(tmp_path / "root" / name / f"{i}.jpg", quality=95)
    data = INaturalist(path=str(tmp_path / "root"), cache_dir=str(tmp_path), num_classes=2, batch_size=1)
    data.setup()
    got = next(iter(data.test_dataloader()))["input_ids"][0].numpy().reshape(32, 32)
    exact = np.asarray(Image.fromarray(ramp).resize((32, 32), Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(got - exact).max() <= 3


def test_real_pictures(shared: Callable[[str], str], tmp_path: Path):
    import pyarrow.parquet as pq

    path = Path(shared("cifar10"))
    table = pq.read_table(path / "test.parquet").slice(0, 300)
    for split in ("train", "test"):
        pq.write_table(table, tmp_path / f"{split}.parquet")
    data = CIFAR10(path=str(tmp_path), cache_dir=str(tmp_path / "cache"), batch_size=64)
    data.prepare_data()
    data.setup()
    assert data.class_names[:3] == ["airplane", "automobile", "bird"]
    batch = next(iter(data.test_dataloader()))
    for got, row in zip(batch["input_ids"], table.slice(0, 64).to_pylist(), strict=True):
        assert got.tolist() == list(Image.open(io.BytesIO(row["img"]["bytes"])).convert("L").tobytes())
    assert batch["labels"].tolist() == table["label"].to_pylist()[:64]
    loader = iter(data.train_dataloader())
    next(loader)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        next(loader)
        times.append(time.perf_counter() - start)
    assert min(times) < 5e-3


def test_many_classes_from_real_parquet(shared: Callable[[str], str], tmp_path: Path):
    import pyarrow.parquet as pq

    path = Path(shared("tiny_imagenet32"))
    for split in ("train", "validation"):
        pq.write_table(pq.read_table(path / f"{split}.parquet").slice(0, 400), tmp_path / f"{split}.parquet")
    data = INaturalist(path=str(tmp_path), num_classes=200, cache_dir=str(tmp_path / "cache"), batch_size=64)
    data.setup()
    assert data.num_classes == len(data.class_names) == 200
    assert {name: len(rows) for name, (_, rows) in data._rows.items()} == {"train": 360, "validation": 40, "test": 400}


PROCESSOR = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.25, 0.5], "size": {"height": 32, "width": 32}}


class TestColour:
    @pytest.fixture
    def processor(self, tmp_path: Path) -> Callable[..., str]:
        def write(**settings: object) -> str:
            folder = tmp_path / "processor"
            folder.mkdir(exist_ok=True)
            (folder / "preprocessor_config.json").write_text(json.dumps({**PROCESSOR, **settings}))
            return str(folder)

        return write

    def test_pictures_as_a_pretrained_model_takes_them(self, picture_folder, processor):
        colour, gray = RNG.integers(0, 256, (32, 32, 3), np.uint8), RNG.integers(0, 256, (48, 40), np.uint8)
        folder = picture_folder(train=[(gray, i % 10) for i in range(20)], test=[(colour, 3), (gray, 9)])
        options = {"path": str(folder), "cache_dir": str(folder / "cache"), "batch_size": 2}
        data = CIFAR10RGB(processor=processor(), **options)
        data.setup()
        assert (data.num_classes, data.size(), data.metric) == (10, "32 x 32 pixels", "acc")
        (batch,) = data.test_dataloader()
        assert set(batch) == {"pixel_values", "labels"}
        assert batch["labels"].tolist() == [3, 9]
        values = batch["pixel_values"]
        assert (values.dtype, values.shape) == (torch.float32, (2, 3, 32, 32))
        resized = np.asarray(Image.fromarray(gray).convert("RGB").resize((32, 32), Image.Resampling.BILINEAR))
        for got, picture in zip(values.double(), (colour, resized), strict=True):
            expected = (picture.astype(np.float64) / 255 - PROCESSOR["image_mean"]) / PROCESSOR["image_std"]
            assert np.abs(got.numpy() - expected.transpose(2, 0, 1)).max() < 1e-5
        # The same samples make up the splits of both kinds.
        ids = CIFAR10(**options)
        ids.setup()
        assert all(ids._rows[name][1].equal(data._rows[name][1]) for name in ids._rows)

    def test_the_size_is_that_of_the_model_and_the_cache_fits_all(self, picture_folder, processor, monkeypatch):
        colour = RNG.integers(0, 256, (32, 32, 3), np.uint8)
        folder = picture_folder(train=[(colour, 0)] * 12)
        options = {"path": str(folder), "cache_dir": str(folder / "cache"), "batch_size": 2}
        CIFAR10RGB(processor=processor(), **options).prepare_data()
        monkeypatch.setattr(CIFAR10RGB, "encode", None)  # would fail
        larger = CIFAR10RGB(processor=processor(size={"height": 40, "width": 64}, do_normalize=False), **options)
        assert larger.size() == "40 x 64 pixels"
        larger.setup()
        values = next(iter(larger.test_dataloader()))["pixel_values"]
        expected = np.asarray(Image.fromarray(colour).resize((64, 40), Image.Resampling.BILINEAR)) / 255
        assert (
            np.abs(values[0].numpy().transpose(1, 2, 0) - expected).max() < 1.1 / 255
        )  # Pillow rounds after each direction
        asked = CIFAR10RGB(processor=processor(size=224), image_size=48, **options)
        assert asked.size() == "48 x 48 pixels"
        assert read_processor(processor(size=224))[2] == (224, 224)
        assert read_processor(processor(size={"shortest_edge": 96}))[2] == (96, 96)
        deit = {"size": {"height": 256, "width": 256}, "crop_size": {"height": 224, "width": 224}}
        assert read_processor(processor(**deit, do_center_crop=True))[2] == (224, 224)
        assert read_processor(processor(**deit, do_center_crop=False))[2] == (256, 256)
        assert read_processor(processor(size=256, crop_size=224, do_center_crop=True))[2] == (224, 224)

    @pytest.mark.parametrize("odd", [{"do_rescale": False}, {"rescale_factor": 1 / 127.5}])
    def test_a_processor_of_other_values_is_refused(self, processor, odd):
        with pytest.raises(ValueError, match="and 1/255 is expected"):
            read_processor(processor(**odd))

    def test_flipped_and_shifted(self):
        pictures = torch.arange(1.0, 1 + 200 * 3 * 16 * 24).view(200, 3, 16, 24)
        batch = {"pixel_values": pictures, "labels": torch.arange(200)}
        got = flip_and_shift(batch, np.random.default_rng(0))
        assert got["labels"] is batch["labels"]
        seen = set()
        for before, after in zip(pictures, got["pixel_values"], strict=True):
            for flip in (False, True):
                source = torch.nn.functional.pad(before.flip(-1) if flip else before, (3, 3, 2, 2))
                for up in range(5):
                    for left in range(7):
                        if source[:, up : up + 16, left : left + 24].equal(after):
                            seen.add((flip, up, left))
                            break
        assert len(seen) > 60  # of 70
        again = flip_and_shift(batch, np.random.default_rng(0))["pixel_values"]
        assert again.equal(got["pixel_values"])

    def test_only_training_pictures_are_changed_and_each_epoch_otherwise(self, picture_folder, processor):
        rows = [(RNG.integers(0, 256, (32, 32, 3), np.uint8), i % 10) for i in range(20)]
        folder = picture_folder(train=rows, test=rows[:4])
        options = {"path": str(folder), "cache_dir": str(folder / "cache"), "batch_size": 18, "processor": processor()}
        plain, changed = CIFAR10RGB(**options), CIFAR10RGB(**options, augment=True)
        for data in (plain, changed):
            data.setup()
        assert next(iter(plain.test_dataloader()))["pixel_values"].equal(
            next(iter(changed.test_dataloader()))["pixel_values"]
        )
        loader = changed.train_dataloader()
        first, second = next(iter(loader)), next(iter(loader))
        original = next(iter(plain.train_dataloader()))
        assert first["labels"].equal(original["labels"])
        assert not first["pixel_values"].equal(original["pixel_values"])
        order = [batch["labels"].argsort(stable=True) for batch in (first, second)]
        assert not first["pixel_values"][order[0]].equal(second["pixel_values"][order[1]])

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (None, "holds no preprocessor_config.json that can be read"),
            ("{", "holds no preprocessor_config.json that can be read"),
            ("[]", "holds no preprocessor_config.json that can be read"),
            ('{"size": 32}', "does not say image_mean, image_std and size .* (KeyError: 'image_mean')"),
            ('{"image_mean": [0], "image_std": [1], "size": 32}', "three means, three positive deviations"),
            ('{"do_normalize": false, "size": {"longest": 3}}', "does not say image_mean, image_std and size"),
        ],
    )
    def test_what_is_no_image_processor(self, tmp_path, content, message):
        if content is not None:
            (tmp_path / "preprocessor_config.json").write_text(content)
        with pytest.raises(ValueError, match=message.replace("(K", r"\(K").replace("n')", r"n'\)")):
            CIFAR10RGB(processor=str(tmp_path))

    def test_without_one(self):
        with pytest.raises(ValueError, match=r"needs the image processor of a model; set model\.pretrained or"):
            CIFAR10RGB()
        with pytest.raises(ConnectionError, match=r"'nowhere' is no folder, and the hub gives no preprocessor_config"):
            CIFAR10RGB(processor="nowhere")
