"""Phantoms: chest radiographs of patients who do not exist, drawn from anatomy and X-ray physics, and their datasets.

`compose` decides what an image shows, `render` takes the radiograph, `boxes` says where its findings lie, and
`write_dataset` writes a dataset in the NIH layout.
"""

from chestxray.config import lazy

_OWNERS = {
    "anatomy": "SIZES",
    "radiograph": "Box Scene boxes compose render",
    "patients": "slot",
    "dataset": "write_dataset",
}
__getattr__ = lazy(__name__, _OWNERS)
