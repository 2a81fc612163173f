"""Training: samples from the trees, the recipe, the fit and what it leaves, and the choice of an ensemble."""
