"""Pipeline: the commands, the environment they run in, and the stages with their notebooks, in order.

It owns the command line, the order and staleness of the stages, the execution of notebooks and the form in which they
are committed, and what is made of a run's results: tables, model card, data sheet and reference. It computes no result
itself: notebooks and the other sub-packages do.
"""
