"""The audit of a dataset: duplicates, leaks between splits, imbalance, odd images and probable label errors."""
