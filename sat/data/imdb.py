"""Floor 3, data: IMDB reviews."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sat.data.texts import TextDataModule
from sat.data.tokens import TokenizedTextDataModule


class IMDB(TokenizedTextDataModule):
    """IMDB reviews, negative or positive (hub: ``stanfordnlp/imdb``).

    25,000 official training samples, of which 2,500 are held out for validation, class-stratified; 25,000 test
    samples. The arguments are those of :class:`~sat.data.tokens.TokenizedTextDataModule`; local files have the columns
    ``text`` and ``label``.
    """

    dataset_name = "IMDB"
    hub_id = "stanfordnlp/imdb"
    num_classes = 2
    text_columns = ("text",)


class IMDBBytes(TextDataModule):
    """IMDB reviews by bytes, the Long Range Arena's "Text": 4,000 tokens, 257 ids (hub: ``stanfordnlp/imdb``).

    A token is a byte of the text in UTF-8, + 1; id 0 is padding. 25,000 official training samples, of which 2,500 are
    held out for validation, class-stratified (the Arena validates on its test samples); 25,000 test samples.

    Args:
        seq_len: bytes in a sequence: longer texts are cut, shorter ones padded.
        batch_size: samples in a training batch, per process. Incomplete training batches are left out.
        kwargs: as of :class:`~sat.data.texts.TextDataModule`.
    """

    dataset_name = "IMDB bytes"
    hub_id = "stanfordnlp/imdb"
    num_classes = 2

    def __init__(
        self,
        *,
        seq_len: int = 4000,
        batch_size: int = 32,
        **kwargs: Any,
    ) -> None:
        super().__init__(seq_len=seq_len, batch_size=batch_size, **kwargs)

    def encoding(self) -> Sequence[int | str]:
        """The tokens of a text depend on where it is cut, and on the bytes of a character."""
        return [self.seq_len, "utf-8"]

    def to_bytes(self, text: str) -> bytes:
        """The beginning of a text, a byte a token."""
        return text.encode("utf-8", "replace")[: self.seq_len]
