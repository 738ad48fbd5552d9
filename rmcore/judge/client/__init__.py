"""Chat completions over HTTP within limits: rates, concurrency, retries, a breaker, deadlines."""
