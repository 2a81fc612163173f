"""Datasets: where radiographs come from, the tables that describe them, splits, and the trees to train models on."""
