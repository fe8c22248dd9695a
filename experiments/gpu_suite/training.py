"""Training steps of the paper's models on random data: phases, compilation, other attention, and the statistics' cost.

A step is forward, backward, clipping and AdamW under bfloat16 autocast, in the sizes of ``configs/``. What a trainer
waits for is the wall time; the device's time says how much of it is computing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn

from experiments.gpu_suite import clock, huggingface, layouts
from experiments.gpu_suite.case import Case, Record, Section, Setting, number, sentence, text_table
from sat.attention import AdaptiveAttention
from sat.callback import AdaptiveSparsity
from sat.models import SequenceClassifier
from sat.module import ClassificationModule

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
BYTES = 256  # gray levels of a pixel; characters have about as many


class Task(NamedTuple):
    """What ``configs/`` does not say, because the data does."""

    name: str
    classes: int
    words: tuple[int, int] | None  # least and most real tokens of a text; None: no padding


TASKS = (Task("cifar10", 10, None), Task("ag_news", 4, (100, 500)))
SEQ_LEN = 1024
# Observe each step, and never switch.
NEVER = {"interval": 1, "min_dense_steps": 10**9, "max_dense_steps": None}


class Run:
    """One model, its optimizer and a step. All runs of a task start with the same weights and see the same batch."""

    def __init__(
        self, task: Task, config: dict[str, Any], seq_len: int, batch: dict[str, Tensor], setting: Setting
    ) -> None:
        torch.manual_seed(0)
        self.setting, self.config, self.batch = setting, config, batch
        model = SequenceClassifier(BYTES, seq_len, task.classes, **config["model"])
        self.module = ClassificationModule(model, task.classes, **config["optimizer"]).to(setting.device)
        self.model = model
        self.optimizer: torch.optim.Optimizer | None = None

    @property
    def attentions(self) -> list[AdaptiveAttention]:
        return [module for module in self.model.modules() if isinstance(module, AdaptiveAttention)]

    def step(self) -> None:
        if self.optimizer is None:  # after all changes to the model
            module = self.module
            self.optimizer = torch.optim.AdamW(
                module.parameters(), lr=module.lr, betas=module.betas, eps=module.eps, weight_decay=module.weight_decay
            )
        with torch.autocast(self.setting.device, dtype=torch.bfloat16):
            loss = F.cross_entropy(self.module(self.batch), self.batch["labels"])
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_value_(self.module.parameters(), 1.0)
        self.optimizer.step()

    def sparse(self) -> Run:
        """Go on sparsely, with a layout that all heads share, as in the paper."""
        for seed, attention in enumerate(self.attentions):
            attention.backend = self.setting.backend
            size = attention.block_size
            blocks, density = -(-attention.seq_len // size), self.config["sparsity"]["density"]
            attention.set_layout(layouts.learned_like(blocks, density, 1, size, self.setting.device, seed))
        return self

    def compiled(self) -> Run:
        """As ``python -m sat.train --compile true``."""
        if self.setting.smoke:
            self.model.compile(fullgraph=True, backend="eager")
        else:
            self.model.compile(fullgraph=True)
        return self

    def with_attention(self, make: Callable[[int, int, int], nn.Module]) -> Run:
        """Other attention in each layer; from width, heads and length."""
        layers: Any = self.model.encoder.layers
        for index, layer in enumerate(layers):
            heads, length = layer.attention.num_heads, layer.attention.seq_len
            attention = make(layer.attention_norm.normalized_shape[0], heads, length)
            layers[index] = huggingface.LayerWith(layer, attention)
        self.module.to(self.setting.device)
        return self

    def observe(self) -> Callable[[], None]:
        """A dense step with everything that an observation adds, by the config's rule."""
        sparsity = AdaptiveSparsity(**self.config["sparsity"] | NEVER)
        sparsity.find_attention(self.module)

        def step() -> None:
            sparsity.before_batch(len(self.batch["labels"]))
            self.step()
            sparsity.after_batch(ends_step=True)

        return step


