"""Floor 3, data: Yelp reviews."""

from __future__ import annotations

from sat.data.texts import TextDataModule


class YelpPolarity(TextDataModule):
    """Yelp polarity by characters: 1,024 tokens, 257 ids, negative or positive (hub: ``fancyzhx/yelp_polarity``).

    560,000 official training samples, of which 5,000 are held out for validation, class-stratified; 38,000 test
    samples. The arguments are those of :class:`~sat.data.texts.TextDataModule`; local files have the columns ``text``
    and ``label``.
    """

    dataset_name = "Yelp polarity"
    hub_id = "fancyzhx/yelp_polarity"
    num_classes = 2
