"""A model of the study as one file for other programs: ONNX for onnxruntime, LiteRT for telephones and small devices.

It owns which formats there are and how LiteRT's is made. Both take what a `.keras` file takes, grey values (N, side,
side, 1) in 0–255, and give its seven probabilities. It knows nothing of radiographs on disk or of calibration.
TensorFlow is imported for LiteRT alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from chestxray import files
from chestxray.config import StudyError
from chestxray.inference import engines
from chestxray.networks.class_maps import resizing_matrix

if TYPE_CHECKING:
    import keras


FORMATS = ("onnx", "litert")


def export(out: Path, kind: str, model: Path | None = None) -> int:
    """Write a model in another format.

    Args:
        out: the file to write.
        kind: one of `FORMATS`.
        model: a `.keras` file of the study; the reference ensemble if None.

    Returns:
        The file's size in bytes.

    Raises:
        StudyError: the format is unknown, the model is none of this study's or has a layer that can't be converted, or
            `out` cannot be written.
    """
    if kind not in FORMATS:
        raise StudyError(f"format {kind!r} is unknown; there are: {', '.join(FORMATS)}")
    path = model or engines.reference_model()
    if kind == "onnx":
        from chestxray.networks import onnx_graph

        data = onnx_graph.convert(path).SerializeToString()
    else:
        data = litert(path)
    files.atomic_write(out, data)
    return len(data)


def litert(path: Path) -> bytes:
    """Convert a model to LiteRT, the format that was called TensorFlow Lite, in float32 with built-in operations only.

    Args:
        path: a `.keras` file.

    Raises:
        StudyError: it is no model of the study, or TensorFlow's converter doesn't know a layer.
    """
    model = engines.load_keras(path)
    import tensorflow as tf

    plain = _without_resizing(model)

    @tf.function(input_signature=[tf.TensorSpec((None, *model.input_shape[1:]), tf.float32, name="radiograph")])
    def answer(radiograph: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"probabilities": plain(radiograph, training=False)}

    converter = tf.lite.TFLiteConverter.from_concrete_functions([answer.get_concrete_function()], plain)
    try:
        return converter.convert()
    except Exception as error:  # the converter raises its own, with pages of text
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
        raise StudyError(f"{path}: cannot be converted to LiteRT ({reason}); export it as onnx") from error


def _without_resizing(model: keras.Model) -> keras.Model:
    """The same model with each resizing as two products of matrices: LiteRT has no resizing that widens its filter.

    Other layers, and so all weights, are shared.
    """
    import keras
    from keras import layers, ops

    class Resized(layers.Layer):
        """What `keras.layers.Resizing` gives, with `bilinear`."""

        def __init__(self, like: layers.Resizing) -> None:
            super().__init__(name=like.name)
            self.sides = like.height, like.width
            self.antialias = like.antialias

        def call(self, images: Any) -> Any:
            rows, columns = (
                resizing_matrix(size, side, self.antialias)
                for size, side in zip(images.shape[1:3], self.sides, strict=True)
            )
            narrow = ops.matmul(columns, images)
            turned = ops.matmul(rows, ops.transpose(narrow, (0, 2, 1, 3)))
            return ops.transpose(turned, (0, 2, 1, 3))

    def replaced(layer: layers.Layer) -> layers.Layer:
        if isinstance(layer, keras.Model):
            return _without_resizing(layer)
        if isinstance(layer, layers.Resizing):
            if layer.interpolation != "bilinear" or layer.crop_to_aspect_ratio or layer.pad_to_aspect_ratio:
                raise StudyError(f"layer {layer.name} resizes in another way than bilinearly; export it as onnx")
            return Resized(layer)
        return layer

    return keras.models.clone_model(model, clone_function=replaced)
