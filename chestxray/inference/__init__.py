"""Inference: answers for radiographs of one's own, as a table, a picture or a web page.

`reader.load` gives a `Reader`, which reads files and predicts; `engines` run the model, `interpretation` calibrates its
scores, and an `answers.Answer` holds the result. `batch` writes answers to tables, `labelled` measures them where
labels are known, `overlay` colours heat-maps, `plain_words` explains findings, and `web` serves the page.
"""
