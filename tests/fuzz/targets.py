"""What reads the files of strangers: for each kind a valid file, and a reader that goes as far as a user would."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import json
import logging
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from transformers import BertConfig, BertModel

from sat import checkpoints, cli, runs, train
from sat.data import CIFAR10, YelpPolarity
from sat.integrations import transformers as integration
from sat.layout import BlockLayout
from sat.models import SequenceClassifier
from sat.module import ClassificationModule
from tests.fuzz import mutations

CONFIG = """
data: {name: digits, image_size: 8, batch_size: 16, train_samples: 64, eval_samples: 20}
model: {num_layers: 1, width: 16, num_heads: 2, mlp_dim: 16, dropout: 0.1, block_size: 8}
optimizer: {lr: 3.0e-3, warmup_steps: 3}
sparsity: {density: 0.3, theta: -100.0, delta: 1000000.0, interval: 2, samples: 4}
trainer: {max_steps: 12, accelerator: cpu, val_check_interval: 4, num_sanity_val_steps: 0}
"""


class Kind:
    """One kind of file. ``seeds`` are valid ones; ``read`` raises what a reader raises, and a sentence is expected."""

    suffix = ""
    seeds: list[bytes]
    strangers: list[bytes]  # files of the other kinds, and pickles

    def mutate(self, data: bytes, rng: Random) -> bytes:
        raise NotImplementedError

    def read(self, path: Path) -> None:
        raise NotImplementedError

    def make(self, rng: Random) -> bytes:
        """An input: the same for the same state of ``rng``."""
        data = rng.choice(self.seeds)
        return mutations.of_any_file(data, rng, self.strangers) if rng.random() < 0.35 else self.mutate(data, rng)


class Layout(Kind):
    suffix = ".safetensors"

    def __init__(self, folder: Path) -> None:
        generator = torch.Generator().manual_seed(0)
        # The last is large enough to tell the memory of its content from that of its surroundings.
        for number, shape in enumerate([(1, 3, 3), (2, 5, 4), (4, 1024, 1024)]):
            layout = BlockLayout(torch.rand(shape, generator=generator) < 0.3, 16)
            layout.save(folder / f"{number}.safetensors")
        self.seeds = [(folder / f"{number}.safetensors").read_bytes() for number in (0, 1, 0, 1, 0, 1, 0, 1, 0, 2)]

    def mutate(self, data: bytes, rng: Random) -> bytes:
        return mutations.safetensors(data, rng)

    def read(self, path: Path) -> None:
        layout = BlockLayout.load(path)
        if layout.num_heads * layout.shape[0] * layout.shape[1] > 10_000:
            return
        assert layout.nnz == len(layout.col_indices) == len(layout.row_indices) == int(layout.crow_indices[-1, -1])
        assert layout.nnz == int(layout.ccol_indices[-1, -1])
        assert layout.nnz == int(layout.mask.sum())
        repr(layout)


class Transformers(Kind):
    suffix = "/sat_layouts.safetensors"

    def __init__(self, folder: Path) -> None:
        config = BertConfig(
            vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
            max_position_embeddings=64, attn_implementation="sat",
        )  # fmt: skip
        self.model = BertModel(config).eval()
        model = copy.deepcopy(self.model)
        states = integration.prepare(model, 64, 16)
        for state in states.values():
            state.set_layout(BlockLayout(torch.eye(4, dtype=torch.bool).repeat(2, 1, 1), 16))
        integration.save_layouts(model, folder)
        self.seeds = [(folder / "sat_layouts.safetensors").read_bytes()]
        self.prepared = model
        self.ids = torch.arange(40).view(1, 40)

    def mutate(self, data: bytes, rng: Random) -> bytes:
        return mutations.safetensors(data, rng)

    def read(self, path: Path) -> None:
        with contextlib.suppress(ValueError):
            integration.load_layouts(self.prepared, path.parent)
        model = copy.deepcopy(self.model)
        integration.load_layouts(model, path.parent)
        with torch.no_grad():
            assert model(self.ids)[0].isfinite().all()


class Cache(Kind):
    """Never an error: what is not as it was written is made anew."""

    suffix = ".parquet"  # of the source, which is valid; beside it lies the cache

    def __init__(self, folder: Path) -> None:
        for name in ("sat.data", "sat.data.cache"):
            logging.getLogger(name).setLevel(logging.ERROR)
        rng = np.random.default_rng(0)
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (4, 4), dtype=np.uint8)).save(buffer, "PNG")
        pictures = pa.array(
            [{"bytes": buffer.getvalue(), "path": "../../secret.png"}] * 20,
            pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
        )
        labels = [0, 1] * 10
        self.modules: list[Callable[[], Any]] = []
        self.files, self.seeds = [], []
        for name, column, content, cls, options in (
            ("text", "text", ["good", "bad"] * 10, YelpPolarity, {"seq_len": 8}),
            ("img", "img", pictures, CIFAR10, {"image_size": 4}),
        ):
            home = folder / name
            home.mkdir()
            pq.write_table(pa.table({column: content, "label": labels}), home / "train.parquet")
            arguments = {"path": str(home), "cache_dir": str(home / "cache"), "batch_size": 4, **options}
            self.modules.append(lambda cls=cls, arguments=arguments: cls(**arguments))
            self.modules[-1]().prepare_data()
            (file,) = (home / "cache").iterdir()
            self.files.append(file)
            self.seeds.append(file.read_bytes())

    def mutate(self, data: bytes, rng: Random) -> bytes:
        return mutations.safetensors(data, rng, self._with_checksums)

    @staticmethod
    def _with_checksums(header: dict[str, Any], content: bytes) -> None:
        sums = {}
        for name, entry in header.items():
            if name != "__metadata__":
                with contextlib.suppress(TypeError, ValueError, KeyError, OverflowError, MemoryError):
                    first, last = entry["data_offsets"]
                    sums[name] = zlib.crc32(content[first:last])
        if isinstance(header.get("__metadata__"), dict):
            header["__metadata__"]["checksums"] = json.dumps(sums)

    def read(self, path: Path) -> None:
        data = path.read_bytes()
        for make, file in zip(self.modules, self.files, strict=True):
            shutil.copyfile(path, file)
            module = make()
            module.setup()
            for loader in (module.train_dataloader(), module.test_dataloader()):
                for batch in loader:
                    assert 0 <= int(batch["input_ids"].min()) <= int(batch["input_ids"].max()) < module.vocab_size
                    assert 0 <= int(batch["labels"].min()) <= int(batch["labels"].max()) < module.num_classes
            assert list(file.parent.iterdir()) == [file]
        assert path.read_bytes() == data


class Checkpoint(Kind):
    """As far as ``--ckpt_path`` looks before it makes a folder."""

    suffix = ".ckpt"

    def __init__(self, folder: Path) -> None:
        config = folder / "config.yaml"
        config.write_text(CONFIG)
        self.arguments = ["--config", str(config), "--output_dir", str(folder / "runs")]
        with silence():
            train.main(self.arguments)
            train.main([*self.arguments, "--name", "dense", "--sparsity.min_dense_steps", "100"])
        found = sorted(folder.glob("runs/*/*/checkpoints/last.ckpt"))
        self.seeds = [path.read_bytes() for path in found]
        self.model = SequenceClassifier(17, 64, 10, num_layers=1, width=16, num_heads=2, mlp_dim=16, block_size=8)
        self.module = ClassificationModule(self.model, 10)

    def mutate(self, data: bytes, rng: Random) -> bytes:
        return mutations.checkpoint(data, rng)

    def read(self, path: Path) -> None:
        checkpoints.check_checkpoint(path, self.module, self.model)


class Resume(Checkpoint):
    """The whole command: it ends well, or with a sentence."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        # Runs that have steps to go.
        content = torch.load(io.BytesIO(self.seeds[0]), weights_only=True)
        assert content["global_step"] == 12
        self.seeds = []
        for at in (3, 5, 9):
            name = f"at{at}"
            with silence(), contextlib.suppress(SystemExit):
                self.interrupted(at, name)
            (found,) = folder.glob(f"runs/{name}/*/checkpoints/last.ckpt")
            self.seeds.append(found.read_bytes())
        self.folder = folder

    def interrupted(self, at: int, name: str) -> None:
        original = train.SaveLast.on_train_batch_start

        def pressed(save: Any, trainer: Any, *args: Any) -> None:
            save.interrupted = save.interrupted or trainer.global_step == at
            original(save, trainer, *args)

        train.SaveLast.on_train_batch_start = pressed  # type: ignore[method-assign]
        try:
            train.main([*self.arguments, "--name", name])
        finally:
            train.SaveLast.on_train_batch_start = original  # type: ignore[method-assign]

    def mutate(self, data: bytes, rng: Random) -> bytes:
        content = mutations.objects(torch.load(io.BytesIO(data), weights_only=True), rng)
        buffer = io.BytesIO()
        torch.save(content, buffer)
        return buffer.getvalue()

    def make(self, rng: Random) -> bytes:
        return self.mutate(rng.choice(self.seeds), rng)

    def read(self, path: Path) -> None:
        output, code = self.folder / "resumed", 0
        with silence() as said:
            try:
                train.main([*self.arguments, "--output_dir", str(output), "--ckpt_path", str(path)])
            except SystemExit as end:
                code = end.code  # type: ignore[assignment]
            finally:
                shutil.rmtree(output, ignore_errors=True)
        if code:
            last = said.getvalue().strip().rpartition("\n")[2]
            assert code in (1, 2), f"exit status {code}"
            assert last.startswith("sat.train: "), f"no sentence: {last}"
            assert "Traceback" not in said.getvalue(), "a traceback"


