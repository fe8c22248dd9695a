"""The command: ``python -m experiments.results_page --help``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments import record
from experiments.results_page import accuracy, checks, speed
from experiments.results_page.page import Section, compose

PRETRAINED = "--pretrained MODEL --data FOLDER"
SECTIONS = (
    Section(
        "Accuracy, small models",
        "Methods and rules on small models: as many steps, seeds and kept blocks for all.",
        {"accuracy_small.json": "python -m experiments.accuracy --data FOLDER"},
        accuracy.accuracy,
    ),
    Section(
        "Accuracy, the paper's models",
        "The same at the sizes of Yoon et al. 2024.",
        {"accuracy_paper.json": "python -m experiments.accuracy --scale paper --data FOLDER"},
        accuracy.accuracy,
    ),
    Section(
        "Long Range Arena",
        "Dense attention, a window and SAT on the Arena's tasks, beside what was published.",
        {
            "arena_small.json": "python -m experiments.arena --data FOLDER --jobs 2",
            "arena_paper.json": "python -m experiments.arena --scale paper --data FOLDER",
        },
        accuracy.arena,
    ),
    Section(
        "Counts of bytes",
        "What a text's bytes tell of its class without their order.",
        {"byte_counts.json": "python -m experiments.byte_counts --data FOLDER"},
        checks.byte_counts,
    ),
    Section(
        "Masks",
        "Rules that choose the blocks to keep, all else equal.",
        {"masks.json": "python -m experiments.masks"},
        accuracy.masks,
    ),
    Section(
        "Which blocks to keep",
        "A pretrained ViT on CIFAR-10, made sparse by each rule and not trained any further.",
        {"block_choice.json": f"python -m experiments.block_choice {PRETRAINED}"},
        accuracy.block_choice,
    ),
    Section(
        "Fine-tuning",
        "A pretrained model, fine-tuned densely and with SAT, with the same steps.",
        {"fine_tuning_*.json": "python -m experiments.fine_tuning --config vit_cifar10.yaml"},
        accuracy.fine_tuning,
    ),
    Section(
        "Operations",
        "SDDMM, sparse softmax, SpMM and the whole attention beside the dense ones, at the paper's shapes.",
        {
            "operations_cpu.json": "python -m experiments.operations",
            "operations_[!c]*.json": "python -m experiments.operations --device cuda",
        },
        speed.operations,
    ),
    Section(
        "Scaling",
        "Time and memory over sequence length and density, and the density at which dense attention is as fast.",
        {
            "scaling_cpu.json": "python -m experiments.scaling",
            "scaling_[!c]*.json": "python -m experiments.scaling --device cuda",
        },
        speed.scaling,
    ),
    Section(
        "Length",
        "One sequence, with as many kept blocks a row at every length; layouts of long ones; training on Path-X.",
        {"length_cpu.json": "python -m experiments.length"},
        speed.length,
    ),
    Section(
        "A training step on a CPU",
        "The paper's CIFAR-10 model.",
        {"cpu_training.json": "python -m experiments.cpu_training"},
        speed.training,
    ),
    Section(
        "Estimates",
        "What `--estimate true` said of a training before it, and what the training took.",
        {"estimates.json": "python -m experiments.estimates --data DATA"},
        speed.estimates,
    ),
    Section(
        "Longformer and BigBird",
        "Our layers beside those of Hugging Face, projections included, forward and backward.",
        {"cpu_baselines.json": "OMP_NUM_THREADS=2 python -m experiments.cpu_baselines"},
        speed.baselines,
    ),
    Section(
        "Several processes",
        "What observing and deciding cost where processes must agree.",
        {"distributed_overhead.json": "python -m experiments.distributed_overhead"},
        speed.distributed,
    ),
    Section(
        "GPU suite",
        "Correctness and speed beside FlexAttention, flash attention and explicit attention.",
        {"gpu_*.json": "python -m experiments.gpu_suite"},
        speed.gpu,
    ),
    Section(
        "Kernels as compiled",
        "Registers, shared memory and matrix instructions, without a GPU.",
        {"kernels_sm*.json": "python -m experiments.kernel_report --arch 80 90 100"},
        checks.kernels,
    ),
    Section(
        "Whole runs",
        "Single runs of the training command.",
        {
            "quickstart_cpu.json": "make quickstart",
            "cifar10_cpu.json": "python -m sat.train --config cifar10.yaml --data.path FOLDER",
            "deepspeed_ag_news.json": "python -m sat.train --config ag_news.yaml --model.attention structure "
            "--model.attention_options.deepspeed experiments/deepspeed_ag_news.json",
        },
        checks.run,
    ),
    Section(
        "Notebooks",
        "The runs of the notebooks in docs/notebooks.",
        {"notebooks_cpu.json": "jupyter nbconvert --to markdown --execute notebooks/*.ipynb"},
        checks.notebooks,
    ),
    Section(
        "Drawn data sets",
        "How fast the Long Range Arena's ListOps and Pathfinder are drawn, by one core.",
        {"long_sequences_cpu.json": "python -m experiments.long_sequences"},
        checks.drawn,
    ),
    Section("Long tests", "Killed, frozen and resumed runs.", {"test_long.json": "make test-long"}, checks.long_tests),
    Section(
        "Fuzzed files",
        "Damaged and hostile files: read, or refused with a sentence.",
        {"fuzz.json": "python -m tests.fuzz --count 100000 --save fuzz"},
        checks.fuzz,
    ),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """0: the page was written; 1: there are no results; 2: it was written, but some files could not be shown."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.results_page",
        description="Makes RESULTS.md, with tables and plots, from the files in experiments/results. Exits with 1 if "
        "there are none, and with 2 if some of them could not be shown.",
    )
    parser.add_argument("--results", type=Path, default=record.RESULTS, help="folder to read (experiments/results)")
    parser.add_argument("--out", type=Path, default=record.RESULTS.parent, help="folder of RESULTS.md (experiments)")
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        shown, problems = compose(SECTIONS, args.results, args.out)
    except FileNotFoundError as error:
        print(error, file=sys.stderr)
        return 1
    for problem in problems:
        print(problem, file=sys.stderr)
    print(f"written to {args.out / 'RESULTS.md'}: {shown} files of results")
    return 2 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
