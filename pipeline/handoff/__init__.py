"""What lies on disk between the stages: artifacts, saved states, lineage, found runs."""
