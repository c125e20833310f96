"""The Mamba language model under its published import paths."""
