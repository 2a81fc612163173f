"""Class activation maps: which places of a radiograph speak for a class, by several methods."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from chestxray.config import StudyError

if TYPE_CHECKING:
    import keras


METHODS: dict[str, str] = {
    "gradcam": "Grad-CAM",
    "hirescam": "HiResCAM",
    "layercam": "LayerCAM",
}
"""How a map is made of a feature map and the slopes of the score there, and what that is called.

`gradcam` weighs each channel by its mean slope (Selvaraju et al., ICCV 2017), `hirescam` each place of it by the slope
there (Draelos & Carin 2020), `layercam` by the slope where that is positive (Jiang et al., IEEE TIP 2021), which is
made for finer maps than the last."""


class Way(NamedTuple):
    """A way of making a heat-map.

    Attributes:
        cells: of the last feature map with at least so many cells a side; 1 is the last of all.
        method: a key of `METHODS`.
    """

    cells: int = 1
    method: str = "gradcam"


LAST = Way()
"""Grad-CAM at the last feature map, as its paper makes it."""

FINE = Way(16, "layercam")
"""A finer map: at the last feature map with sixteen cells a side, by the method that is made for earlier layers."""


class _Net(NamedTuple):
    """A network opened up: `net` gives its feature maps, one for each way, and what the class scores follow from.

    `dense` is the last layer, whose input it gives, where that has an activation; None where it gives the scores
    themselves (`scores`), or only the probabilities.
    """

    net: keras.Model
    dense: Any
    scores: bool


class Explainer:
    """Class activation maps of a network, or of the networks that an ensemble joins.

    The gradient is that of the class's score before softmax or sigmoid, taken at a feature map that a convolution
    leads to, always in inference mode. One graph is traced for each network; it makes the maps of all ways.

    Attributes:
        members: the networks, one where the model joins none.
        mirrored: whether the ensemble shows each network the radiograph's mirror image too; a map is then the mean of
            both, that of the mirror image turned back. Of enlarged radiographs there are no maps.
        ways: how maps are made.
        cells: rows and columns of the coarsest member's feature map, for each way.
        batch_size: images a step.
    """

    def __init__(self, model: keras.Model, batch_size: int = 32, ways: Sequence[Way] = (LAST,)) -> None:
        """Take a network apart.

        Args:
            model: radiographs (N, side, side, 1) in 0–255 to seven probabilities.
            batch_size: images a step.
            ways: how maps are made. The last feature map of a small radiograph may be too coarse to point at anything.

        Raises:
            StudyError: a method is unknown; a network has no convolution, so that nothing in it has a place; or no map
                is so fine.
        """
        for way in ways:
            if way.method not in METHODS:
                raise StudyError(f"heat-map method {way.method!r} is unknown; there are: {', '.join(METHODS)}")
        self.members = _members(model)
        self.mirrored = self.members[0] is not model and _turns(model)
        self.batch_size = batch_size
        self.ways = tuple(ways)
        opened = [_opened(member, [way.cells for way in ways]) for member in self.members]
        self.cells = [min(tuple(net.net.outputs[place].shape[1:3]) for net in opened) for place in range(len(ways))]
        self._steps = [_traced(net, [way.method for way in ways]) for net in opened]

    def all_maps(self, pixels: np.ndarray, classes: np.ndarray) -> np.ndarray:
        """Each member's maps in each way.

        Args:
            pixels: (n, H, W, 1) or (n, H, W), grey values 0–255.
            classes: (n,) or one index of `CLASSES`: which class each map is for.

        Returns:
            (ways, members, n, H, W) float32, each map 0 to 1 with its maximum at 1; all 0 where nothing speaks for the
            class.
        """
        pixels = np.asarray(pixels)
        pixels = pixels[..., None] if pixels.ndim == 3 else pixels
        classes = np.broadcast_to(np.asarray(classes, dtype=np.int32), len(pixels))
        if self.mirrored:
            views = [self._views(pixels, classes), self._views(pixels[:, :, ::-1], classes)[..., ::-1]]
            return _scaled(np.mean(views, axis=0))
        return self._views(pixels, classes)

    def member_maps(self, pixels: np.ndarray, classes: np.ndarray, way: int = 0) -> np.ndarray:
        """Each member's maps in one way, (members, n, H, W); arguments as for `all_maps`."""
        return self.all_maps(pixels, classes)[way]

    def _views(self, pixels: np.ndarray, classes: np.ndarray) -> np.ndarray:
        """Each member's maps of the radiographs as given."""
        maps = np.zeros((len(self.ways), len(self.members), *pixels.shape[:3]), np.float32)
        for start in range(0, len(pixels), self.batch_size):
            part = slice(start, start + self.batch_size)
            images = pixels[part].astype(np.float32)
            # Every step has the same shape, so that each graph is traced once.
            missing = self.batch_size - len(images)
            images = np.pad(images, ((0, missing), (0, 0), (0, 0), (0, 0)))
            asked = np.pad(classes[part], (0, missing))
            for member, step in enumerate(self._steps):
                maps[:, member, part] = np.asarray(step(images, asked))[:, : self.batch_size - missing]
        return _scaled(maps)

    def maps(self, pixels: np.ndarray, classes: np.ndarray, way: int = 0) -> np.ndarray:
        """The mean of the members' maps, (n, H, W) float32 from 0 to 1; arguments as for `all_maps`."""
        return joined(self.member_maps(pixels, classes, way))


