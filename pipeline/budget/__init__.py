"""What a recipe needs of a machine, in bytes and in hours, before anything is loaded: `make plan`."""
