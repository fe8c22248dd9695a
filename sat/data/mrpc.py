"""Floor 3, data: the Microsoft Research Paraphrase Corpus."""

from __future__ import annotations

from sat.data.tokens import TokenizedTextDataModule


class MRPC(TokenizedTextDataModule):
    """MRPC, pairs of sentences that say the same or do not (hub: ``nyu-mll/glue``, ``mrpc``).

    3,668 training, 408 validation and 1,725 test pairs as GLUE cuts them; models are compared by the F1 score of the
    class "equivalent" (1), two thirds of all pairs. The arguments are those of
    :class:`~sat.data.tokens.TokenizedTextDataModule`; local files have the columns ``sentence1``, ``sentence2`` and
    ``label``.
    """

    dataset_name = "MRPC"
    hub_id = "nyu-mll/glue"
    hub_config = "mrpc"
    num_classes = 2
    text_columns = ("sentence1", "sentence2")
    metric = "f1"
