"""Training: objectives (one loss per file), the loop, exact resume, data, recipes and the tasks that they name."""
