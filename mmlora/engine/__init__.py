"""The engine: scheduling, running the model, sampling, and building outputs."""
