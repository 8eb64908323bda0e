"""Model families: configuration, loading, and the comparison of a decoder with `transformers` when it is loaded."""
