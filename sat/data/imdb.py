"""Floor 3, data: IMDB reviews."""

from __future__ import annotations

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
