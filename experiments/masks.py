"""Which blocks are worth keeping: rules for the choice, judged by the accuracy at the end of training.

    python -m experiments.masks --data FOLDER     # with cifar10/, ag_news/ and yelp_reviews/ in it
    python -m experiments.masks --tasks digits    # embedded in scikit-learn, nothing to download
    python -m experiments.masks --table           # what has been measured so far

Small models, sequences of 256 tokens, blocks of 8; 500 steps on pictures and 1,000 on texts, which take longer to
learn. A task and seed is trained densely for a tenth of the steps, once; each rule then chooses its layouts from the
same observations and goes on from the same weights, with the same batches.
Beside the accuracy stands the share of the attention that the layouts hold of the most possible, on validation data.
Each run is kept in the results as it ends; the command given again goes on with those that are missing. Takes the GPU
if there is one. Writes experiments/results/masks.json.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from experiments import record
from sat import data as datasets
from sat import ops
from sat.attention import AdaptiveAttention
from sat.layout import BlockLayout
from sat.models import SequenceClassifier
from sat.sparsity import best_mass, captured_mass, offset_scores, revise_blocks, select_blocks
from sat.sparsity.selection import agreement

LENGTH, BLOCK, HEADS, LAYERS, WIDTH = 256, 8, 2, 2, 64
SIDE = LENGTH // BLOCK
BATCH, RATE = 32, 2e-3
INTERVAL = 5  # steps between observations, of a whole batch
DECAY = 0.9  # weight of the past at each observation

# Data module, its folder, its options, steps.
TASKS: dict[str, tuple[str, str | None, dict[str, Any], int]] = {
    "cifar10": ("CIFAR10", "cifar10", {"image_size": 16}, 500),
    "digits": ("Digits", None, {"image_size": 16}, 500),
    "ag_news": ("AGNews", "ag_news", {"seq_len": LENGTH}, 1000),
    "yelp": ("YelpPolarity", "yelp_reviews", {"seq_len": LENGTH}, 1000),
}


@dataclass(frozen=True)
class Rule:
    """How layouts are chosen at the switch, and changed after it.

    Attributes:
        scores: what is observed of each block: ``mass`` of attention, ``relation`` (mass over what its row and column
            would have if attention were a product of the two), ``sensitivity`` (see sat.ops.block_sensitivity),
            ``signed`` derivative of the loss by a bias on the block (first where more attention would lessen the loss),
            ``absolute`` derivative of the loss by a bias on the block, ``energy`` of the deviation from uniform
            attention, ``largest`` weight in the block; ``gram``: the paper's mask; or ``none``: by chance.
        exponent: of the relation, from 0 (mass) to 1; None: for each head the one whose blocks hold most sensitivity.
        window: the blocks nearest to the diagonal, the scores decide among equals.
        per_head: a layout for each head.
        shared: one budget for all layers and heads: blocks of the highest scores.
        coverage: one budget for all layers and heads: each layout holds the same share of its scores.
        diagonal: the diagonal is kept.
        offsets: blocks are chosen by their offset from the diagonal, and heads look back and ahead by turns.
        rows: least number of blocks in a row.
        balanced: as many blocks in each column as in each row, as far as possible.
        revise: every so many steps, the weakest blocks are swapped for missing ones by their sensitivity.
        gates: a gate for each block, trained with the task's loss by a straight-through estimate.
    """

    scores: str = "sensitivity"
    exponent: float | None = 0.0
    window: bool = False
    per_head: bool = True
    shared: bool = False
    coverage: bool = False
    diagonal: bool = True
    offsets: bool = False
    rows: int = 1
    balanced: bool = False
    revise: int | None = None
    gates: bool = False


RULES: dict[str, Rule | None] = {
    "dense": None,
    "window": Rule("none", window=True),
    "random": Rule("none"),
    "gram (paper)": Rule("gram", per_head=False, diagonal=False, rows=0),
    "mass, one layout a layer": Rule("mass", per_head=False),
    "mass": Rule("mass"),
    "mass, coverage": Rule("mass", coverage=True),
    "mass, by offset": Rule("mass", offsets=True),
    "mass, balanced": Rule("mass", balanced=True),
    "relation .5": Rule("relation", 0.5),
    "relation 1": Rule("relation", 1.0),
    "relation, by head": Rule("relation", None),
    "largest weight": Rule("largest"),
    "energy": Rule("energy"),
    "absolute gradient": Rule("absolute"),
    "signed gradient": Rule("signed"),
    "sensitivity": Rule(),
    "sensitivity, shared budget": Rule(shared=True),
    "sensitivity, by offset": Rule(offsets=True),
    "sensitivity, revised": Rule(revise=50),
    "gates": Rule("none", window=True, gates=True),
}


class Studied(AdaptiveAttention):
    """Attention that also says everything about its blocks that a rule might go by."""

    def __init__(self) -> None:
        super().__init__(HEADS, LENGTH, BLOCK)
        self.studied = False
        self.seen: dict[str, Tensor] = {}  # of the latest observation

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        """As AdaptiveAttention; with the scores in full where it is studied."""
        if not self.studied:
            return super().forward(query, key, value, **options)
        padding, real = options.get("key_padding_mask"), options.get("query_padding_mask")
        scores = query @ key.transpose(2, 3) / math.sqrt(query.shape[3])
        if padding is not None:
            scores = scores.masked_fill(~padding[:, None, None], -math.inf)
        kept = self.layout_mask.repeat_interleave(BLOCK, 1).repeat_interleave(BLOCK, 2)
        norm = scores.masked_fill(~kept, -math.inf).logsumexp(3, keepdim=True)
        nothing = norm == -math.inf
        weights = (scores - norm.masked_fill(nothing, 0)).clamp(max=20).exp().masked_fill(nothing, 0)
        context = (weights * kept) @ value
        # Of the context only its values: a hook that held the context itself would hold its own owner, and with it the
        # graph of every observed step.
        seen, values = weights.detach(), context.detach()
        context.register_hook(lambda grad: self._study(query, key, value, grad, seen, values, padding, real))
        return context

    @torch.no_grad()
    def _study(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        grad: Tensor,
        weights: Tensor,
        context: Tensor,
        padding: Tensor | None,
        real: Tensor | None,
    ) -> None:
        samples = len(grad)
        grad = grad * samples  # of each sample's own loss
        slope = weights * (grad @ value.transpose(2, 3) - (grad * context).sum(3, keepdim=True))
        by_block = slope.unflatten(3, (SIDE, BLOCK)).unflatten(2, (SIDE, BLOCK)).sum((3, 5))
        if real is not None:
            weights = weights * real[:, None, :, None]
        blocks = weights.unflatten(3, (SIDE, BLOCK)).unflatten(2, (SIDE, BLOCK))
        layout = self.layout
        self.seen = {
            "mass": blocks.sum((3, 5)).mean(0) / LENGTH,
            "largest": blocks.amax((3, 5)).mean(0),
            "energy": (blocks - 1 / LENGTH).square().sum((3, 5)).mean(0),
            "signed": by_block.mean(0),
            "absolute": by_block.abs().mean(0),
            "sensitivity": ops.block_sensitivity(
                query, key, value, grad, BLOCK, layout=layout, key_padding_mask=padding
            ),
        }


class Observations:
    """Running means of what was seen, of all layers: ``[layers, H, M, N]`` by name."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.weight = 0.0

    def take(self, attentions: list[Studied]) -> None:
        """The latest observation of each layer; each kind as shares of its sum over the layers."""
        for name in attentions[0].seen:
            seen = torch.stack([a.seen[name] for a in attentions]).double().cpu()
            seen /= seen.abs().sum()
            self.sums[name] = DECAY * self.sums.get(name, torch.zeros_like(seen)) + seen
        self.weight = DECAY * self.weight + 1

    def mean(self, name: str) -> Tensor:
        """By name."""
        return self.sums[name] / self.weight


