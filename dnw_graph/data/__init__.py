"""Images with class labels: sources, order and transforms."""
