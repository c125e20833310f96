"""Pictures of runs and of what a model does."""
