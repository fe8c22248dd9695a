"""Floor 3, data: AG News."""

from __future__ import annotations

from sat.data.texts import TextDataModule


class AGNews(TextDataModule):
    """AG News, topics of news by characters: 1,024 tokens, 257 ids, 4 classes (hub: ``fancyzhx/ag_news``).

    120,000 official training samples, of which 5,000 are held out for validation, class-stratified; 7,600 test
    samples. The arguments are those of :class:`~sat.data.texts.TextDataModule`; local files have the columns ``text``
    and ``label``.
    """

    dataset_name = "AG News"
    hub_id = "fancyzhx/ag_news"
    num_classes = 4
