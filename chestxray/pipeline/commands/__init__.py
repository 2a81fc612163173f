"""Commands: what users and maintainers type."""
