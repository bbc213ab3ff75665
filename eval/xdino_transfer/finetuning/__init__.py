"""Fine-tuning and supervised training of classifiers: a recipe, its plan, the job, what judges it."""
