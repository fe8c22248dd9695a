"""Floor 1: measure launch parameters of fused attention on this GPU and keep the best.

    python -m sat.ops.triton.tune --block_size 32 64 --head_dim 64

For each case it times the forward kernel and both gradient kernels with every tile that fits, on a layout like a
learned one, and writes the winners to $SAT_TUNING or ~/.cache/sat/launch_parameters.json, from where every later
process on this kind of GPU takes them. A winner must also run with masks, which take more of the chip's memory. Nothing
of this happens unasked. Exits with 3 when the time was up before the end; what was found by then is kept.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Iterator

import torch
import triton
from torch import Tensor

from sat.layout import BlockLayout
from sat.ops.triton import flash
from sat.ops.triton.launch import BLOCK_SIZES
from sat.ops.triton.parameters import ATTENTION_KERNELS, Tile, attention_tiles, case_name, save_tuned

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# A winner must be faster than the table's tile by more than the spread of two equal measurements.
MARGIN = 0.98


def candidates(kernel: str, block_size: int, half: bool) -> Iterator[Tile]:
    """Tiles worth trying: of a whole or half block, or of several small ones."""
    owns = (32, 64, 128) if half else (16, 32)
    steps = (32, 64, 128) if half else (16, 32)
    for own, step, warps, stages in itertools.product(owns, steps, (4, 8), (2, 3)):
        if own * step <= 128 * 128 and own <= max(64, block_size) and own // block_size <= 8:
            yield Tile(step, own, warps, stages) if kernel == "key_value_gradient" else Tile(own, step, warps, stages)


def learned_like(heads: int, blocks: int, size: int, density: float, device: torch.device) -> BlockLayout:
    """The diagonal, two vertical lines a head, and scattered blocks up to the density."""
    generator = torch.Generator().manual_seed(0)
    score = torch.rand(heads, blocks, blocks, generator=generator)
    lines = torch.rand(heads, 1, blocks, generator=generator).argsort(2) < 2
    score += 2 * torch.eye(blocks) + lines
    kept = score.flatten(1).topk(max(blocks, round(density * blocks**2)), 1).indices
    mask = torch.zeros(heads, blocks * blocks, dtype=torch.bool).scatter_(1, kept, True)
    return BlockLayout(mask.view(heads, blocks, blocks).to(device), size)


def tune(
    layout: BlockLayout,
    query: Tensor,
    heavy: bool,
    milliseconds: Callable[[Callable[[], object]], float],
    give_up: float = float("inf"),
) -> dict[str, tuple[Tile, float, float]]:
    """Best tile, its time and the time with the table's tile, of each kernel; the gradients' with the backward pass.

    ``milliseconds`` times a function. Tiles that do not compile or do not fit, plainly or with masks, are passed over.
    At ``give_up`` (``time.monotonic``) what was found by then is returned.
    """
    heads, dim = layout.num_heads, query.shape[3]
    tiles = attention_tiles(layout.block_size, dim, query.dtype, query.device, heavy)
    key, value = torch.randn_like(query), torch.randn_like(query)
    query, key, value = leaves = [x.detach().requires_grad_() for x in (query, key, value)]
    grad = torch.randn_like(query)
    pruned = "zero" if heavy else "drop"
    bias = torch.zeros(1, heads, 1, query.shape[2], device=query.device) if heavy else None
    real = torch.ones(1, query.shape[2], dtype=torch.bool, device=query.device)

    def run(tiles: list[int], backward: bool, masked: bool = False) -> Callable[[], object]:
        def attend() -> Tensor:
            return flash.block_sparse_attention(
                query,
                key,
                value,
                layout,
                key_padding_mask=real if masked else None,
                query_padding_mask=real if masked else None,
                attn_bias=bias,
                is_causal=masked,
                dropout_p=0.1 if masked and heavy else 0.0,
                scale=dim**-0.5,
                pruned=pruned,
                tiles=tiles,
            )

        if not backward:
            return attend
        out = attend()
        return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)

    found = {}
    for place, kernel in enumerate(ATTENTION_KERNELS):
        own = slice(4 * place, 4 * place + 4)
        default = Tile(*tiles[own])
        base = milliseconds(run(tiles, place > 0))
        best, best_time = default, base
        for tile in candidates(kernel, layout.block_size, query.dtype.itemsize == 2):
            if tile == default or time.monotonic() > give_up:
                continue
            trial = [*tiles]
            trial[own] = tile
            try:
                measured = milliseconds(run(trial, place > 0))
                if measured >= min(best_time, MARGIN * base):
                    continue
                run(trial, place > 0, masked=True)()  # one name covers all of them
            except triton.TritonError:
                continue
            except RuntimeError as error:
                if "PassManager" not in str(error):  # the compiler gave up, the device is as it was
                    raise
                continue
            best, best_time = tile, measured
        tiles[own] = best
        found[kernel] = best, best_time, base
    return found


def main(arguments: list[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--block_size", type=int, nargs="+", default=[32, 64, 128], choices=BLOCK_SIZES)
    parser.add_argument("--head_dim", type=int, nargs="+", default=[32, 64, 128], help="default: 32 64 128")
    parser.add_argument("--dtype", nargs="+", default=["bfloat16"], choices=DTYPES)
    parser.add_argument("--heavy", action="store_true", help="kernels with bias, dropout or pruned='zero' instead")
    parser.add_argument("--length", type=int, default=8192, help="tokens, default 8192")
    parser.add_argument("--heads", type=int, default=16, help="heads times batch, default 16")
    parser.add_argument("--density", type=float, default=0.1, help="share of the blocks that is kept, default 0.1")
    parser.add_argument("--minutes", type=float, default=10, help="stop after so long, default 10")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("There is no CUDA device here: launch parameters can only be measured on the GPU.", file=sys.stderr)
        return 2
    device, name = torch.device("cuda"), torch.cuda.get_device_name()
    give_up = time.monotonic() + 60 * options.minutes

    def milliseconds(function: Callable[[], object]) -> float:
        return triton.testing.do_bench(function, warmup=10, rep=50, return_mode="median")

    for size, dim, dtype in itertools.product(options.block_size, options.head_dim, options.dtype):
        if time.monotonic() > give_up:
            print(f"out of time: blocks of {size}, head dimension {dim}, {dtype} and what follows were not tuned")
            return 3
        layout = learned_like(options.heads, -(-options.length // size), size, options.density, device)
        query = torch.randn(1, options.heads, options.length, dim, device=device, dtype=DTYPES[dtype])
        found = tune(layout, query, options.heavy, milliseconds, give_up)
        cases = {}
        for kernel, (tile, best, base) in found.items():
            case = case_name(kernel, size, dim, DTYPES[dtype], options.heavy)
            cases[case] = tile
            print(f"{case}: {base:.3f} -> {best:.3f} ms with {tuple(tile)}", flush=True)
        path = save_tuned(name, cases)
    print(f"kept in {path} for every {name}; the next process uses them")
    return 0


if __name__ == "__main__":
    sys.exit(main())
