"""Find adapters that nobody loaded, through the registered resolvers."""
