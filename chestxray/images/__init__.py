"""Radiographs as grey pixels: files of any kind are decoded, checked and brought to one square shape.

It owns the formats, what is refused, the bounds on memory, and the check that an image is a frontal chest
radiograph. It knows no dataset and no model, and imports neither TensorFlow nor pandas.
"""

from chestxray.config import lazy

_OWNERS = {
    "pixels": "Facts decode prepare_pixels",
    "load": "Radiograph read",
    "input_check": "flags",
}
__getattr__ = lazy(__name__, _OWNERS)
