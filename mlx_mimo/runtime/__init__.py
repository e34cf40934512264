"""From a directory to tokens: loading, the stream of steps, sampling, adapters, conversations."""
