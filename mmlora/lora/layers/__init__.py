"""The layers that add adapters to a model's modules, and the device slots they read."""
