"""Phantom radiographs: patients, their anatomy and lesions, drawn as images, written as a dataset."""
