"""Floor 2: what a layer attended to when it left the dense phase, as a file."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sat.files import DamagedFile, read_safetensors, save_tensors, whole_number
from sat.sparsity.statistics import block_mass

FORMAT = "sat.PooledAttention"
FORMAT_VERSION = 1
_NUMBERS = ("block_size", "query_length", "key_length", "step")


@dataclass(frozen=True)
class PooledAttention:
    """The mean attention weight of each block, as observed at one step.

    Args:
        pooled: ``[H, M, N]``, mean over the batch; its block sizes are those of the layout that was chosen from it.
        block_size: edge of a block in tokens.
        query_length: ``L``, in tokens.
        key_length: ``S``, in tokens.
        step: optimizer steps done when it was observed.

    Raises:
        ValueError: there is no block, or the number of blocks does not fit the lengths.
    """

    pooled: Tensor
    block_size: int
    query_length: int
    key_length: int
    step: int

    def __post_init__(self) -> None:
        if self.pooled.dim() != 3 or 0 in self.pooled.shape or self.block_size < 1:
            raise ValueError(
                f"pooled attention is [heads, rows, columns] in blocks of at least 1 token, got "
                f"{list(self.pooled.shape)} in blocks of {self.block_size}"
            )
        # Checks the shapes, and computes nothing: of no head.
        block_mass(self.pooled[:0], self.block_size, self.query_length, self.key_length)

    def mass(self) -> Tensor:
        """Share of a head's attention that lies in each block, float64 ``[H, M, N]``."""
        return block_mass(self.pooled, self.block_size, self.query_length, self.key_length)

    def over_uniform(self) -> Tensor:
        """How many times as much as uniform attention would give each block gets, ``[H, M, N]``."""
        return self.pooled.float() * self.key_length

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file; an existing one is replaced whole or not at all."""
        metadata = {name: str(getattr(self, name)) for name in _NUMBERS}
        metadata |= {"format": FORMAT, "version": str(FORMAT_VERSION)}
        save_tensors({"pooled": self.pooled.detach().float().cpu().contiguous()}, path, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PooledAttention:
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file holds something else, is cut short, or was written by a newer version.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no pooled attention at {path}")
        try:
            metadata, tensors = read_safetensors(path)
            if metadata.get("format") != FORMAT:
                raise DamagedFile("it is a safetensors file, but holds no pooled attention")
            if (version := whole_number(metadata, "version")) > FORMAT_VERSION:
                raise DamagedFile(
                    f"it has format {version}, this version of SAT reads up to {FORMAT_VERSION}; upgrade SAT to read it"
                )
            numbers = {name: whole_number(metadata, name) for name in _NUMBERS}
            pooled = tensors.get("pooled")
            if (
                pooled is None
                or pooled.dtype != torch.float32
                or not pooled.isfinite().all()
                or bool((pooled < 0).any())
            ):
                raise DamagedFile("its attention is not float32, finite and at least 0")
            return cls(pooled.clone(), **numbers)
        except ValueError as error:
            raise ValueError(f"{path} cannot be read as pooled attention: {error}") from error
