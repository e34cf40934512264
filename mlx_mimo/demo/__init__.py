"""The embedded demo checkpoint: a small trained model of the same architecture, in the released format."""
