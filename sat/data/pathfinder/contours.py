"""Floor 3, data: draws Pathfinder's pictures: dashed contours, some hundred pictures at once.

Two long contours, short ones that distract, and two discs: do these mark the two ends of one contour? After Linsley et
al. 2018 (Learning long-range spatial dependencies with horizontal gated recurrent units) and Kim et al. 2020, with the
settings of the Long Range Arena. Coordinates are (y, x) in pixels, angles are those of (sin, cos).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

RETRIES = 2  # of a paddle that would come too near to another
DISTRACTOR_ATTEMPTS = 10  # of one contour that distracts; then the picture goes without it, as in the reference
HOPELESS_AFTER = 2000  # attempts at pictures without one that fits
SCALE = 2  # pictures are drawn at this multiple of their size: antialiasing
TURNS = 31  # directions in which a contour may go on
PIXELS_AT_ONCE = 2**22
PLACES, ANGLES = 32, 36  # how finely states of a contour are told apart: along an edge, around


@dataclass(frozen=True)
class Settings:
    """What a picture holds; lengths in pixels.

    Args:
        size: edge of the picture.
        margins: half of the gap between paddles; each picture has one of these.
        seed_distance: between the first paddles of the two contours; half of theirs from the border.
        marker_radius: of the two discs.
        paddle_length: of the dashes that make up a contour.
        paddle_thickness: of the same.
        continuity: how straight contours are: from one paddle to the next they turn by less than 90 / continuity
            degrees.
        num_distractors: short contours, a third as long as the others; as many of them as fit.
        contrast: brightness of the contours; that of the discs is 1. More than 1 shows where a paddle covers part of a
            pixel; none is brighter than 1.
        distractor_contrast: the same of the contours that distract.
        padding: pixels at the border that stay empty.
        contour_length: paddles of each of the two contours.
    """

    size: int
    margins: tuple[float, ...]
    seed_distance: float
    marker_radius: float
    paddle_length: float
    paddle_thickness: float
    continuity: float
    num_distractors: int
    contrast: float
    distractor_contrast: float
    padding: int = 1
    contour_length: int = 14

    @property
    def distractor_length(self) -> int:
        """Paddles of a contour that distracts."""
        return max(1, self.contour_length // 3)


SETTINGS = {
    16: Settings(16, (0.75,), 3, 1, 2, 0.5, 1.0, 2, 0.75, 0.75, contour_length=5),  # ours, for tests and short runs
    # The reference multiplies snake_contrast_list (2) by paddle_contrast_list (0.75) for contours, not for distractors.
    32: Settings(32, (1,), 7, 1.5, 2, 0.5, 1.0, 5, 1.5, 2.0),
    64: Settings(64, (1,), 12, 2.5, 5, 1, 1.8, 5, 0.8, 0.8),
    128: Settings(128, (2, 3), 20, 3, 5, 1.5, 1.8, 8, 0.9, 0.9),
    256: Settings(256, (3,), 27, 5, 5, 2, 1.8, 7, 1.0, 1.0, padding=22),
}


def settings_of(size: int, contour_length: int | None = None, num_distractors: int | None = None) -> Settings:
    """The settings of a size, perhaps with other contours.

    Raises:
        ValueError: there are none of this size, or so many paddles cannot fit.
    """
    if size not in SETTINGS:
        raise ValueError(f"Pathfinder is drawn at {', '.join(map(str, SETTINGS))} pixels, not at {size!r}; choose one")
    settings = SETTINGS[size]
    for name, value, least in (("contour_length", contour_length, 2), ("num_distractors", num_distractors, 0)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
    settings = replace(
        settings,
        contour_length=settings.contour_length if contour_length is None else contour_length,
        num_distractors=settings.num_distractors if num_distractors is None else num_distractors,
    )
    paddles = 2 * settings.contour_length + settings.num_distractors * settings.distractor_length
    # Each paddle keeps the others away from itself by twice the margin, so half of that is its own.
    margin = min(settings.margins)
    area = (settings.paddle_length + 2 * margin) * (settings.paddle_thickness + 2 * margin)
    most = int((size - 2 * settings.padding) ** 2 / area)
    if paddles > most:
        raise ValueError(
            f"{paddles} paddles (two contours of {settings.contour_length}, {settings.num_distractors} that distract "
            f"of {settings.distractor_length}) do not fit in {size} x {size} pixels, where there is room for fewer "
            f"than {most + 1}; lower contour_length or num_distractors, or take larger pictures"
        )
    return settings


@dataclass
class Drawn:
    """Some pictures.

    Args:
        pictures: uint8 ``[n, size, size]``.
        labels: int64 ``[n]``, 1 where the discs mark one contour.
        paddles: float32 ``[n, paddles, 3]``, y and x of the beginning of each, and its angle: those of the first
            contour in their order, those of the second, those of each that distracts (NaN of one that does not fit).
        discs: float32 ``[n, 2, 2]``, their centres.
    """

    pictures: np.ndarray
    labels: np.ndarray
    paddles: np.ndarray
    discs: np.ndarray


def chunk_size(settings: Settings) -> int:
    """How many pictures are drawn together; they depend on the seed and their chunk's number alone."""
    return max(16, min(1024, PIXELS_AT_ONCE // (SCALE * settings.size) ** 2))


def draw(
    settings: Settings, count: int, seed: int, take: Callable[[int, Drawn], None], workers: int | None = None
) -> None:
    """Draw pictures on all cores; ``take`` gets each part of them, and the number of its first picture, in order.

    The same number of pictures, and the same seed, give the same pictures, with any number of workers; of a larger
    number the first are the same but for the last part.

    Raises:
        ValueError: the contours hardly ever fit.
    """
    size = chunk_size(settings)
    starts = range(0, count, size)
    # NumPy works outside the interpreter's lock, so threads do.
    with ThreadPoolExecutor(workers) as threads:
        parts = threads.map(
            lambda start: draw_some(settings, min(size, count - start), np.random.default_rng([seed, start])), starts
        )
        try:
            for start, part in zip(starts, parts, strict=True):
                take(start, part)
        except BaseException:
            threads.shutdown(wait=True, cancel_futures=True)
            raise


def draw_some(settings: Settings, count: int, generator: np.random.Generator) -> Drawn:
    """``count`` pictures, half of which (rounded up) have the label 1.

    Raises:
        ValueError: the contours hardly ever fit.
    """
    labels = generator.permutation(np.arange(count) % 2 == 0).astype(np.int64)
    sketch = _Sketch(settings, count, generator)
    left, attempts = np.arange(count), 0
    while len(left):
        attempts += len(left)
        fits = sketch.attempt(left, labels[left])
        left = left[~fits]
        if len(left) == count and attempts >= HOPELESS_AFTER:
            raise ValueError(
                f"of {attempts} attempts to fit two contours of {settings.contour_length} paddles into {settings.size} "
                f"x {settings.size} pixels none has succeeded; lower contour_length, or take larger pictures"
            )
    sketch.distract()
    return Drawn(_render(settings, sketch.paddles, sketch.discs), labels, sketch.paddles, sketch.discs)


class _Sketch:
    """Where the paddles of some pictures lie, and where no other may."""

    def __init__(self, settings: Settings, count: int, generator: np.random.Generator) -> None:
        self.settings, self.generator = settings, generator
        paddles = 2 * settings.contour_length + settings.num_distractors * settings.distractor_length
        self.paddles = np.zeros((count, paddles, 3), np.float32)
        self.discs = np.zeros((count, 2, 2), np.float32)
        self.margins = np.zeros(count, np.float32)
        # Pixels of half the size where the gaps are small.
        self.grid = 2 if settings.size < 128 else 1
        self.taken = np.zeros((count, self.grid * settings.size, self.grid * settings.size), bool)
        steps = math.ceil(2 * settings.paddle_length)
        self.along = np.linspace(0, settings.paddle_length, steps + 1, dtype=np.float32)
        self.turns, self.weights = _turns(settings)

    def attempt(self, which: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Begin these pictures anew; returns which of them have two whole contours and their discs, as a bool each."""
        begun = which
        self.taken[which] = False
        self.margins[which] = self.generator.choice(self.settings.margins, len(which))
        which = which[self._two_contours(which)]
        which = which[self._place_discs(which, labels[np.isin(begun, which)])]
        return np.isin(begun, which)

    def distract(self) -> None:
        """Add the short contours to all pictures, as many as fit."""
        for number in range(self.settings.num_distractors):
            begin = 2 * self.settings.contour_length + number * self.settings.distractor_length
            missing = np.arange(len(self.paddles))
            for _ in range(DISTRACTOR_ATTEMPTS):
                missing = missing[~self._distract(missing, begin)]
            self.paddles[missing, begin : begin + self.settings.distractor_length] = np.nan

    def _two_contours(self, which: np.ndarray) -> np.ndarray:
        """Grow both contours, a paddle each at a time."""
        settings, length = self.settings, self.settings.contour_length
        alive = np.arange(len(which))
        edge = 2 * settings.seed_distance
        first = self.generator.uniform(edge, settings.size - edge, (len(which), 2)).astype(np.float32)
        second = first + settings.seed_distance * _direction(self._angles(len(which)))
        for snake, tail in enumerate((first, second)):
            angle = self._angles(len(which))
            self.paddles[which, snake * length] = np.concatenate([tail, angle[:, None]], 1)
        for snake in range(2):
            now = self.paddles[which[alive], snake * length]
            others = self.paddles[which[alive], None, 0] if snake else None
            alive = alive[self._free(which[alive], now[:, None], others)[:, 0]]
        for place in range(1, length):
            for snake in range(2):
                rows, at = which[alive], snake * length + place
                other = length + place - 1 if snake == 0 else place
                fits = self._extend(rows, at, self.paddles[rows, None, other], length - 1 - place)
                alive = alive[fits]
                self._take(which[alive], self.paddles[which[alive], at - 1])
        for last in (length - 1, 2 * length - 1):
            self._take(which[alive], self.paddles[which[alive], last])
        complete = np.zeros(len(which), bool)
        complete[alive] = True
        return complete

    def _place_discs(self, which: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Mark the beginning of a contour, and the end of the same or of the other; discs must not touch."""
        length = self.settings.contour_length
        beginning = self.generator.integers(0, 2, len(which))
        end = np.where(labels == 1, beginning, 1 - beginning)
        last = self.paddles[which, end * length + length - 1]
        self.discs[which, 0] = self.paddles[which, beginning * length, :2]
        self.discs[which, 1] = last[:, :2] + self.settings.paddle_length * _direction(last[:, 2])
        apart = np.linalg.norm(self.discs[which, 0] - self.discs[which, 1], axis=1)
        return apart >= 2 * self.settings.marker_radius + self.margins[which]

    def _distract(self, which: np.ndarray, begin: int) -> np.ndarray:
        """Grow one short contour anywhere; returns where it fits."""
        length = self.settings.distractor_length
        tail = self.generator.uniform(0, self.settings.size, (len(which), 2)).astype(np.float32)
        self.paddles[which, begin] = np.concatenate([tail, self._angles(len(which))[:, None]], 1)
        alive = np.flatnonzero(self._free(which, self.paddles[which, None, begin])[:, 0])
        for place in range(1, length):
            rows = which[alive]
            alive = alive[self._extend(rows, begin + place, self.paddles[rows, begin : begin + place - 1])]
        for place in range(length):
            self._take(which[alive], self.paddles[which[alive], begin + place])
        complete = np.zeros(len(which), bool)
        complete[alive] = True
        return complete

    def _extend(self, which: np.ndarray, at: int, others: np.ndarray, to_come: int = 0) -> np.ndarray:
        """Put paddle ``at`` behind the one before it, which it alone may come near to; returns where it fits."""
        last, margin = self.paddles[which, at - 1], self.margins[which]
        pivot = last[:, :2] + (self.settings.paddle_length + margin)[:, None] * _direction(last[:, 2])
        angles = last[:, 2, None] + self.turns
        heads = pivot[:, None] + (self.settings.paddle_length + margin)[:, None, None] * _direction(angles)
        weights = self.weights * ~self._is_taken(which, heads)
        if to_come:
            for each in self.settings.margins:
                of = margin == np.float32(each)
                weights[of] *= _prospects(self.settings, each)[to_come][_state(self.settings, heads[of], angles[of])]
        weights = np.cumsum(weights, 1)
        drawn = self.generator.random((len(which), 1 + RETRIES), np.float32) * weights[:, -1:]
        chosen = np.minimum((weights[:, None] <= drawn[..., None]).sum(2), TURNS - 1)
        angle = np.take_along_axis(angles, chosen, 1)
        tails = pivot[:, None] + margin[:, None, None] * _direction(angle)
        tried = np.concatenate([tails, angle[..., None]], 2)
        free = self._free(which, tried, others) & (weights[:, -1:] > 0)
        self.paddles[which, at] = tried[np.arange(len(which)), free.argmax(1)]
        return np.asarray(free.any(1))

    def _free(self, which: np.ndarray, tried: np.ndarray, others: np.ndarray | None = None) -> np.ndarray:
        """Whether paddles ``[n, k, 3]`` keep away from all that is taken, and from ``others [n, j, 3]``: ``[n, k]``."""
        points = tried[:, :, None, :2] + self.along[:, None] * _direction(tried[..., 2])[:, :, None]
        taken = self._is_taken(which, points.reshape(len(which), points.shape[1] * points.shape[2], 2))
        free = np.asarray(~taken.reshape(points.shape[:3]).any(2))
        for each in () if others is None else others.swapaxes(0, 1):
            distance = _distance(points[..., 0], points[..., 1], each[:, None, None], self.settings.paddle_length)
            free &= (distance >= self._clearance(which)[:, None, None]).all(2)
        return free

    def _clearance(self, which: np.ndarray) -> np.ndarray:
        """How far the middle lines of paddles are apart at least."""
        return 2 * self.margins[which] + self.settings.paddle_thickness

    def _is_taken(self, which: np.ndarray, points: np.ndarray) -> np.ndarray:
        """Whether points ``[n, k, 2]`` lie too near to a paddle or to the border: ``[n, k]``."""
        outside = _is_outside(self.settings, self.margins[which, None], points)
        cells = np.clip(points * self.grid, 0, self.taken.shape[1] - 1).astype(np.int32)
        return outside | self.taken[which[:, None], cells[..., 0], cells[..., 1]]

    def _take(self, which: np.ndarray, paddles: np.ndarray) -> None:
        """Keep others away from paddles ``[n, 3]``, one in each of these pictures."""
        reach = 2 * max(self.settings.margins) + self.settings.paddle_thickness
        where = _near(self.taken, which, paddles, self.settings.paddle_length, reach, self.grid)
        nearer = _distances(where, paddles, self.settings.paddle_length, self.grid) < self._clearance(which)[:, None]
        self.taken[tuple(each[nearer] for each in where)] = True

    def _angles(self, count: int) -> np.ndarray:
        return self.generator.uniform(-np.pi, np.pi, count).astype(np.float32)


def _turns(settings: Settings) -> tuple[np.ndarray, np.ndarray]:
    """The angles by which a contour may turn from one paddle to the next, and how often each is chosen, relatively."""
    turns = (np.arange(TURNS, dtype=np.float32) - TURNS // 2) / (TURNS // 2 + 1) * np.float32(np.pi / 2)
    return turns / np.float32(settings.continuity), np.cos(turns) ** 2


def _is_outside(settings: Settings, margin: float | np.ndarray, points: np.ndarray) -> np.ndarray:
    """Whether points ``[..., 2]`` are too near to the border for the middle line of a paddle."""
    border = settings.padding + np.asarray(margin + settings.paddle_thickness / 2, np.float32)
    y, x = points[..., 0], points[..., 1]
    far = settings.size - border
    return (y < border) | (y > far) | (x < border) | (x > far)


@lru_cache(maxsize=16)
def _prospects(settings: Settings, margin: float) -> np.ndarray:
    """How likely a contour is to stay inside of the picture for so many paddles more: ``[paddles, states]``.

    Drawn without regard to what lies ahead, hardly any contour of 14 paddles stays inside, and all others would be
    thrown away. To choose each paddle by its weight times the chance that the rest stays inside gives the same contours
    as often (Doob's h-transform; nearly, since states are rounded), and far fewer of them are thrown away.
    """
    centres = (np.arange(PLACES, dtype=np.float32) + np.float32(0.5)) * np.float32(settings.size / PLACES)
    angles = np.arange(ANGLES, dtype=np.float32) * np.float32(2 * np.pi / ANGLES)
    y, x, angle = np.meshgrid(centres, centres, angles, indexing="ij")
    turns, weights = _turns(settings)
    pivot = np.stack([y, x], -1) + np.float32(margin) * _direction(angle)
    new = angle[..., None] + turns
    heads = pivot[..., None, :] + np.float32(settings.paddle_length + margin) * _direction(new)
    chances = weights * ~_is_outside(settings, margin, heads)
    chances /= np.maximum(chances.sum(-1, keepdims=True), np.float32(1e-9))
    following = _state(settings, heads, new)
    result = [np.ones(angle.size, np.float32)]
    for _ in range(settings.contour_length):
        result.append((chances * result[-1][following]).sum(-1).ravel())
    return np.stack(result)


def _state(settings: Settings, heads: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """The number of the state that a contour is in whose last paddle ends there, with that angle."""
    cells = np.clip(heads * np.float32(PLACES / settings.size), 0, PLACES - 1).astype(np.int32)
    turn = np.rint(angles * np.float32(ANGLES / (2 * np.pi))).astype(np.int32) % ANGLES
    return (cells[..., 0] * PLACES + cells[..., 1]) * ANGLES + turn


def _render(settings: Settings, paddles: np.ndarray, discs: np.ndarray) -> np.ndarray:
    """Draw at twice the size, and take the means."""
    fine = np.zeros((len(paddles), SCALE * settings.size, SCALE * settings.size), np.float32)
    # Half a pixel of the fine picture at least, or a thin paddle would fall between its pixels' centres.
    thickness = max(settings.paddle_thickness / 2, 0.5 / SCALE)
    contours = 2 * settings.contour_length
    strokes = [
        (each, settings.paddle_length, thickness, settings.contrast if i < contours else settings.distractor_contrast)
        for i, each in enumerate(paddles.swapaxes(0, 1))
    ]
    for each in discs.swapaxes(0, 1):
        points = np.concatenate([each, np.zeros((len(each), 1), np.float32)], 1)
        strokes.append((points, 0, settings.marker_radius, 1))
    for each, length, reach, brightness in strokes:
        which = np.flatnonzero(~np.isnan(each[:, 0]))
        where = _near(fine, which, each[which], length, reach, SCALE)
        inside = _distances(where, each[which], length, SCALE) <= reach
        fine[tuple(place[inside] for place in where)] = brightness
    means = fine.reshape(len(fine), settings.size, SCALE, settings.size, SCALE).mean((2, 4))
    return np.rint(255 * means.clip(max=1)).astype(np.uint8)


def _near(
    grid: np.ndarray, which: np.ndarray, paddles: np.ndarray, length: float, reach: float, scale: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The cells around paddles ``[n, 3]``, as indices of ``grid``, each ``[n, k]``.

    What lies outside of the picture is moved to its border, where it is too far away, or was there before.
    """
    radius = scale * (length / 2 + reach) + 1
    steps = np.arange(-math.ceil(radius), math.ceil(radius) + 1, dtype=np.int32)
    y, x = (each.ravel() for each in np.meshgrid(steps, steps, indexing="ij"))
    inside = y**2 + x**2 <= radius**2
    middle = paddles[:, :2] + np.float32(length / 2) * _direction(paddles[:, 2])
    cells = np.floor(middle * scale).astype(np.int32)
    y, x = (np.clip(cells[:, i, None] + each[inside], 0, grid.shape[1] - 1) for i, each in enumerate((y, x)))
    return np.broadcast_to(which[:, None], y.shape), y, x


def _distances(
    where: tuple[np.ndarray, np.ndarray, np.ndarray], paddles: np.ndarray, length: float, scale: int
) -> np.ndarray:
    """From the centres of cells, as :func:`_near` gives them, to their paddle's middle line."""
    y, x = ((each + np.float32(0.5)) / np.float32(scale) for each in where[1:])
    return _distance(y, x, paddles[:, None], length)


def _direction(angle: np.ndarray) -> np.ndarray:
    return np.stack([np.sin(angle), np.cos(angle)], -1)


def _distance(y: np.ndarray, x: np.ndarray, paddles: np.ndarray, length: float) -> np.ndarray:
    """From points to the middle lines of paddles ``[..., 3]``; not as arrays of pairs, which take thrice as long."""
    sine, cosine = np.sin(paddles[..., 2]), np.cos(paddles[..., 2])
    y, x = y - paddles[..., 0], x - paddles[..., 1]
    along = np.clip(y * sine + x * cosine, 0, np.float32(length))
    y, x = y - along * sine, x - along * cosine
    return np.sqrt(y * y + x * x)
