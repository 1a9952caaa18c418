"""What make runs beside the stages."""
