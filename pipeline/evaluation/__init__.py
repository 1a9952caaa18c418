"""What a run is worth: metrics, judges, the report, and studies over seeds and over-optimisation."""