def joined(maps: np.ndarray) -> np.ndarray:
    """The ensemble's maps, (…, n, H, W), of its members' (…, members, n, H, W)."""
    return _scaled(maps.mean(axis=-4))


def _scaled(maps: np.ndarray) -> np.ndarray:
    top = maps.max(axis=(-2, -1), keepdims=True)
    return np.divide(maps, top, out=np.zeros_like(maps), where=top > 0)


def _members(model: keras.Model) -> list[keras.Model]:
    """The networks that an ensemble joins: its layers that take and give what it does; else the model itself."""
    import keras

    def alike(layer: Any) -> bool:
        return (
            isinstance(layer, keras.Model)
            and layer.output_shape == model.output_shape
            and len(layer.input_shape) == len(model.input_shape) == 4
        )

    found = [part for layer in model.layers if alike(layer) for part in _members(layer)]
    return found or [model]


def _turns(model: keras.Model) -> bool:
    """Whether an ensemble shows its networks the radiograph's mirror image."""
    return any(type(operation).__name__ == "Flip" for operation in model.operations)


def _opened(model: keras.Model, cells: Sequence[int]) -> _Net:
    """The same network with a feature map for each number of cells and what comes before its last activation."""
    import keras

    calls: list[tuple[Any, Any, Any]] = []

    def call(layer: Any, *args: Any, **kwargs: Any) -> Any:
        given = args[0] if args else None
        if isinstance(layer, keras.Model) and _convolves(layer):
            keras.models.clone_model(layer, given, clone_function=lambda part: part, call_function=call)
            return calls[-1][2]
        result = layer(*args, **kwargs)
        calls.append((layer, given, result))
        return result

    # The public way to walk a network's graph: rebuild it around the same layers.
    rebuilt = keras.models.clone_model(model, clone_function=lambda layer: layer, call_function=call)
    convolutions = [place for place, (layer, _, _) in enumerate(calls) if _convolves(layer)]
    if not convolutions:
        raise StudyError(f"{model.name} has no convolution, so it has no heat-map: choose another model")
    places = [
        result
        for layer, _, result in calls[convolutions[0] :]
        if _rank(result) == 4 and "Pooling" not in type(layer).__name__
    ]
    features = []
    for fewest in cells:
        fine = [result for result in places if min(result.shape[1:3]) >= fewest]
        if not fine:
            raise StudyError(f"{model.name} has no feature map of {fewest} cells a side: ask for fewer")
        features.append(fine[-1])
    layer, given, result = calls[-1]
    dense = layer if isinstance(layer, keras.layers.Dense) else None
    before = given if dense or isinstance(layer, keras.layers.Activation | keras.layers.Softmax) else result
    return _Net(keras.Model(rebuilt.input, [*features, before]), dense, before is not result)


def _rank(tensor: Any) -> int:
    return len(getattr(tensor, "shape", ()))


def _convolves(layer: Any) -> bool:
    import keras

    if isinstance(layer, keras.Model):
        return any(_convolves(part) for part in layer.layers)
    return isinstance(layer, keras.layers.Conv2D | keras.layers.DepthwiseConv2D | keras.layers.SeparableConv2D)


def _traced(opened: _Net, methods: Sequence[str]) -> Callable[[np.ndarray, np.ndarray], Any]:
    """A graph from a batch and its classes to unscaled maps at the radiographs' size, (ways, N, H, W)."""
    import tensorflow as tf

    def score(before: Any) -> Any:
        before = tf.cast(before, tf.float32)
        if opened.dense is not None:
            logits = tf.matmul(before, tf.cast(opened.dense.kernel, tf.float32))
            return logits + tf.cast(opened.dense.bias, tf.float32) if opened.dense.use_bias else logits
        if opened.scores:
            return before
        # Nothing tells the scores: take the log-odds, which are the score before a sigmoid.
        sure = tf.clip_by_value(before, 1e-6, 1 - 1e-6)
        return tf.math.log(sure) - tf.math.log1p(-sure)

    @tf.function(jit_compile=False, autograph=False)
    def step(images: Any, classes: Any) -> Any:
        with tf.GradientTape() as tape:
            # Members are frozen: without this the tape would record nothing.
            tape.watch(images)
            *features, before = opened.net(images, training=False)
            asked = tf.reduce_sum(tf.gather(score(before), classes, axis=1, batch_dims=1))
        maps = []
        for place, slope, method in zip(features, tape.gradient(asked, features), methods, strict=True):
            place, slope = tf.cast(place, tf.float32), tf.cast(slope, tf.float32)
            if method == "gradcam":
                slope = tf.reduce_mean(slope, axis=(1, 2), keepdims=True)
            elif method == "layercam":
                slope = tf.nn.relu(slope)
            heat = tf.nn.relu(tf.reduce_sum(place * slope, axis=-1, keepdims=True))
            maps.append(tf.image.resize(heat, tf.shape(images)[1:3], "bilinear")[..., 0])
        return tf.stack(maps)

    return lambda images, classes: step(tf.convert_to_tensor(images), tf.convert_to_tensor(classes))


def leaves(model: keras.Model) -> list[Any]:
    """All layers of a network, those of networks inside it in their place, from input to output."""
    import keras

    return [leaf for layer in model.layers for leaf in (leaves(layer) if isinstance(layer, keras.Model) else [layer])]
