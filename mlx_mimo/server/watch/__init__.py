"""What watches the engine: figures for Prometheus, memory pressure, the /residency page."""
