"""Chest X-rays image classification: the code that the study's notebooks share.

Importing this package is cheap and pulls in neither TensorFlow nor pandas; each module imports what it needs.
"""

__version__ = "0.1.0"