def choose(rule: Rule, seen: Observations, density: float, generator: torch.Generator) -> Tensor:
    """Blocks to keep at the switch, bool ``[layers, H, M, N]``."""
    shape = (LAYERS, HEADS, SIDE, SIDE)
    if rule.scores == "gram":
        scores = _gram(seen.mean("mass"), generator)
    elif rule.scores == "none":
        scores = torch.rand(shape, generator=generator, dtype=torch.float64)
    elif rule.scores == "relation":
        mass = seen.mean("mass")
        product = (mass.sum(3, keepdim=True) * mass.sum(2, keepdim=True)).clamp(min=1e-12)
        if rule.exponent is None:
            scores = _best_relation(mass, product, seen.mean("sensitivity"), density)
        else:
            scores = mass / product**rule.exponent
    elif rule.scores == "signed":
        # From 0 on: what is masked has a derivative of 0, like that which changes nothing.
        scores = seen.mean("signed").neg()
        scores -= scores.min()
    else:
        scores = seen.mean(rule.scores).abs()
    if not rule.per_head:
        scores = scores.sum(1, keepdim=True).expand(shape)
    if rule.balanced:
        for _ in range(20):  # Sinkhorn: rows and columns of one sum
            scores = scores / scores.sum(3, keepdim=True)
            scores = scores / scores.sum(2, keepdim=True)
    if rule.offsets:
        # Of one layout a layer, all heads look both ways.
        by_layout = scores.flatten(0, 1) if rule.per_head else scores[:, 0]
        found = offset_scores(by_layout, num_heads=HEADS if rule.per_head else 1)
        scores = found.view(LAYERS, -1, SIDE, SIDE).expand(shape)
    if rule.window:
        away = (torch.arange(SIDE)[:, None] - torch.arange(SIDE)).abs().double()
        scores = 2 * SIDE - away + scores / (2 * scores.max())
    options: dict[str, Any] = {"keep_diagonal": rule.diagonal, "min_blocks_per_row": rule.rows}
    if rule.coverage:
        return _covered(scores.flatten(0, 1), density, options).view(shape)
    return select_blocks(scores.flatten(0, 1), density=density, share_budget=rule.shared, **options).view(shape)


