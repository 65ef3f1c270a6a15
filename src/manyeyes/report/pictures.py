"""The notable examples of an evaluation as pictures, with the pixels that decided."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from manyeyes.data.dataset import Dataset
from manyeyes.errors import DatasetError, ImageError, ManyeyesError
from manyeyes.evaluation.notable import NotableExample, Place
from manyeyes.evaluation.recogniser import Recogniser
from manyeyes.recognition import saliency
from manyeyes.recognition.inputs import remaining_preprocessing
from manyeyes.recognition.predictor import softmax
from manyeyes.report.thumbnails import data_uri

# For all maps of a report; what is left then has none.
SALIENCY_SECONDS = 10.0
_BATCH_SIZE = 64
_HIGHEST_LEVEL = 2


@dataclass(frozen=True)
class Picture:
    """A notable example, to be looked at.

    Attributes:
        example: what was found of it.
        image: a data URI of what the model saw; of the stored image where there is no model.
        overlay: a data URI of the same with what spoke for the predicted class; None where there is none.
        is_tiny: whether the picture is one to the pixel, to be enlarged without smoothing.
    """

    example: NotableExample
    image: str
    overlay: str | None
    is_tiny: bool


@dataclass(frozen=True)
class Pictures:
    """Notable examples of one evaluation.

    Attributes:
        mistakes, uncertain: in the order of the evaluation.
        notices: what is missing, and why.
    """

    mistakes: tuple[Picture, ...] = ()
    uncertain: tuple[Picture, ...] = ()
    notices: tuple[str, ...] = ()

    def __add__(self, other: Pictures) -> Pictures:
        return Pictures(
            tuple(sorted((*self.mistakes, *other.mistakes), key=lambda picture: -picture.example.probability)),
            tuple(sorted((*self.uncertain, *other.uncertain), key=lambda picture: picture.example.margin)),
            tuple(dict.fromkeys((*self.notices, *other.notices))),
        )

    def first(self, number: int) -> Pictures:
        """Only so many of each kind."""
        return Pictures(self.mistakes[:number], self.uncertain[:number], self.notices)


def draw(
    dataset_uri: str,
    dataset_fingerprint: str,
    split: str,
    model: str,
    model_fingerprint: str,
    mistakes: Sequence[NotableExample],
    uncertain: Sequence[NotableExample],
    *,
    explain_seconds: float = SALIENCY_SECONDS,
) -> Pictures:
    """Read examples from the dataset's shards, and find the pixels that decided.

    Args:
        explain_seconds: about how long the maps may take together; 0: none.

    Returns:
        Pictures, fewer where the dataset or the model is gone or was changed; then a notice says so.
    """
    if not mistakes and not uncertain:
        return Pictures()
    try:
        data = Dataset(dataset_uri)
        if data.manifest.fingerprint != dataset_fingerprint:
            raise DatasetError(f"{dataset_uri} was changed since")
        stored = _read(data, split, [example.place for example in (*mistakes, *uncertain)])
    except (DatasetError, OSError) as error:
        return Pictures(notices=(f"No pictures of examples: {error}",))
    notices = []
    recogniser = None
    try:
        recogniser = Recogniser.open(model)
        if recogniser.fingerprint != model_fingerprint:
            raise ManyeyesError(f"{model} has other weights now")
    except (ManyeyesError, OSError) as error:
        recogniser = None
        notices.append(f"Pictures are as stored, without the pixels that decided: {error}")
    chain = data.preprocessing
    if recogniser is not None:
        chain = remaining_preprocessing(recogniser.preprocessing, data.preprocessing)
    inputs: dict[Place, np.ndarray] = {}
    for place, image in stored.items():
        try:
            # Stored pixels have gone through the dataset's own preprocessing before.
            inputs[place] = chain(image) if isinstance(image, bytes) else chain.apply(image) if recogniser else image
        except ImageError as error:
            notices.append(f"An example can't be decoded: {error}")
    overlays: dict[Place, str] = {}
    if recogniser is not None and explain_seconds > 0:
        try:
            wanted = [
                (each.place, each.predicted) for each in _alternating(mistakes, uncertain) if each.place in inputs
            ]
            overlays = _explain(recogniser, inputs, dict(wanted), explain_seconds)
        except ManyeyesError as error:
            notices.append(f"Which pixels decided is not shown: {error}")
        else:
            if len(overlays) < len(inputs):
                notices.append(
                    f"Which pixels decided is shown for {len(overlays)} of {len(inputs)} pictures: it takes long."
                )

    def pictures(examples: Sequence[NotableExample]) -> tuple[Picture, ...]:
        return tuple(
            Picture(
                example,
                data_uri(inputs[example.place]),
                overlays.get(example.place),
                max(inputs[example.place].shape[:2]) <= 64,
            )
            for example in examples
            if example.place in inputs
        )

    return Pictures(pictures(mistakes), pictures(uncertain), tuple(notices))


def _read(data: Dataset, split: str, places: Iterable[Place]) -> dict[Place, np.ndarray | bytes]:
    """The stored images at these places; a row group is read once."""
    by_group: dict[tuple[str, int], set[int]] = defaultdict(set)
    for place in places:
        by_group[place.shard, place.row_group].add(place.row)
    shards = {shard.name: shard for shard in data.split(split).shards}
    found: dict[Place, np.ndarray | bytes] = {}
    for (name, group), rows in sorted(by_group.items()):
        if name not in shards:
            raise DatasetError(f"{data.uri} has no shard {name} in {split}")
        with data.open_shard(shards[name]) as reader:
            images = reader.read(group).images
            for row in rows:
                image = images[row]
                found[Place(name, group, row)] = image if isinstance(image, bytes) else image.copy()
    return found


def _alternating(*kinds: Sequence[NotableExample]) -> Iterable[NotableExample]:
    for index in range(max(map(len, kinds))):
        for kind in kinds:
            if index < len(kind):
                yield kind[index]


def _explain(
    recogniser: Recogniser, inputs: dict[Place, np.ndarray], labels: dict[Place, int], max_seconds: float
) -> dict[Place, str]:
    """Overlays for as many as the time allows, in the order of `labels`; as fine as it allows for all."""
    logits_of = recogniser.load(_BATCH_SIZE)

    def probabilities(images: np.ndarray) -> np.ndarray:
        return softmax(logits_of(images), recogniser.temperature)

    level = _level(probabilities, next(iter(inputs.values())), len(labels), max_seconds)
    overlays: dict[Place, str] = {}
    started = time.perf_counter()
    for place, label in labels.items():
        if time.perf_counter() - started > max_seconds:
            break
        pixels = inputs[place]
        found = saliency.overlay(pixels, saliency.solve(probabilities, pixels, label, level))
        decoded = cv2.imdecode(np.frombuffer(found, np.uint8), cv2.IMREAD_COLOR)
        assert decoded is not None
        overlays[place] = data_uri(np.ascontiguousarray(decoded[:, :, ::-1]))
    return overlays


def _level(
    probabilities: Callable[[np.ndarray], np.ndarray], pixels: np.ndarray, num_pictures: int, max_seconds: float
) -> int:
    batch = np.repeat(pixels[None], 16, axis=0)
    probabilities(batch)  # the first call compiles
    started = time.perf_counter()
    probabilities(batch)
    seconds = (time.perf_counter() - started) / 16
    fitting = [
        level
        for level, num_answers in enumerate(saliency.NUM_ANSWERS[: _HIGHEST_LEVEL + 1])
        if num_answers * seconds * num_pictures <= max_seconds
    ]
    return max(fitting, default=0)
