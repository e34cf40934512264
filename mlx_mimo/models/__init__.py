"""What is computed: configuration, model, KV caches."""
