"""From a directory to tokens: loading, memory budget, the step loop."""
