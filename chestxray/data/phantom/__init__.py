"""Phantoms: chest radiographs of patients who do not exist, drawn from anatomy and X-ray physics, and their datasets.

`compose` decides what an image shows, `render` takes the radiograph, `boxes` says where its findings lie, and
`write_dataset` writes a dataset in the NIH layout.
"""

from chestxray.config import lazy

_OWNERS = {
    "SIZES": "anatomy",
    "Box": "radiograph",
    "Scene": "radiograph",
    "boxes": "radiograph",
    "compose": "radiograph",
    "render": "radiograph",
    "slot": "patients",
    "write_dataset": "dataset",
}
__getattr__ = lazy(__name__, _OWNERS)
