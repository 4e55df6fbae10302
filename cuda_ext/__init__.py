"""Device backends: the memory that holds windows and the attention that runs on it."""
