"""Model families: configuration, loading, and the checks that a decoder passes at load."""
