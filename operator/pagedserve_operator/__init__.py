"""The operator: an InferenceService becomes a sized, rolled out, autoscaled engine."""
