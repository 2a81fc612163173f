"""Radiographs as grey pixels: files of any kind are decoded, checked and brought to one square shape."""
