"""What a judge is asked and how its answer is read: the prompt, hostile text made harmless, the verdict."""
