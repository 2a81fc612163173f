"""Inference: the answer for a radiograph of one's own, as a table, a picture or a page."""
