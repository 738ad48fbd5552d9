"""Every call to a judge on disk: asked once, kept with its costs, found again after a restart."""
