"""Datasets: where radiographs come from, the tables that describe them, splits, and the trees to train models on.

`sources` and `kaggle` provide the raw folder, `nih_tables` reads its tables, `integrity` checks it. `splits` says who
is in which split, `preparation` writes the images and the manifest, `manifest` reads it, `augmentation` and
`near_duplicates` work on what was prepared, `archive` carries it to another machine, and `phantom` draws radiographs of
patients who do not exist. Notebooks import these modules by name.
"""
