"""The sections, in their order."""

from __future__ import annotations

from experiments.gpu_suite import attention, correct, long, operations, training, tune
from experiments.gpu_suite.case import Section

SECTIONS: dict[str, Section] = {
    section.name: section
    for section in (
        correct.SECTION,
        attention.SECTION,
        operations.SECTION,
        training.SECTION,
        long.SECTION,
        tune.SECTION,
    )
}
