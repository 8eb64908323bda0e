"""Engine core: scheduling, running the model, sampling, and building outputs."""
