"""Floor 6: what there is to say of what a run left, and in which order, for :mod:`sat.report`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sat.connectivity import Reach, reach
from sat.findings import Findings, Layer
from sat.layout import BlockLayout
from sat.page import Picture, Section
from sat.plots import plot_layer, plot_layouts, plot_reach, plot_statistics, plot_training
from sat.sparsity import best_mass, captured_mass

# Maps of reach are drawn until everything is reached, and no more than so many.
MOST_MAPS = 12


def sections_of(found: Findings) -> list[Section]:
    """All that there is to say of what was found, in the order in which to read it."""
    sections = [_overview(found)]  # whose notes those below add to
    parts: dict[str, Callable[[Findings], Section | list[Section] | None]] = {
        "Layers": _layers,
        "When to switch": _statistics,
        "Training": _training,
        "Connectivity": _connectivity,
    }
    for name, make in parts.items():
        try:
            made = make(found)
        except (ValueError, TypeError, ArithmeticError, LookupError) as error:  # of values that nothing of ours writes
            reason = " ".join(str(error).split()) or type(error).__name__
            found.notes.append(f"“{name}” is left out: it holds what cannot be shown ({reason}).")
            continue
        sections += made if isinstance(made, list) else [made] if made is not None else []
    return sections


def _overview(found: Findings) -> Section:
    """What was run and what came of it; robust against a summary of another version."""
    summary = found.summary
    rows: list[tuple[str, ...]] = []

    def add(label: str, value: Any, form: str = "{}") -> None:
        try:
            if value is not None:
                rows.append((label, form.format(value)))
        except (ValueError, TypeError, ArithmeticError):
            found.notes.append(f"“{label}” is left out: it is not what this version of SAT writes.")

    def part(name: str) -> dict[str, Any]:
        value = summary.get(name)
        return value if isinstance(value, dict) else {}

    add("attention", summary.get("attention"))
    add("steps", summary.get("steps"), "{:,}")
    data = found.config.get("data")
    add("share of the tokens hidden, to be found", data.get("hide") if isinstance(data, dict) else None, "{:.0%}")
    sizes = {(layer.layout.shape, layer.layout.block_size) for layer in found.layers if layer.layout is not None}
    if len(sizes) == 1:
        (((height, width), size),) = sizes
        add("blocks of the attention matrix", f"{height:,} × {width:,}, of {size} × {size} tokens")
    heads = {layer.layout.num_heads for layer in found.layers if layer.layout is not None}
    if len(heads) == 1:
        add("layouts a layer", "one for all heads" if heads == {1} else f"{heads.pop()}, one for each head")
    add("share of the blocks kept", summary.get("density"), "{:.3f}")
    accuracy, test, f1 = part("validation_accuracy"), part("test_accuracy"), part("test_f1")
    samples = summary.get("switch_samples")
    some = f" (first {samples:,} samples)" if isinstance(samples, int) else ""
    add(f"validation accuracy before the switch{some}", accuracy.get("before"), "{:.3f}")
    add(f"validation accuracy right after it{some}", accuracy.get("after"), "{:.3f}")
    add(f"validation accuracy at step {summary.get('validated_at', '?')}", accuracy.get("latest"), "{:.3f}")
    add(f"validation F1 at step {summary.get('validated_at', '?')}", summary.get("validation_f1"), "{:.3f}")
    add("test accuracy, final model", test.get("final"), "{:.3f}")
    add("test F1, final model", f1.get("final"), "{:.3f}")
    best = part("best_checkpoint")
    add(f"test accuracy, best model (step {best.get('step')}, {best.get('phase')})", test.get("best"), "{:.3f}")
    add("test F1, best model", f1.get("best"), "{:.3f}")
    for phase, milliseconds in part("median_step_ms").items():
        add(f"median step, {phase}", milliseconds, "{:.0f} ms")
    if isinstance(ratio := summary.get("sparse_step_speedup"), float) and ratio > 0:
        add(f"a sparse step is {'faster' if ratio >= 1 else 'slower'} by", max(ratio, 1 / ratio), "{:.2f} ×")
    for phase, mebibytes in part("peak_memory_mib").items():
        add(f"peak memory, {phase}", mebibytes, "{:,} MiB")
    add("device", summary.get("device"))
    if versions := part("versions"):
        add("versions", ", ".join(f"{name} {version}" for name, version in versions.items()))
    return Section("", _in_short(found), notes=found.notes, rows=rows)


def _in_short(found: Findings) -> str:
    """The outcome in a sentence or two."""
    kept = [layer.layout for layer in found.layers if layer.layout is not None]
    steps = sorted({layer.switch_step for layer in found.layers if layer.switch_step is not None})
    if not kept and not steps:
        if not _learns(found):
            return "This run learned no layouts: its attention is not of that kind. What was recorded is shown below."
        if found.source.suffix == ".ckpt":
            return f"At this checkpoint, after step {found.summary.get('steps', '?')}, every layer is still dense."
        if any(layer.attention is not None or layer.unread for layer in found.layers):
            return (
                "This training switched to sparse attention, but its layouts are not known: nothing that can be read "
                "has them."
            )
        missing = found.summary.get("not_switched")
        reasons = ""
        if isinstance(missing, dict) and missing:
            reasons = " What was missing at the end: " + "; ".join(f"layer {k}: {v}" for k, v in missing.items()) + "."
        return (
            "This training has not switched to sparse attention, so there are no layouts: every layer is still dense."
            f"{reasons}"
        )
    sentence = ""
    if kept:
        shares = [layout.density for layout in kept]
        least, most = share_text(min(shares)), share_text(max(shares))
        share = least if least == most else f"{least} to {most}"
        count = f"{len(kept)}" if len(kept) == len(found.layers) else f"{len(kept)} of {len(found.layers)}"
        layers = f"{'layer' if found.one_model else 'layout'}{'s' * (len(found.layers) > 1)}"
        keep = "keeps" if len(kept) == 1 else "keep"
        sentence = f"{count} {layers} {keep} {share} of the blocks of the attention matrix."
    if steps:
        when = f"step {steps[0]:,}" if len(steps) == 1 else f"steps {steps[0]:,} to {steps[-1]:,}"
        forced = [layer.name for layer in found.layers if layer.forced]
        how = f", forced by max_dense_steps in {', '.join(forced)}" if forced else ", by the criterion"
        sentence += f" Training switched to sparse attention at {when}{how}."
    if began := found.summary.get("began_sparsely"):
        what = began if str(began).startswith("the layouts") else f"the structure {began}"
        sentence += f" Training was sparse from the first step on, with {what}."
    revised = sorted({step for layer in found.layers for step in layer.revised})
    if revised:
        often = "once" if len(revised) == 1 else f"{len(revised)} times"
        sentence += f" Layouts were changed {often} after that, last at step {revised[-1]:,}."
    if (gave_up := _gave_up(found)) is not None:
        sentence += f" At step {gave_up:,} it went back to dense attention, because the validation loss stayed worse."
    return sentence.strip()


def _gave_up(found: Findings) -> int | None:
    """The step at which training went back to dense attention, if it did."""
    step = found.summary.get("gave_up")
    return step if isinstance(step, int) and 0 <= step < 2**53 else None


def _learns(found: Findings) -> bool:
    """Whether the attention is of a kind that learns layouts, as far as anything says so."""
    model = found.config.get("model")
    named = found.summary.get("attention", model.get("attention") if isinstance(model, dict) else None)
    return named in (None, "adaptive", "spion")


def share_text(share: float) -> str:
    """``12.3%``; what is little more than nothing, or little less than all, is not rounded to that."""
    if 0 < share < 0.0005:
        return f"{100 * share:.1g}%"
    return "over 99.9%" if 0.9995 <= share < 1 else f"{share:.1%}"


def _layers(found: Findings) -> list[Section]:
    """A table of the layers, and their pictures."""
    drawn = [layer for layer in found.layers if layer.layout is not None or layer.attention is not None]
    if not drawn:
        return []
    names = {"captured_mass": "held", "best_mass": "most possible", "empty_rows": "empty rows"}
    names |= {"step": "switch at", "skewness": "skewness", "relative_change": "change"}
    forms = {"captured_mass": "{:.1%}", "best_mass": "{:.1%}", "empty_rows": "{:.0f}", "step": "{:,.0f}"}
    forms |= {"skewness": "{:.2f}", "relative_change": "{:.2f} %"}
    numbers = [{**_masses(layer), **layer.transition} for layer in found.layers]
    known = [name for name in names if any(name in each for each in numbers)]
    header: tuple[str, ...] = ("layer", "kept", *(names[name] for name in known))
    kinds = {(x.layout.shape, x.layout.block_size, x.layout.num_heads) for x in found.layers if x.layout is not None}
    if len(kinds) > 1:  # otherwise it stands above
        header = (header[0], "blocks", "block size", "heads", *header[1:])
    rows = []
    for layer, each in zip(found.layers, numbers, strict=True):
        layout = layer.layout
        lost = layer.attention is not None and "gave_up" not in found.summary  # it switched
        own: tuple[str, ...] = ("unknown" if layer.unread or lost else "all",)
        if layout is not None:
            own = (f"{layout.density:.3f}" if layout.density >= 0.001 else f"{layout.density:.1e}",)
        if len(kinds) > 1:
            sizes = ("", "", "")
            if layout is not None:
                who = "all alike" if layout.num_heads == 1 else str(layout.num_heads)
                sizes = (f"{layout.shape[0]:,} × {layout.shape[1]:,}", str(layout.block_size), who)
            own = (*sizes, *own)
        rows.append((layer.name, *own, *(forms[name].format(each[name]) if name in each else "" for name in known)))
    table = Section("Layers", header=header, rows=rows)
    table.paragraphs = [
        "The attention matrix of a head has a row for each query and a column for each key, and is divided into square "
        "blocks. Those that are kept are computed, all others skipped.",
    ]
    if "best_mass" in known:
        table.paragraphs.append(
            "“Held” is the share of the attention, as it was at the switch, that lies in the kept blocks; "
            "“most possible” what as many blocks could have held at best. The closer, the better the choice. An empty "
            "row is a row of blocks without any: its queries attend to nothing."
        )
    return [table, Section("Blocks and attention", paragraphs=_attention_text(found, drawn), pictures=_pictures(drawn))]


def _masses(layer: Layer) -> dict[str, float]:
    """What can be computed where no transition has been recorded."""
    if layer.layout is None:
        return {}
    masses = {"empty_rows": float((~layer.layout.mask.any(2)).sum())}
    if layer.attention is not None:
        held = _held(layer.layout, layer)
        masses |= {
            "captured_mass": sum(h for h, _ in held) / len(held),
            "best_mass": sum(b for _, b in held) / len(held),
        }
    return masses


def _held(layout: BlockLayout, layer: Layer) -> list[tuple[float, float]]:
    """For each head of a layout the share of attention held, and the most possible."""
    attention = layer.attention
    assert attention is not None
    sizes = attention.block_size, attention.query_length, attention.key_length
    if layout.num_heads == 1:
        each = [(attention.pooled, layout.mask)]
    else:
        each = list(zip(attention.pooled.split(1), layout.mask.split(1), strict=True))
    return [(captured_mass(pooled, mask, *sizes), best_mass(pooled, mask, *sizes)) for pooled, mask in each]


def _attention_text(found: Findings, layers: list[Layer]) -> list[str]:
    if found.summary.get("began_sparsely") or not _learns(found):
        return []
    if any(layer.attention is not None for layer in layers):
        return [
            "Beside the blocks, in brown, stands what was attended to at the switch: the mean over the sequences that "
            "were looked at, block by block, as a multiple of what each would get if attention were spread evenly. The "
            "scale is logarithmic and the same for all layers."
        ]
    return [
        "What was attended to at the switch is not known here; sat.train keeps it in the folder “attention” of a run."
    ]


def _pictures(layers: list[Layer]) -> list[Picture]:
    """A picture a layer; a single one if there is nothing but one layout each."""
    largest = max((float(x.attention.over_uniform().max()) for x in layers if x.attention is not None), default=None)
    layouts = {layer.name: layer.layout for layer in layers if layer.layout is not None}
    if largest is None and all(layout.num_heads == 1 for layout in layouts.values()):
        shares = [layer.transition.get("captured_mass", float("nan")) for layer in layers]
        caption = "Which blocks each layer keeps, the same in all of its heads."
        return [Picture(plot_layouts(layouts, captured=shares), caption, f"{caption} Shares stand in the table above.")]
    pictures = []
    for layer in layers:
        layout, attention = layer.layout, layer.attention
        held = None if attention is None or layout is None else _held(layout, layer)
        title = layer.name.replace("layer ", "Layer ", 1) if layer.name.startswith("layer ") else layer.name
        figure = plot_layer(
            layout,
            None if attention is None else attention.over_uniform(),
            block_size=layout.block_size if layout is not None else attention.block_size,  # type: ignore[union-attr]
            held=held,
            largest=largest,
            title=title,
        )
        caption = f"{title}: the blocks kept"
        if attention is not None:
            caption += f", and what was attended to at step {attention.step:,}"
        if held is not None:
            caption += "; “holds” is the share of attention in the kept blocks, “of” the most possible"
        pictures.append(Picture(figure, f"{caption}.", f"{caption}. Shares stand in the table above."))
    return pictures


CHANGE = (
    " The relative change tells how much the distance between successive matrices of scores still changes: it falls as "
    "the pattern settles."
)
AGREEMENT = (
    " The rule here was the agreement: of the blocks that would be kept, the share that would have been kept some "
    "observations before, too."
)


def _statistics(found: Findings) -> Section | None:
    """What the criterion saw."""
    section = Section("When to switch")
    if not found.history:
        if found.summary.get("began_sparsely"):
            section.paragraphs = ["There was no dense phase: training was sparse from the first step on."]
            return section
        if found.summary.get("attention") in ("adaptive", "spion"):
            section.paragraphs = ["No statistics of the attention have been recorded."]
            return section
        return None
    steps = sorted(found.history)
    count = max(map(len, found.history.values()))

    def values(name: str) -> list[list[float]]:
        rows = [found.history[step] for step in steps]
        return [
            [row[i].get(name, float("nan")) if i < len(row) else float("nan") for row in rows] for i in range(count)
        ]

    switches = [found.layers[index].switch_step for index in range(count)]
    # Recorded where it was the rule, whatever has become of the config.
    agreed = any("agreement" in layer for layers in found.history.values() for layer in layers)
    figure = plot_statistics(
        steps,
        values("skewness"),
        values("relative_change"),
        theta=found.theta,
        delta=found.delta,
        agreement=values("agreement") if found.agreement is not None or agreed else None,
        least_agreement=found.agreement,
        switch_steps=switches,
        names=[found.layers[index].name for index in range(count)],
    )
    limits = [f"skewness at least {found.theta:g}"] if found.theta is not None else []
    limits += [f"change below {found.delta:g} %"] if found.delta is not None else []
    limits += [f"agreement at least {found.agreement:g}"] if found.agreement is not None else []
    rule = f" The threshold{'s' * (len(limits) > 1)}: {' and '.join(limits)}." if limits else ""
    measured = any("relative_change" in layer for layers in found.history.values() for layer in layers)
    section.paragraphs = [
        "Skewness tells how unevenly attention is spread: it rises as a pattern forms."
        + (CHANGE if measured else "")
        + (AGREEMENT if found.agreement is not None or agreed else "")
        + rule
    ]
    if not any(step is not None for step in switches) and any(layer.layout is not None for layer in found.layers):
        section.notes = ["The step of the switch is not known, so it is not marked."]
    shows = f"Two line charts over steps {steps[0]} to {steps[-1]}, a line for each of {count} layers."
    section.pictures = [Picture(figure, "Statistics of each layer's attention while it was dense.", shows)]
    return section


def _training(found: Findings) -> Section | None:
    """Loss, accuracy and step time, if there are any."""
    if not found.curves:
        return None
    figure = plot_training(
        found.curves,
        switch_steps=[layer.switch_step for layer in found.layers],
        gave_up=_gave_up(found),
    )
    section = Section("Training")
    if "train/step_ms" not in found.curves:
        section.paragraphs = ["The times of the steps have not been recorded one by one; their medians stand above."]
    caption = (
        "Loss and accuracy on training batches (gray) and validation data (black), and the median of 20 step times."
    )
    if "train/step_ms" not in found.curves:
        caption = "Loss and accuracy on training batches (gray) and validation data (black)."
    section.pictures = [Picture(figure, caption, f"Line charts over the training steps. {caption}")]
    return section


def _connectivity(found: Findings) -> Section | None:
    """How far information travels."""
    layouts = [layer.layout for layer in found.layers]
    known = [layout for layout in layouts if layout is not None]
    if not known:
        return None
    section = Section("Connectivity")
    if not found.one_model:
        section.paragraphs = [
            "Not shown: it follows information through the layers of one model, and these files are not named like "
            "them (layer0.safetensors and so on)."
        ]
        return section
    if any(layer.unread for layer in found.layers):
        section.paragraphs = ["Not shown: the layout of a layer could not be read, and information passes through all."]
        return section
    try:
        result = reach(layouts)
    except ValueError as error:
        section.paragraphs = [f"Not shown: {error}."]
        return section
    section.paragraphs = [
        "From layer to layer, a token hears of the tokens in the blocks that its row keeps, in any head, and of all "
        "that these have heard of before. This asks how many layers it takes until any token has heard of any other.",
    ]
    section.outcome = _verdict(result, len(layouts))
    names = [layer.name for layer in found.layers[: result.complete]]
    section.header = ("after", "pairs of blocks reached")
    section.rows = [(name, share_text(share)) for name, share in zip(names, result.shares, strict=False)]
    shown = [f"after {name}" for name in names[:MOST_MAPS]]
    figure = plot_reach(
        dict(zip(shown, result.maps, strict=False)), block_size=known[0].block_size, shares=result.shares
    )
    after = "after each layer" if len(shown) == len(names) else f"after each of the first {MOST_MAPS} layers"
    caption = f"Of which keys each query has heard, {after}, and the share of all pairs."
    section.pictures = [Picture(figure, caption, f"{caption} The shares stand in the table above.")]
    return section


def _verdict(result: Reach, layers: int) -> str:
    pairs = "earlier one (nothing comes from later ones: the layouts are causal)" if result.causal else "other"
    if result.complete is not None:
        many = f"{result.complete} layers" if result.complete > 1 else "1 layer"
        return f"After {many}, any token has heard of any {pairs}."
    return (
        f"The {layers} layer{'s do' if layers > 1 else ' does'} not suffice: {share_text(result.shares[-1])} of the "
        f"pairs of blocks are reached at the end; the others never exchange anything."
    )
