"""The three stages. Each is a module with `run(config) -> Path` and a command line; none imports another."""