def load(task: Task, setting: Setting) -> tuple[dict[str, Any], int, dict[str, Tensor]]:
    """A config, the length and a random batch."""
    config = yaml.safe_load((CONFIGS / f"{task.name}.yaml").read_text())
    batch, seq_len = (2, 256) if setting.smoke else (config["data"]["batch_size"], SEQ_LEN)
    if setting.smoke:
        config["model"] |= {"num_layers": 1}
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "input_ids": torch.randint(BYTES, (batch, seq_len), generator=generator),
        "labels": torch.randint(task.classes, (batch,), generator=generator),
    }
    if task.words is not None:
        lengths = torch.randint(task.words[0], min(task.words[1], seq_len), (batch, 1), generator=generator)
        tensors["attention_mask"] = torch.arange(seq_len) < lengths
    return config, seq_len, {name: x.to(setting.device) for name, x in tensors.items()}


def run(task: Task, compiled: bool, setting: Setting, seconds: float) -> Record:
    until = time.monotonic() + seconds
    config, seq_len, batch = load(task, setting)

    def make() -> Run:
        return Run(task, config, seq_len, batch, setting)

    steps: dict[str, Callable[[], None]] = {"dense": make().step, "sparse": make().sparse().step}
    missing: dict[str, str] = {}
    if compiled:
        torch.compiler.reset()
        steps |= {"dense, compiled": make().compiled().step, "sparse, compiled": make().sparse().compiled().step}
    else:
        steps["dense, observed"] = make().observe()
        try:
            steps["BigBird"] = make().with_attention(huggingface.BigBird).step
            steps["Longformer"] = make().with_attention(lambda w, h, _: huggingface.Longformer(w, h)).step
        except Exception as error:  # not installed, or another interface
            missing["Hugging Face"] = sentence(error)
    found, times = clock.figures(steps, setting.device, rounds=3 if setting.smoke else 7)
    for name in ("dense", "sparse"):
        if "error" in found[name]:
            raise RuntimeError(f"{name}: {found[name]['error']}")
    record: Record = {
        "batch": len(batch["labels"]),
        "density": config["sparsity"]["density"],
        "layers": config["model"]["num_layers"],
        "real_tokens": round(batch["attention_mask"].float().mean().item(), 3) if task.words else 1.0,
        "times": found,
        "missing": missing,
        "sparse_faster_than": {
            name: clock.faster(times, name, "sparse", wall=True) for name in found if not name.startswith("sparse")
        },
        "seconds_to_spare": round(until - time.monotonic(), 1),
    }
    if compiled:
        faster = clock.faster(times, "dense, compiled", "sparse, compiled", wall=True)
        record["compiled_sparse_faster_than_compiled_dense"] = faster
    else:
        interval = config["sparsity"]["interval"]
        extra = clock.faster(times, "dense, observed", "dense", wall=True)
        record["statistics_interval"] = interval
        record["statistics_share_of_dense_phase"] = None if extra is None else round((extra - 1) / interval, 4)
    line = ", ".join(f"{name} {number(f['wall_ms']['median'])} ms" for name, f in found.items() if "wall_ms" in f)
    return {**record, "line": line}


def cases(setting: Setting) -> list[Case]:
    found = []
    for compiled in (False, True):
        for task in TASKS[1:] if setting.smoke and compiled else TASKS:
            name = f"{task.name}, compiled" if compiled else task.name
            seconds = 1.0 if setting.smoke else 45.0 if compiled else 20.0
            found.append(Case(name, partial(run, task, compiled, setting), seconds, longest=150))
    return found


def table(records: list[Record]) -> str:
    rows: list[list[object]] = []
    notes = []
    for r in records:
        for name, figures in r["times"].items():
            if "error" in figures:
                rows.append([r["case"], name, "-", "-", "-", "-"])
                notes.append(f"{r['case']}, {name}: {figures['error']}"[:200])
                continue
            faster = r["sparse_faster_than"].get(name)
            cells = [number(figures[kind]["median"]) for kind in ("wall_ms", "ms")]
            rows.append([r["case"], name, *cells, number(figures["peak_mib"], 4), number(faster)])
        notes += [f"{r['case']}: {name}: {text}"[:200] for name, text in r["missing"].items()]
        if r.get("statistics_share_of_dense_phase") is not None:
            share = r["statistics_share_of_dense_phase"]
            notes.append(f"{r['case']}: statistics every {r['statistics_interval']} steps add {share:.1%}")
    header = ["model", "", "wall ms", "device ms", "peak MiB", "sparse faster"]
    return "\n".join([text_table("training: a step, bfloat16 autocast", header, rows), *notes])


SECTION = Section("training", 0.2, cases, table)
