"""Who writes critiques: an endpoint (``chat``), or a judge's stored comparisons (``stored``)."""
