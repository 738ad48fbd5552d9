"""Judges around judges: tiers, canaries, a watch on disagreement."""
