"""Floor 3, data: texts as the tokens of a pretrained model."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.utils.data import Dataset

from sat.data.base import check_at_least
from sat.data.files import FileDataModule, check_ragged
from sat.data.loading import Batch
from sat.data.sources import Table, checked_column, from_folder_or_hub

Padding = Literal["max_length", "longest"]

# A batch that is padded to its longest text has a multiple of so many tokens, or all: few lengths, few whole blocks.
MULTIPLE = 64


class Tokens(Dataset[Batch]):
    """Rows of a flat buffer of token ids; indexed by a list of positions, it gives a padded batch."""

    def __init__(
        self, tensors: dict[str, Tensor], rows: Tensor, seq_len: int, pad_id: int, to_longest: bool = False
    ) -> None:
        self.ids, self.offsets, self.labels = (tensors[name].numpy() for name in ("ids", "offsets", "labels"))
        self.types = tensors["types"].numpy() if "types" in tensors else None
        self.rows, self.seq_len, self.pad_id, self.to_longest = rows.numpy(), seq_len, pad_id, to_longest

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, positions: list[int]) -> Batch:
        """``input_ids`` int64 ``[B, L]``, ``attention_mask`` bool, perhaps ``token_type_ids`` int64; and labels."""
        rows = self.rows[positions]
        begin, end = self.offsets[rows], self.offsets[rows + 1]
        length = self.seq_len
        if self.to_longest:
            length = min(length, -(-int((end - begin).max()) // MULTIPLE) * MULTIPLE)
        mask = np.arange(length) < (end - begin)[:, None]
        chosen = np.concatenate([np.arange(first, last) for first, last in zip(begin, end, strict=True)])
        ids = np.full(mask.shape, self.pad_id, np.int64)
        ids[mask] = self.ids[chosen]
        batch = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
        if self.types is not None:
            types = np.zeros(mask.shape, np.int64)
            types[mask] = self.types[chosen]
            batch["token_type_ids"] = torch.from_numpy(types)
        return {**batch, "labels": torch.from_numpy(self.labels[rows])}


class TokenizedTextDataModule(FileDataModule):
    """Texts or pairs of texts, tokenized as a pretrained model expects it, cut and padded to ``seq_len``.

    With ``padding`` ``max_length`` every batch has the full length, in both phases and with every ``attention``, so
    that times can be compared; the sparse phase leaves out blocks that hold nothing but padding. ``longest`` leaves out
    more, everywhere in the model. The results are the same, up to the order of sums.

    Args:
        tokenizer: folder or hub name of the tokenizer; that of model.pretrained when not given.
        seq_len: tokens in a sequence, special tokens included: longer texts are cut, shorter ones padded.
        padding: how long a batch is: ``max_length``, as ``seq_len`` says, or ``longest``, as its longest text needs,
            rounded up to a multiple of 64.
        batch_size: samples in a training batch, per process. Incomplete training batches are left out.
        kwargs: as of :class:`~sat.data.files.FileDataModule`.

    Raises:
        ValueError: an argument is out of range, or there is no tokenizer that can be read.
        ConnectionError: the hub does not give the tokenizer.
        ImportError: transformers is missing.
    """

    inputs = "text"
    has_padding = True
    text_columns: tuple[str, ...]  # one, or two for pairs

    def __init__(
        self,
        *,
        tokenizer: str | None = None,
        seq_len: int = 128,
        padding: Padding = "max_length",
        batch_size: int = 32,
        **kwargs: Any,
    ) -> None:
        super().__init__(batch_size=batch_size, **kwargs)
        if tokenizer is None:
            raise ValueError(
                f"{self.dataset_name} needs the tokenizer of a model; set model.pretrained or --data.tokenizer to a "
                f"hub name or a folder"
            )
        self.tokenizer = load_tokenizer(tokenizer)
        self.vocab_size = len(self.tokenizer)
        special = self.tokenizer.num_special_tokens_to_add(pair=len(self.text_columns) == 2)
        check_at_least("seq_len", seq_len, special + len(self.text_columns))
        if padding not in get_args(Padding):
            raise ValueError(f"padding must be one of {', '.join(get_args(Padding))}, got {padding!r}")
        self.seq_len, self.padding = seq_len, padding
        if self.tokenizer.pad_token_id is None:
            raise ValueError(
                f"the tokenizer {tokenizer} has no token for padding; set its pad_token, save it to a folder and give "
                f"that as --data.tokenizer"
            )

    def save_processor(self, folder: Path) -> None:
        """Write the tokenizer, which from now on knows of sequences as long as these."""
        self.tokenizer.model_max_length = max(self.tokenizer.model_max_length, self.seq_len)
        self.tokenizer.save_pretrained(folder)

    def dataset(self, tensors: dict[str, Tensor], rows: Tensor) -> Tokens:
        """Some rows of a split, as a map from a list of positions to a batch."""
        return Tokens(tensors, rows, self.seq_len, self.tokenizer.pad_token_id, self.padding == "longest")

    def columns(self, table: Table) -> list[str]:
        """One column of texts, or two of pairs."""
        return [checked_column(table, [name]) for name in self.text_columns]

    def encoding(self) -> Sequence[int | str]:
        """The tokens of a text depend on where it is cut and on all that the tokenizer's files say."""
        return [self.seq_len, tokenizer_digest(self.tokenizer)]

    def check_tensors(self, tensors: dict[str, Tensor], rows: int) -> None:
        """Refuse anything but ids that the tokenizer has, their offsets, and perhaps as many types."""
        ids, types = tensors.get("ids"), tensors.get("types")
        check_ragged(tensors.get("offsets"), rows, ids, torch.int32, self.seq_len)
        assert ids is not None
        if ids.min() < 0 or ids.max() >= self.vocab_size:
            raise ValueError(f"it has ids that are none of the tokenizer's {self.vocab_size}")
        if types is not None and (types.dtype != torch.uint8 or types.shape != ids.shape):
            raise ValueError("it has types of other tokens")

    def encode(self, rows: Iterator[pa.Array], table: Table) -> dict[str, Tensor]:
        """All ids in one int32 buffer, int64 ``offsets [n + 1]`` of where each text begins, uint8 types if any."""
        ids: list[np.ndarray] = []
        types: list[np.ndarray] = []
        lengths: list[int] = []
        for column in rows:
            texts = column.flatten() if pa.types.is_struct(column.type) else [column]
            for each, name in zip(texts, self.text_columns, strict=True):
                if not (pa.types.is_string(each.type) or pa.types.is_large_string(each.type)):
                    raise ValueError(
                        f"the column {name} of {table.name} is of the type {each.type}; write its texts as strings"
                    )
                if each.null_count:
                    row = len(lengths) + each.is_null().to_pylist().index(True)
                    raise ValueError(f"row {row} of {table.name} has no {name}; leave such rows out")
            encoded = self.tokenizer(
                *(each.to_pylist() for each in texts),
                truncation=True,
                max_length=self.seq_len,
                return_attention_mask=False,
            )
            # A sample must have a token to attend to, also where the tokenizer adds none of its own.
            of_rows = [row or [self.tokenizer.pad_token_id] for row in encoded["input_ids"]]
            lengths += map(len, of_rows)
            ids += [np.array(row, np.int32) for row in of_rows]
            types += [np.array(row or [0], np.uint8) for row in encoded.get("token_type_ids", [])]
        offsets = torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0)
        tensors = {"ids": torch.from_numpy(np.concatenate(ids)), "offsets": offsets}
        if types:
            tensors["types"] = torch.from_numpy(np.concatenate(types))
        return tensors


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a folder or of a model on the hub; no code of theirs is run.

    Raises:
        ValueError: the folder holds no tokenizer that can be read.
        ConnectionError: there is no such folder, and the hub does not give it.
        ImportError: transformers is missing.
    """
    try:
        from transformers import AutoTokenizer  # here, since it takes seconds and is an extra
    except ImportError as error:
        raise ImportError(
            "tokenizers of pretrained models need transformers, which is not installed; install it with "
            "pip install 'transformers>=5.10'"
        ) from error
    tokenizer = from_folder_or_hub(
        name,
        lambda local: AutoTokenizer.from_pretrained(name, local_files_only=local, trust_remote_code=False),
        "tokenizer",
        "--data.tokenizer or --model.pretrained",
    )
    if set(tokenizer.get_vocab().values()) <= set(tokenizer.all_special_ids):
        # transformers makes an empty one where there is a model and no vocabulary.
        raise ValueError(
            f"{name} holds no vocabulary, so every word would be unknown; save the tokenizer there too "
            f"(tokenizer.save_pretrained), or give another as --data.tokenizer"
        )
    return tokenizer


# In the files of a tokenizer: where it comes from, and how it was called last.
NO_SETTINGS = {
    "tokenizer_config.json": ("is_local", "local_files_only", "name_or_path"),
    "tokenizer.json": ("truncation", "padding"),
}


def tokenizer_digest(tokenizer: Any) -> str:
    """A digest of all that a tokenizer saves of itself: equal for copies of it, wherever they come from."""
    digest = hashlib.sha256()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for file in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
            content = file.read_bytes()
            if file.name in NO_SETTINGS:
                settings = json.loads(content)
                for name in NO_SETTINGS[file.name]:
                    settings.pop(name, None)
                content = json.dumps(settings, sort_keys=True).encode()
            digest.update(f"{file.name} {len(content)} ".encode() + content)
    return digest.hexdigest()[:20]