def _best_relation(mass: Tensor, product: Tensor, worth: Tensor, density: float) -> Tensor:
    """Relations ``[layers, H, M, N]``, each head's with the exponent whose blocks are worth most together."""
    tried = torch.stack([mass / product**exponent for exponent in (0.0, 0.25, 0.5, 0.75, 1.0)])
    kept = select_blocks(tried.flatten(0, 2), density=density, keep_diagonal=True).view(tried.shape)
    best = (kept * worth).sum((3, 4)).argmax(0)
    return tried.gather(0, best[None, :, :, None, None].expand(1, *mass.shape))[0]


def _covered(scores: Tensor, density: float, options: dict[str, Any]) -> Tensor:
    """The same share of the scores in each layout: the largest with which all together stay within the density."""
    share, low, high = scores / scores.sum((1, 2), keepdim=True), 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        fits = select_blocks(scores, coverage=middle, mass=share, **options).double().mean() <= density
        low, high = (middle, high) if fits else (low, middle)
    return select_blocks(scores, coverage=low, mass=share, **options)


def _gram(mass: Tensor, generator: torch.Generator) -> Tensor:
    """The paper's mask, fitted to what the heads attend to on average."""
    weight = torch.rand(LAYERS, SIDE, WIDTH // HEADS, generator=generator, dtype=torch.float64)
    weight = (weight * 2 / (WIDTH // HEADS) ** 0.5).requires_grad_()
    target = mass.mean(1)
    target = target / target.mean()
    optimizer = torch.optim.Adam([weight], lr=0.05)
    for _ in range(100):
        optimizer.zero_grad()
        (weight @ weight.mT - target).square().sum().backward()
        optimizer.step()
    return (weight @ weight.mT).detach()[:, None].expand(LAYERS, HEADS, SIDE, SIDE)


class Training:
    """A model with its optimizer, at some step; its copies go on from there."""

    def __init__(self, data: Any, seed: int, steps: int, device: torch.device) -> None:
        torch.manual_seed(seed)
        self.data, self.steps, self.device, self.step = data, steps, device, 0
        self.model = SequenceClassifier(
            data.vocab_size, LENGTH, data.num_classes, num_layers=LAYERS, width=WIDTH, num_heads=HEADS,
            mlp_dim=2 * WIDTH, dropout=0.0, block_size=BLOCK,
        )  # fmt: skip
        for layer in self.model.encoder.layers:
            assert isinstance(layer, nn.Module)
            layer.attention = Studied()
        self.model.to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=RATE, weight_decay=0.0, eps=1e-6)
        self.seen = Observations()

    @property
    def attentions(self) -> list[Studied]:
        """In the order of the layers."""
        return [module for module in self.model.modules() if isinstance(module, Studied)]

    def batches(self) -> Iterator[dict[str, Tensor]]:
        """Those that come after the present step; the same for every copy."""
        loader = self.data.train_dataloader()
        loader.batches.epoch, loader.batches.start = divmod(self.step, len(loader))
        while True:
            for batch in loader:
                yield {name: x.to(self.device, non_blocking=True) for name, x in batch.items()}

    def run(self, until: int, observe: bool) -> Iterator[int]:
        """Train; yields after each observed step, of all that were done."""
        for batch in self.batches():
            if self.step == until:
                return
            rate = RATE * min((self.step + 1) / (self.steps / 10), (self.steps - self.step) / (0.9 * self.steps))
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            studied = observe and (self.step + 1) % INTERVAL == 0
            for attention in self.attentions:
                attention.studied = studied
            labels = batch.pop("labels")
            loss = F.cross_entropy(self.model(**batch), labels)
            self.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_value_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.step += 1
            if not math.isfinite(loss.item()):
                raise FloatingPointError(f"the loss is {loss.item()} at step {self.step}")
            if studied:
                self.seen.take(self.attentions)
                yield self.step

    def set_layouts(self, kept: Tensor) -> None:
        """``[layers, H, M, N]``."""
        for attention, mask in zip(self.attentions, kept, strict=True):
            attention.set_layout(BlockLayout(mask, BLOCK))

    @torch.no_grad()
    def accuracy(self) -> float:
        """On validation and test samples, of which nothing here makes a difference: some data have few of them."""
        right = total = 0
        for attention in self.attentions:
            attention.studied = False
        for batch in itertools.chain(self.data.val_dataloader(), self.data.test_dataloader()):
            batch = {name: x.to(self.device) for name, x in batch.items()}
            labels = batch.pop("labels")
            right += int((self.model(**batch).argmax(1) == labels).sum())
            total += len(labels)
        return right / total

    @torch.no_grad()
    def unseen_mass(self) -> Tensor:
        """Dense attention's mass in each block on validation data, ``[layers, H, M, N]``."""
        loader = iter(self.data.val_dataloader())
        batch = {name: x.to(self.device) for name, x in next(loader).items()}
        batch.pop("labels")
        for attention in self.attentions:
            attention.studied, attention.observe_samples = False, 10**6
        self.model(**batch)
        found = []
        for attention in self.attentions:
            assert attention.statistics is not None
            found.append(attention.statistics.pooled.cpu())
            attention.observe_samples, attention.statistics = 0, None
        return torch.stack(found)


def held(pooled: Tensor, kept: Tensor) -> tuple[float, float]:
    """Share of the attention that layouts hold, and the most that as many blocks could, mean over layers and heads."""
    sizes = BLOCK, LENGTH, LENGTH
    pairs = [(p[None], k[None]) for ps, ks in zip(pooled, kept, strict=True) for p, k in zip(ps, ks, strict=True)]
    return (
        statistics.mean(captured_mass(p, k, *sizes) for p, k in pairs),
        statistics.mean(best_mass(p, k, *sizes) for p, k in pairs),
    )


def finish(trained: Training, rule: Rule | None, density: float, seed: int, pooled: Tensor) -> dict[str, Any]:
    """Go on by a rule to the last step."""
    start = time.perf_counter()
    run = Training(trained.data, seed, trained.steps, trained.device)
    run.model.load_state_dict(trained.model.state_dict())
    run.optimizer.load_state_dict(copy.deepcopy(trained.optimizer.state_dict()))
    run.step, run.seen = trained.step, copy.deepcopy(trained.seen)
    found: dict[str, Any] = {"density": 1.0}
    if rule is not None:
        generator = torch.Generator().manual_seed(seed)
        kept = choose(rule, run.seen, density, generator)
        captured, best = held(pooled, kept)
        found = {"density": kept.float().mean().item(), "captured_mass": captured, "best_mass": best, "swapped": []}
        run.set_layouts(kept)
        logits = torch.zeros(kept.shape, dtype=torch.float64)
        logits[kept] = 1.0
        logits.requires_grad_()
        gates = torch.optim.Adam([logits], lr=0.02)
        quiet = 0.75 * run.steps  # the last quarter is trained on layouts that stay
        for step in run.run(run.steps, observe=rule.revise is not None or rule.gates):
            if step > quiet:
                continue
            if rule.gates:
                signed = torch.stack([a.seen["signed"] for a in run.attentions]).double().cpu()
                logits.grad = signed
                gates.step()
            if step % (rule.revise or 50):
                continue
            before = kept
            if rule.gates:
                scores = logits.detach().flatten(0, 1)
                kept = select_blocks(scores, density=density, keep_diagonal=rule.diagonal).view(kept.shape)
            else:
                scores, old = run.seen.mean("sensitivity").flatten(0, 1), kept.flatten(0, 1)
                kept = revise_blocks(
                    old, scores, share=0.3, keep_diagonal=rule.diagonal, min_blocks_per_row=rule.rows
                ).view(kept.shape)
            found["swapped"].append(round(((kept & ~before).sum() / before.sum()).item(), 4))
            run.set_layouts(kept)
    else:
        for _ in run.run(run.steps, observe=False):
            pass
    return {"accuracy": run.accuracy(), **found, "seconds": round(time.perf_counter() - start, 1)}


def work(task: str, seed: int, rules: list[str], steps: int, density: float, folder: Path | None) -> None:
    """All rules of a task and seed; prints a line of JSON as each ends."""
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name, where, small, _ = TASKS[task]
    if where is not None and folder is not None:
        small = {**small, "path": str(folder / where)}
    data = getattr(datasets, name)(batch_size=BATCH, eval_batch_size=200, eval_samples=2000, seed=seed, **small)
    data.prepare_data()
    data.setup("fit")
    trained = Training(data, seed, steps, device)
    agreements: list[float] = []
    choices: list[Tensor] = []
    for _ in trained.run(steps // 10, observe=True):
        choices.append(choose(Rule(), trained.seen, density, torch.Generator().manual_seed(seed)))
        if len(choices) > 10:
            pair = (x.flatten(0, 1) for x in (choices[-1], choices[-11]))
            agreements.append(round(agreement(*pair, keep_diagonal=True), 3))
    pooled = trained.unseen_mass()
    for rule in rules:
        found = finish(trained, RULES[rule], density, seed, pooled)
        print(json.dumps({"task": task, "seed": seed, "rule": rule, **found, "agreements": agreements}), flush=True)


def show(runs: list[dict[str, Any]], console: Console) -> None:
    """Accuracy, mean over the seeds, and the share of attention held."""
    tasks = [task for task in TASKS if any(run["task"] == task for run in runs)]
    table = Table(title="accuracy at the end, mean over the seeds (how many); attention held of the most possible")
    table.add_column("rule")
    for task in (*tasks, "mean", "held"):
        table.add_column(task, justify="right")
    for rule in RULES:
        own = [run for run in runs if run["rule"] == rule]
        if not own:
            continue
        cells, means = [], []
        for task in tasks:
            values = [run["accuracy"] for run in own if run["task"] == task]
            means += [statistics.mean(values)] if values else []
            cells.append(f"{means[-1]:.3f} ({len(values)})" if values else "")
        ratios = [run["captured_mass"] / run["best_mass"] for run in own if run.get("best_mass")]
        cells.append(f"{statistics.mean(means):.3f}" if len(means) == len(tasks) else "")
        table.add_row(rule, *cells, f"{statistics.mean(ratios):.0%}" if ratios else "")
    console.print(table)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with the data sets; from the hub when not given")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--rules", nargs="+", choices=list(RULES), default=list(RULES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--steps", type=int, help="optimizer steps of 32 samples (default: 500 on pictures, 1000 on texts)"
    )
    parser.add_argument("--density", type=float, default=0.1, help="share of the blocks (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="processes of one thread beside each other")
    parser.add_argument("--minutes", type=float, help="stop after this time; what is done is kept")
    parser.add_argument("--out", type=Path, default=record.RESULTS, help="folder of the results")
    parser.add_argument("--table", action="store_true", help="only show what has been measured")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        work(args.worker[0], int(args.worker[1]), args.rules, args.steps, args.density, args.data)
        return
    if args.steps is not None and args.steps < 100:
        parser.error(f"--steps must be at least 100, of which a tenth is dense, got {args.steps}")
    if not 1 / SIDE <= args.density <= 1:
        parser.error(f"--density must be 1/{SIDE} (the diagonal) to 1, got {args.density}")
    out = args.out / "masks.json"
    try:
        with nullcontext() if args.table else record.alone(out):
            study(args, out)
    except (BlockingIOError, ValueError) as error:
        parser.error(str(error))


def study(args: argparse.Namespace, out: Path) -> None:
    """Train what is missing, and show what there is."""
    settings = {task: {"steps": args.steps or TASKS[task][3], "density": args.density} for task in TASKS}
    runs = record.read_runs(out, {"task", "seed", "rule", "settings", "accuracy"})
    console, lock = Console(), threading.Lock()
    done = {(r["task"], r["seed"], r["rule"]) for r in runs if r["settings"] == settings.get(r["task"])}
    groups = {
        (task, seed): [rule for rule in args.rules if (task, seed, rule) not in done]
        for task in args.tasks
        for seed in args.seeds
    }
    total = sum(map(len, groups.values()))
    workers: list[subprocess.Popen[str]] = []

    def group(key: tuple[str, int], rules: list[str]) -> str:
        """The rules of a task and seed in a process of their own; what it said if it failed."""
        command = [sys.executable, "-m", "experiments.masks", "--worker", key[0], str(key[1])]
        command += ["--steps", str(settings[key[0]]["steps"]), "--density", str(args.density), "--rules", *rules]
        command += ["--data", str(args.data.resolve())] if args.data else []
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        ) as worker:
            workers.append(worker)
            assert worker.stdout is not None
            assert worker.stderr is not None
            for line in worker.stdout:
                with lock:
                    commit = record.environment()["commit"]
                    runs.append({**json.loads(line), "settings": settings[key[0]], "commit": commit})
                    shown = "python -m experiments.masks --data FOLDER"
                    shown += f" --jobs {args.jobs}" if args.jobs > 1 else ""
                    record.save("masks", shown, {"threads": 1, "runs": runs}, args.out)  # of each run
                    here, run = sum(r["settings"] == settings.get(r["task"]) for r in runs) - len(done), runs[-1]
                    console.print(
                        f"{here}/{total}: {key[0]}, seed {key[1]}, {run['rule']}: {run['accuracy']:.4f} "
                        f"({run['seconds']:.0f} s)", highlight=False,
                    )  # fmt: skip
            said = worker.stderr.read().strip()
        return f"{key[0]}, seed {key[1]}: {said.splitlines()[-1] if said else ''}" if worker.returncode else ""

    stopped = threading.Event()

    def stop() -> None:
        stopped.set()
        for worker in workers:
            worker.terminate()

    timer = threading.Timer(60 * (args.minutes or 1e6), stop)
    timer.daemon = True
    timer.start()
    try:
        with ThreadPoolExecutor(args.jobs) as threads:
            wanted = [] if args.table else [(key, rules) for key, rules in groups.items() if rules]
            found = list(threads.map(lambda pair: "" if stopped.is_set() else group(*pair), wanted))
        failed = [] if stopped.is_set() else [each for each in found if each]
    finally:
        timer.cancel()
        stop()
    chosen = [run for run in runs if run["settings"] == settings.get(run["task"])]
    if chosen:
        show(chosen, console)
    if failed:
        raise SystemExit("\n".join(failed))
    if not chosen:
        raise SystemExit(f"nothing has been measured with these settings yet; leave --table out ({out})")


if __name__ == "__main__":
    main()
