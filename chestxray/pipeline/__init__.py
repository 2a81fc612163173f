"""Pipeline: the commands, the environment they run in, and the stages with their notebooks, in order."""
