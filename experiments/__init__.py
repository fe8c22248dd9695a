"""What produces a figure or a table; results lie in ``experiments/results`` with device, versions and commit."""
