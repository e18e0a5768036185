"""Pages and services that answer with what a model finds."""
