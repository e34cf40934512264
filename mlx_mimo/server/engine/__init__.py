"""The generation thread and what it works with: batches, KV caches kept between requests, grammar masks."""