class Config(Kind):
    suffix = ".yaml"

    def __init__(self, folder: Path) -> None:
        shipped = [path.read_bytes() for path in sorted(runs.shipped_configs().glob("*.yaml"))]
        self.seeds = [CONFIG.encode(), *shipped]
        cli.build_parser = functools.cache(cli.build_parser)  # type: ignore[assignment]  most of the time goes there

    def mutate(self, data: bytes, rng: Random) -> bytes:
        return mutations.config(data, rng)

    def read(self, path: Path) -> None:
        cli.parse(["--config", str(path)])


@contextlib.contextmanager
def silence() -> Any:
    """Nothing on the terminal; what would have been there."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        yield said


KINDS: dict[str, type[Kind]] = {
    "layout": Layout,
    "transformers": Transformers,
    "cache": Cache,
    "config": Config,
    "checkpoint": Checkpoint,
    "resume": Resume,
}


def target(kind: str, folder: Path) -> Kind:
    """The kind, with its valid files made in the folder."""
    home = folder / kind
    home.mkdir(parents=True)
    found = KINDS[kind](home)
    bert = b'{"architectures": ["BertModel"]}'
    found.strangers = [
        *mutations.pickles(),
        bert,
        CONFIG.encode(),
        b"PK\x03\x04" + bytes(40),
        *found.seeds,
    ]
    return found
