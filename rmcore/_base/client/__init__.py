"""Requests to a server within limits: rates, concurrency, retries, a breaker, deadlines."""
