"""How much of a text's class the counts of its bytes tell: a floor for the small models on texts.

    python -m experiments.byte_counts --data FOLDER     # with ag_news/, yelp_reviews/ and imdb/ in it

A logistic regression on the share of each byte in a text, of the texts that experiments.accuracy and experiments.arena
train on at --scale small, cut to as many bytes. It knows nothing of their order: a model that is no better has not
learned any. Half a minute on one core. Writes byte_counts.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from experiments import record
from experiments.accuracy_settings import EVERY_TASK, flat
from sat.data import DATASETS
from sat.runs import read_config, shipped_configs

TEXTS = ("ag_news", "yelp", "text")


def shares(batches: Iterable[dict[str, Tensor]], vocab_size: int) -> tuple[Tensor, Tensor]:
    """How often each token occurs in each text, as a share of the length that texts are cut to, and the classes.

    Returns:
        Shares ``[N, V]`` and classes ``[N]``.
    """
    found, labels = [], []
    for batch in batches:
        ids, real = batch["input_ids"], batch["attention_mask"]
        counts = torch.zeros(len(ids), vocab_size).scatter_add_(1, ids, real.float())
        found.append(counts / ids.shape[1])
        labels.append(batch["labels"])
    return torch.cat(found), torch.cat(labels)


def measure(task: str, folder: Path) -> dict[str, Any]:
    """Accuracy on the training and on the test texts of a task, with how many these are."""
    setting = EVERY_TASK[task]
    name = flat(read_config(shipped_configs() / setting.config))["data.name"]
    own = {key.removeprefix("data."): value for key, value in setting.small.items() if key.startswith("data.")}
    make: Any = DATASETS[name]
    data = make(path=str(folder / str(setting.folder)), batch_size=32, **own)
    data.prepare_data()
    data.setup()
    x, y = shares(data.train_dataloader(), data.vocab_size)
    x_test, y_test = shares(data.test_dataloader(), data.vocab_size)
    model = LogisticRegression(C=100, max_iter=5000).fit(x.numpy(), y.numpy())
    return {
        "task": task,
        "bytes": data.seq_len,
        "train_samples": len(y),
        "train_accuracy": round(float(model.score(x.numpy(), y.numpy())), 4),
        "test_samples": len(y_test),
        "test_accuracy": round(float(model.score(x_test.numpy(), y_test.numpy())), 4),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with a folder for each task")
    parser.add_argument("--out", type=Path, default=record.RESULTS, help="folder (default: experiments/results)")
    args = parser.parse_args(argv)
    folders = [str(EVERY_TASK[task].folder) for task in TEXTS]
    if missing := [name for name in folders if not (args.data / name).is_dir()]:
        parser.error(f"--data {args.data} has no folder {', '.join(missing)}; docs/paper.md says what these hold")
    tasks = []
    for task in TEXTS:
        tasks.append(measure(task, args.data))
        print(f"{task}: {tasks[-1]['test_accuracy']:.3f} on {tasks[-1]['test_samples']:,} test texts", flush=True)
    command = "python -m experiments.byte_counts --data FOLDER"
    print(f"written to {record.save('byte_counts', command, {'tasks': tasks}, args.out, device='cpu')}")


if __name__ == "__main__":
    main()
