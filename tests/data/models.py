"""Small random models of transformers, saved as folders, and data for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

WORDS = ["cat", "dog", "sun", "moon", "red", "blue", "runs", "sleeps", "##s"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def write_tokenizer(folder: Path, words: list[str] = WORDS, **settings: Any) -> Path:
    """A WordPiece tokenizer of few words."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join([*SPECIAL, *words]) + "\n")
    config = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": 32, **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def write_bert(folder: Path, *, labels: int = 2, head: bool = False, **settings: Any) -> Path:
    """A BERT of 2 layers with its tokenizer; without a head, as pretraining leaves it, unless asked for."""
    from transformers import BertConfig, BertForSequenceClassification, BertModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(
        vocab_size=len(SPECIAL) + len(WORDS), max_position_embeddings=32, num_labels=labels, **{**sizes, **settings}
    )
    torch.manual_seed(1)
    (BertForSequenceClassification if head else BertModel)(config).save_pretrained(folder)
    return write_tokenizer(folder)


def write_vit(folder: Path, *, labels: int = 10, processor_size: int = 16, **settings: Any) -> Path:
    """A ViT of 2 layers for pictures of 16 x 16 pixels, 17 tokens, with its image processor."""
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(1)
    config = ViTConfig(**{"image_size": 16, "patch_size": 4, "num_labels": labels, **sizes, **settings})
    ViTForImageClassification(config).save_pretrained(folder)
    processor = {
        "do_normalize": True,
        "image_mean": [0.5, 0.4, 0.3],
        "image_std": [0.2, 0.25, 0.5],
        "size": {"height": processor_size, "width": processor_size},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def write_pairs(folder: Path, **sizes: int) -> Path:
    """Pairs of sentences as in MRPC; those with the same words are equivalent."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    for split, size in (sizes or {"train": 80, "validation": 30, "test": 40}).items():
        rows = []
        for _ in range(size):
            length = int(torch.randint(1, 9, (), generator=generator))
            first = [WORDS[i] for i in torch.randint(0, 8, (length,), generator=generator)]
            other = [WORDS[i] for i in torch.randint(0, 8, (length,), generator=generator)]
            label = int(torch.rand((), generator=generator) < 0.6)
            rows.append((" ".join(first), " ".join(first if label else other), label))
        first, second, labels = zip(*rows, strict=True)
        pq.write_table(
            pa.table({"sentence1": first, "sentence2": second, "label": labels}), folder / f"{split}.parquet"
        )
    return folder
