"""TRL's trainers told our keys: stages 1 and 2."""
